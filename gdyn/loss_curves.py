"""Loss curves of a run: one picture a phase, of what metrics.jsonl holds of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from gdyn.phases import Phase, Plan, Position, improves
from gdyn.rundir import RunDir, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = list[tuple[int, float]]
"""(epoch of the phase, from 1; loss)."""

DECADES = 1.0
"""Positive losses that span more powers of ten are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Curves:
    """Losses of one phase."""

    name: str
    """The phase's label; of a phase whose label an earlier one has, `p2-label`, as in tags."""
    train: Points
    """Means over the train lines of each epoch that has some."""
    validation: Points
    best: int | None
    """Epoch of the best validation score of the objective."""

    @property
    def logarithmic(self) -> bool:
        losses = [loss for _, loss in (*self.train, *self.validation)]
        return min(losses) > 0 and math.log10(max(losses) / min(losses)) > DECADES


def write(run_dir: RunDir, plan: Plan, higher_is_better: Callable[[str], bool]) -> None:
    """Draw every phase that has a finished epoch into the run folder. Rank 0 calls this. `higher_is_better`: of an
    objective's score."""
    from gdyn.report import save_png  # matplotlib is slow to import, and other ranks need none

    for curves in collect(read_metrics(run_dir.metrics_jsonl), plan, higher_is_better):
        run_dir.losses.mkdir(exist_ok=True)
        save_png(draw(curves), run_dir.losses / f"{curves.name}.png")


def collect(records: Iterable[Mapping[str, Any]], plan: Plan, higher_is_better: Callable[[str], bool]) -> list[Curves]:
    """The curves of each phase with a validation loss, from the lines of metrics.jsonl, whose epochs are the plan's."""
    rows, found = list(records), []
    for i, phase in enumerate(plan.phases):
        first = plan.global_epoch(Position(i))
        own = [{**row, "epoch": row["epoch"] - first + 1} for row in rows if 0 <= row["epoch"] - first < phase.epochs]
        train, validation = (
            [row for row in own if row["split"] == split and math.isfinite(row.get("loss", math.nan))]
            for split in ("train", "validation")
        )
        if validation:
            taken = phase.label in {other.label for other in plan.phases[:i]}
            name = f"p{i}-{phase.label}" if taken else phase.label
            best = _best(validation, phase, higher_is_better(phase.objective))
            found.append(Curves(name, _means(train), _means(validation), best))
    return found


def _means(rows: Iterable[Mapping[str, Any]]) -> Points:
    losses = {epoch: [row["loss"] for row in part] for epoch, part in groupby(rows, key=lambda row: row["epoch"])}
    return [(epoch, sum(values) / len(values)) for epoch, values in losses.items()]


def _best(rows: Iterable[Mapping[str, Any]], phase: Phase, higher: bool) -> int | None:
    epoch, best = None, None
    for row in rows:
        score = row.get(phase.objective, math.nan)
        if improves(score, best, higher):
            epoch, best = row["epoch"], score
    return epoch


def draw(curves: Curves) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from gdyn.report import INK, PALETTE, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.6))
        axes = figure.add_subplot()
        for label, points, tint in (("train", curves.train, PALETTE[5]), ("validation", curves.validation, PALETTE[0])):
            if points:
                axes.plot(*zip(*points, strict=True), color=tint, marker="o", markersize=3.5, label=label)
        losses = dict(curves.validation)
        if curves.best is not None:
            loss = losses[curves.best]
            label = f"best: epoch {curves.best}, {loss:.4g}"
            axes.plot(curves.best, loss, "o", markersize=10, markerfacecolor="none", color=INK, label=label)
        scale = "log" if curves.logarithmic else "linear"
        axes.set(title=f"phase {curves.name}", xlabel="epoch", ylabel="loss", yscale=scale)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    return figure
