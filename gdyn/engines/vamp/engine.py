"""The VAMP engine: graph dynamical networks that learn slow states of target atoms from molecular dynamics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from gdyn.collectives import sum_over_ranks
from gdyn.engine import Dataset, Engine, Predictor, Step
from gdyn.engines.vamp import score
from gdyn.engines.vamp.frames import FramePairs, Trajectory
from gdyn.engines.vamp.lobes import Lobe, Lobes, Norm
from gdyn.errors import UserError
from gdyn.phases import Phase

if TYPE_CHECKING:
    from gdyn.inference import Run
    from gdyn.ranks import RankContext

Window = Callable[[Tensor], "tuple[score.Covariances, score.Slope, dict[str, Tensor]]"]
"""From a micro-batch's own moments to what its share of the objective needs."""


@dataclass(frozen=True)
class Vamp(Engine):
    """Graph dynamical networks (GDyNet, GDyNet-ferro) trained with VAMP objectives: vamp1, vamp2, vampe and
    vamp_sym."""

    train: list[str]
    """Trajectory directories to learn from (see the data format in gdyn/engines/vamp/README.md)."""

    validation: list[str]
    """Trajectory directories that choose the best checkpoint."""

    test: list[str] | None = None
    """Trajectory directories for the final scores; never used for a choice."""

    model_type: Literal["vanilla", "ferro"] = "vanilla"
    """vanilla: atom types and distances; ferro: also a vector per atom."""

    tau: PositiveInt = 10
    """Lag, in frames."""

    state_len: PositiveInt = 10
    """Number of states k."""

    atom_fea_len: PositiveInt = 64
    """Features per atom."""

    n_conv: PositiveInt = 3
    """Graph convolutions."""

    cutoff: PositiveFloat = 6.0
    """Range of the Gaussian distance features, Å."""

    num_gaussians: PositiveInt = 50
    """Gaussian distance features between 0 and the cutoff."""

    lobe_sharing: Literal["independent", "shared"] = "independent"
    """Whether frames t and t + tau see two networks, which start equal, or one."""

    norm: Norm = "atom"
    """Normalisation inside the lobes. atom: layer norm, exact under any split of the batch; batch: the original's,
    whose statistics belong to one micro-batch (synchronised over ranks)."""

    epsilon: NonNegativeFloat = 1e-10
    """Threshold on eigenvalues when covariances are inverted."""

    mode: score.Mode = "trunc"
    """What happens to eigenvalues below epsilon: dropped (trunc), shifted (regularize), raised (clamp)."""

    epsilon_scale: Literal["relative", "absolute"] = "relative"
    """Whether epsilon is in units of the largest eigenvalue or absolute, as in the original program."""

    covariance_scope: Literal["global", "local"] = "global"
    """global: the objective is the score of all ranks x micro-batches; local: the mean of their separate scores, as
    others do, which depends on the batch size per rank and is biased upwards."""

    vamp_sym_gradient: Literal["legacy", "exact"] = "legacy"
    """legacy: the original's gradient of vamp_sym, whose cross term is doubled and which favours crisp states."""

    frame_time: PositiveFloat = 1.0
    """Time between stored frames, in time_unit; for reports only."""

    time_unit: str = "frames"
    """Unit of frame_time, e.g. ps."""

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test"):
            paths = getattr(self, split)
            # Absolute, so that the run's own copy of the run file works from any folder.
            object.__setattr__(self, split, paths and [str(Path(path).absolute()) for path in paths])

    @property
    def ferro(self) -> bool:
        return self.model_type == "ferro"

    @property
    def inversion(self) -> score.Inversion:
        return score.Inversion(self.mode, self.epsilon, self.epsilon_scale == "relative")

    shown: ClassVar[tuple[str, ...]] = ("vamp1", "vamp2")

    def objectives(self) -> tuple[str, ...]:
        return tuple(score.SCORES)

    def higher_is_better(self, objective: str) -> bool:
        return True

    def model(self) -> Lobes:
        if self.state_len < 2:
            raise UserError(
                f"engine.state_len = {self.state_len}; probabilities of fewer than 2 states have no dynamics."
            )
        if self.num_gaussians < 2:
            raise UserError(f"engine.num_gaussians = {self.num_gaussians}; at least 2 are needed to span 0..cutoff.")
        lobe = Lobe(
            self.state_len, self.atom_fea_len, self.n_conv, self.cutoff, self.num_gaussians, self.norm, self.ferro
        )
        return Lobes(lobe, self.lobe_sharing == "shared")

    def trajectories(self, sources: list[str]) -> list[Trajectory]:
        """A list of directories, or, as the original program wrote it, one trajectory's files in order."""
        if len(sources) > 1 and all(source.endswith(".npy") for source in sources):
            return [Trajectory(list(sources), self.ferro)]
        return [Trajectory(source, self.ferro) for source in sources]

    def datasets(self) -> dict[str, Dataset]:
        splits = {"train": self.train, "validation": self.validation, "test": self.test or []}
        for split in ("train", "validation"):
            if not splits[split]:
                raise UserError(f"engine.{split} names no trajectory; give at least one directory.")
        return {split: FramePairs(self.trajectories(sources), self.tau) for split, sources in splits.items() if sources}

    def notices(self, train: Dataset, samples_per_window: int) -> list[str]:
        assert isinstance(train, FramePairs)
        targets = len(train.system["target_index"])
        rows, k = samples_per_window * targets, self.state_len
        if rows <= k:
            raise UserError(
                f"{samples_per_window} frames per step x {targets} targets are {rows} rows for {k} states; the "
                "covariances need "
                "more rows than states: raise the batch size or the accumulation."
            )
        notices = []
        if rows < 10 * k * k:
            notices.append(
                f"{rows} rows per step are few for {k} states: scores of small batches are biased upwards; "
                f"{10 * k * k} or more advised."
            )
        if self.norm == "batch":
            notices.append(
                "norm: batch normalises each micro-batch by its own statistics (over all ranks), so results depend on "
                "the "
                "micro-batch; norm: atom does not."
            )
        if self.covariance_scope == "local":
            notices.append(
                "covariance_scope: local scores every micro-batch on its own; results depend on how the batch is split."
            )
        return notices

    def begin_window(
        self, model: torch.nn.Module, batches: list[dict[str, Tensor]], phase: Phase, here: RankContext
    ) -> Window:
        """Every rank must call this. The window's statistics are the sum over ranks and micro-batches. With one
        micro-batch the loss reduces its own, from its one forward pass; with more, a pass without gradients collects
        them first."""
        if self.covariance_scope == "local":
            shares = here.world_size * len(batches)
            return lambda moments: self._slope(moments, phase, 1 / shares)
        reduce = sum_over_ranks if here.world_size > 1 else (lambda moments: moments)
        if len(batches) == 1:
            return lambda moments: self._slope(reduce(moments), phase)
        with torch.no_grad():
            own = torch.stack([score.moments(*self._features(model(batch))) for batch in batches]).sum(0)
        whole = self._slope(reduce(own), phase)
        return lambda moments: whole

    def loss(self, model: torch.nn.Module, batch: dict[str, Tensor], phase: Phase, window: Window) -> Step:
        x, y = self._features(model(batch))
        moments = score.moments(x.detach(), y.detach())
        covariances, slope, metrics = window(moments)
        return Step(
            loss=-score.share(slope, covariances, x, y), metrics=metrics, weight=float(len(x)), statistics=moments
        )

    def pooled(self, statistics: Tensor) -> dict[str, Any]:
        """All scores, singular values, implied timescales (frames, slowest first) and the effective rank, from the
        summed moments of a whole split. t_i = -tau / ln sigma_i, which for reversible dynamics is the relaxation
        time."""
        covariances = score.covariances(statistics)
        values, rank = score.singular_values(covariances, self.inversion)
        sigma = values.clamp(0, 1).tolist()
        return {name: float(f(covariances, self.inversion).score) for name, f in score.SCORES.items()} | {
            "singular_values": sigma,
            "timescales": {"lag": self.tau, "unit": "frames", "values": [self._timescale(s) for s in sigma]},
            "effective_rank": rank,
        }

    def _timescale(self, sigma: float) -> float | None:
        """Frames; None for a function that does not decay (sigma = 1), which is a conserved quantity."""
        return 0.0 if sigma <= 0 else None if sigma >= 1 else -self.tau / math.log(sigma)

    def headline(self, summary: dict[str, Any]) -> list[str]:
        split = "test" if "test" in summary else "validation"
        scores = summary[split]
        slowest = scores["timescales"]["values"][0]
        time = "infinite" if slowest is None else f"{slowest * self.frame_time:.4g} {self.time_unit}"
        lag = f"{self.tau * self.frame_time:g} {self.time_unit}"
        return [
            f"{split} VAMP-2       {scores['vamp2']:.4f} of at most {self.state_len - 1} (without the constant "
            f"function), lag {lag}",
            f"slowest timescale {time}",
        ]

    def predict(self, run: Run, trajectory: Trajectory, batch_frames: int = 512) -> np.ndarray:
        """State probabilities of every frame from lobe_0, (F, n, k) float32."""
        system = {
            "atom_types": torch.from_numpy(trajectory.atom_types),
            "target_index": torch.from_numpy(trajectory.target_index),
        }
        parts = []
        with torch.inference_mode():
            for start in range(0, len(trajectory), batch_frames):
                frames = trajectory.frames(np.arange(start, min(start + batch_frames, len(trajectory))))
                parts.append(run.model.lobe_0(system | frames).numpy())  # type: ignore[operator]
        return np.concatenate(parts)

    def figures(self, scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
        from gdyn.engines.vamp.figures import singular_values

        return {"singular values": singular_values({split: of["singular_values"] for split, of in scores.items()})}

    def evaluate(self, run: Run, sources: list[str]) -> dict[str, Any]:
        from gdyn.engines.vamp.report import evaluate

        return evaluate(run, sources)

    def evaluation_lines(self, result: dict[str, Any]) -> list[str]:
        from gdyn.engines.vamp.outline import evaluation_lines

        return evaluation_lines(result)

    def predictor(self, model: torch.nn.Module) -> Predictor:
        from gdyn.engines.vamp.predictor import predictor

        return predictor(model.lobe_0)  # type: ignore[arg-type]

    report_options: ClassVar[tuple[str, ...]] = ("lags",)

    def report(self, run: Run, **options: Any) -> dict[str, Any]:
        from gdyn.engines.vamp.report import report  # matplotlib is not needed to train

        return report(run, **options)

    def report_lines(self, summary: dict[str, Any]) -> list[str]:
        from gdyn.engines.vamp.outline import report_lines

        return report_lines(summary)

    def _features(self, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Probabilities (B, n, k) to float64 rows (B n, k - 1) without their null direction."""
        basis = score.simplex_basis(self.state_len, outputs[0].device)
        x, y = ((p.double() - 1 / self.state_len).flatten(0, 1) @ basis for p in outputs)
        return x, y

    def _slope(
        self, moments: Tensor, phase: Phase, fraction: float = 1.0
    ) -> tuple[score.Covariances, score.Slope, dict[str, Tensor]]:
        covariances = score.covariances(moments)
        invert = self.inversion
        if phase.objective == "vamp_sym":
            slope = score.vamp_sym(covariances, invert, legacy=self.vamp_sym_gradient == "legacy")
        else:
            slope = score.SCORES[phase.objective](covariances, invert)
        values, rank = score.singular_values(covariances, invert)
        metrics = {
            "loss": -slope.score,
            "vamp1": values.sum(),
            "vamp2": values.square().sum(),
            "effective_rank": torch.tensor(float(rank), dtype=torch.float64),
        }
        return covariances, score.Slope(slope.score, *(fraction * g for g in slope[1:])), metrics
