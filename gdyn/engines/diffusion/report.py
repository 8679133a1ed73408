"""What `gdyn analyze` shows of a diffusion run: how well atoms come back from their latents, and how much of the noise
the denoiser finds, early and late."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from matplotlib.figure import Figure

from gdyn import report as page
from gdyn.engines.diffusion.network import LatentDiffusion, normal_like
from gdyn.errors import UserError
from gdyn.nn.egnn import mean_position
from gdyn.rundir import write_json, write_text

if TYPE_CHECKING:
    from gdyn.engine import Dataset
    from gdyn.engines.diffusion.engine import Diffusion
    from gdyn.inference import Run

TIMES = 21
"""At which noise is looked for, from 0 to T."""
COMPLEXES = 64
"""Of the split, at most, for this."""
BATCH = 16
CAPTIONS = {
    "noise": "Share of the noise's variance that the denoiser finds, by time: 0 is clean, T nothing but noise. The "
    "averaged weights, with the pocket. Near T the noise is what is seen; near 0 it must be told from a molecule's "
    "shape.",
    "training": "Loss per phase, of the averaged weights in validation.",
}


def report(run: Run, split: str = "test") -> dict[str, Any]:
    """Write `analysis/` of the run folder. Returns what analysis_summary.json holds.

    Raises: UserError if the split has no data.
    """
    engine, model = cast("Diffusion", run.engine), cast(LatentDiffusion, run.model)
    splits = engine.datasets()
    if split not in splits:
        raise UserError(f"the run has no {split} split; it has {', '.join(splits)}.")
    scores = engine.scores(run, splits[split])
    drawn = {"training": page.training_figure(run.dir.metrics_jsonl)}
    if scores["denoiser_loss"] is not None:
        drawn["noise"] = noise_figure(*found_noise(model, splits[split]), model.schedule.timesteps)
    run.dir.analysis.mkdir(parents=True, exist_ok=True)
    pictures = {
        name: page.save_png(figure, run.dir.analysis / f"{name}.png")
        for name, figure in drawn.items()
        if figure is not None
    }
    summary = {
        "run": run.dir.path.name,
        "checkpoint": run.tag,
        "split": split,
        **scores,
        "files": {"report": str(run.dir.report_html), "figures": [str(path) for path in pictures.values()]},
    }
    write_text(run.dir.report_html, render(summary, scores, pictures, page.how_made(run)))
    write_json(run.dir.analysis / "analysis_summary.json", summary)
    return summary


@torch.no_grad()
def found_noise(model: LatentDiffusion, data: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(times (TIMES,), and of coordinates and features 1 - |noise - found|^2 / |noise|^2, summed over complexes)."""
    times = np.linspace(0, model.schedule.timesteps, TIMES).round().astype(int)
    totals = torch.zeros(2, 2, TIMES, dtype=torch.float64)
    for start in range(0, min(COMPLEXES, len(data)), BATCH):
        batch = data[np.arange(start, min(start + BATCH, COMPLEXES, len(data)))]
        mask, keep_b = batch["ligand_mask"], torch.ones(len(batch["keys"]), dtype=torch.bool)
        z_x, z_h, pocket_x, pocket_h = model.encode(batch)
        pocket = pocket_x, pocket_h, batch["pocket_mask"]
        for i, t in enumerate(times.tolist()):
            t_b = torch.full_like(batch["keys"], t)
            noise = normal_like(z_x, z_h, mask, batch["keys"], t, 0)
            noisy = model.add_noise(t_b, z_x, z_h, *noise, mean_position(z_x, mask), mask)
            found = model.predict_noise(t_b, *noisy, mask, *pocket, keep_b, averaged=True)
            for part in range(2):
                totals[0, part, i] += (noise[part] - found[part]).square().sum()
                totals[1, part, i] += noise[part].square().sum()
    x, h = (1 - totals[0] / totals[1]).numpy()
    return times, x, h


@page.styled
def noise_figure(times: np.ndarray, x: np.ndarray, h: np.ndarray, timesteps: int) -> Figure:
    figure = Figure(figsize=(9, 3.4))
    axes = figure.add_subplot()
    for i, (name, found) in enumerate((("coordinates", x), ("features", h))):
        axes.plot(times, found, marker="o", markersize=3.5, color=page.colour(i), label=name)
    axes.axhline(0, color=page.PALE, linewidth=1)
    axes.set(xlabel=f"time, 0 to {timesteps}", ylabel="share of the noise found", ylim=(min(-0.05, x.min()), 1.02))
    axes.legend()
    return figure


def render(
    summary: Mapping[str, Any], scores: Mapping[str, Any], pictures: Mapping[str, Path], facts: Mapping[str, Any]
) -> str:
    def show(name: str) -> str:
        return page.picture(pictures[name], CAPTIONS[name]) if name in pictures else ""

    def value(name: str, unit: str = "") -> str:
        return "—" if scores[name] is None else f"{page.number(scores[name])}{unit}"

    accuracies = [name for name in scores if name.endswith("_accuracy")]
    return page.page(
        summary["run"],
        f"Latent diffusion on the {summary['split']} split: {scores['complexes']:,} complexes; checkpoint "
        f"{summary['checkpoint']}",
        page.tiles(
            [
                ("Ligand", value("ligand_rmsd", " Å"), "RMSD of its atoms after encoding and decoding"),
                ("Pocket", value("protein_rmsd", " Å"), "the same"),
                ("Ligand elements right", value("ligand_element_accuracy"), "share of atoms"),
                ("Denoiser loss", value("denoiser_loss"), f"{value('predict_zero_loss')} where no noise is found"),
            ]
        ),
        page.section(
            "What comes back from the latents",
            page.table(
                ["property", "share of atoms right"],
                [(name.removesuffix("_accuracy").replace("_", " "), value(name)) for name in accuracies],
            ),
        ),
        page.section("What the denoiser finds", show("noise")) if "noise" in pictures else "",
        page.section("Training", show("training")),
        page.section("How the run was made", page.table(["", ""], facts.items(), kind="facts")),
    )
