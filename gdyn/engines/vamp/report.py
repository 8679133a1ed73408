"""What a VAMP run learned: predictions, kinetics with confidence bands, figures, one HTML page; and scores on other
data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure

from gdyn.engines.vamp import figures, score
from gdyn.engines.vamp.clock import Clock
from gdyn.engines.vamp.findings import learned, warnings
from gdyn.engines.vamp.frames import FramePairs, Trajectory
from gdyn.engines.vamp.kinetics import Band, Kinetics, analyse
from gdyn.engines.vamp.page import render
from gdyn.errors import UserError
from gdyn.report import how_made, plain, save_png, training_figure
from gdyn.rundir import RunDir, write_json, write_text

if TYPE_CHECKING:
    from gdyn.engines.vamp.engine import Vamp
    from gdyn.inference import Run


def report(
    run: Run, split: str = "test", trajectories: Sequence[str] | None = None, lags: Sequence[int] | None = None
) -> dict[str, Any]:
    """Predict, analyse and write `predictions/` and `analysis/` of the run folder. Returns what analysis_summary.json
    holds. `trajectories` (directories) replace those of the split; `lags` are frames.

    Raises: UserError if the split has no data, or too short ones.
    """
    engine: Vamp = run.engine  # type: ignore[assignment]
    sources = list(trajectories or getattr(engine, split) or [])
    if not sources:
        raise UserError(f"the run has no {split} trajectories; choose another --split, e.g. validation.")
    opened = engine.trajectories(sources)
    predictions = [engine.predict(run, trajectory) for trajectory in opened]
    scores = pooled_scores(run, opened)
    del scores["timescales"]  # of the singular values; a report gives those of the Koopman matrix, which have bands
    origin = {
        "run": run.dir.path.name,
        "checkpoint": run.tag,
        "split": split,
        "trajectories": sources,
        "scores": scores,
    }
    return write(
        run.dir, predictions, engine.tau, Clock(engine.frame_time, engine.time_unit), origin, how_made(run), lags
    )


def write(
    run_dir: RunDir,
    predictions: Sequence[np.ndarray],
    lag: int,
    clock: Clock,
    origin: Mapping[str, Any],
    facts: Mapping[str, Any],
    lags: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The report of predictions (F, n, k), one per trajectory. `origin` (run, checkpoint, split, scores) goes into the
    summary as it is, `facts` onto the page."""
    kinetics = analyse(predictions, lag, lags)
    for folder in (run_dir.predictions, run_dir.analysis):
        folder.mkdir(parents=True, exist_ok=True)
    saved = [run_dir.predictions / f"{origin['split']}_{i}.npy" for i in range(len(predictions))]
    for path, prediction in zip(saved, predictions, strict=True):
        np.save(path, prediction.astype(np.float32, copy=False))
    drawn = draw(kinetics, predictions[0], clock)
    training = training_figure(run_dir.metrics_jsonl, [("vamp1", "VAMP-1"), ("vamp2", "VAMP-2")])
    if training is not None:
        drawn["training"] = training
    pictures = {name: save_png(figure, run_dir.analysis / f"{name}.png") for name, figure in drawn.items()}
    html = run_dir.report_html
    summary = {**origin, "targets": predictions[0].shape[1], **summarize(kinetics, clock)} | {
        "files": {
            "report": str(html),
            "predictions": [str(path) for path in saved],
            "figures": [str(path) for path in pictures.values()],
        }
    }
    write_text(html, render(summary, kinetics, clock, pictures, facts))
    write_json(run_dir.analysis / "analysis_summary.json", summary)
    return summary


def draw(kinetics: Kinetics, first: np.ndarray, clock: Clock) -> dict[str, Figure]:
    """All figures by name; `first` (F, n, k) are the predictions an excerpt is taken from."""
    return {
        "implied_timescales": figures.implied_timescales(kinetics, clock),
        "chapman_kolmogorov": figures.chapman_kolmogorov(kinetics, clock),
        "populations": figures.populations(kinetics),
        "eigenvectors": figures.eigenvectors(kinetics, clock),
        "excerpt": figures.excerpt(first, kinetics, clock),
    }


def evaluate(run: Run, sources: Sequence[str]) -> dict[str, Any]:
    """Scores, singular values and timescales (in the engine's unit) of the run's weights on other trajectories, each
    computed once over all pairs of frames of all of them. No score includes the constant singular function.

    Raises: UserError, MissingFile for data that cannot be used.
    """
    engine: Vamp = run.engine  # type: ignore[assignment]
    trajectories = engine.trajectories(list(sources))
    scores = pooled_scores(run, trajectories)
    frames = scores.pop("timescales")
    times = [None if time is None else time * engine.frame_time for time in frames["values"]]
    return {
        "run": str(run.dir.path),
        "checkpoint": run.tag,
        "data": list(sources),
        "frames": sum(map(len, trajectories)),
        **scores,
        "timescales": {"lag": frames["lag"] * engine.frame_time, "unit": engine.time_unit, "values": times},
    }


def pooled_scores(run: Run, trajectories: Sequence[Trajectory], batch_pairs: int = 256) -> dict[str, Any]:
    """`Vamp.pooled` of all pairs of frames of all trajectories, once."""
    engine: Vamp = run.engine  # type: ignore[assignment]
    pairs = FramePairs(trajectories, engine.tau)
    total = torch.zeros((), dtype=torch.float64)
    with torch.inference_mode():
        for start in range(0, len(pairs), batch_pairs):
            batch = pairs[np.arange(start, min(start + batch_pairs, len(pairs)))]
            total = total + score.moments(*engine._features(run.model(batch)))
    return engine.pooled(total)


def summarize(kinetics: Kinetics, clock: Clock) -> dict[str, Any]:
    """Kinetics as JSON, times in the clock's unit. None: flagged, or no bound."""
    k, test, time, unit = kinetics, kinetics.chapman_kolmogorov, clock.frame_time, clock.unit
    return {
        "unit": unit,
        "frame_time": time,
        "lag": k.lag * time,
        "frames": k.frames,
        "states": len(k.populations.value),
        "effective_rank": k.rank,
        "learned": learned(k, clock),
        "warnings": warnings(k, clock),
        "timescales": {"lag": k.lag * time, "unit": unit, **_band(k.timescales, time)},
        "implied_timescales": {"lags": plain(k.lags * time), "unit": unit, **_band(k.implied_timescales, time)},
        "koopman": _band(k.koopman),
        "eigenvectors": plain(k.eigenvectors),
        "stationary_distribution": _band(k.stationary),
        "populations": _band(k.populations),
        "lifetimes": {"unit": unit, **_band(k.lifetimes, time)},
        "dwell_times": {"unit": unit, "values": plain(k.dwell_times * time)},
        "transition_counts": plain(k.transitions),
        "chapman_kolmogorov": {
            "times": plain(test.multiples * k.lag * time),
            "unit": unit,
            "predicted": _band(test.predicted),
            "estimated": _band(test.estimated),
            "deviation": test.deviation,
            "holds": not test.fails.any(),
        },
    }


def _band(band: Band, scale: float = 1.0) -> dict[str, Any]:
    return {name: plain(bound * scale) for name, bound in zip(("values", "lower", "upper"), band, strict=True)}
