"""What a run measures and where it is written: Meter (device-side means), Journal (metrics.jsonl, TensorBoard,
wandb)."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gdyn.collectives import sum_over_ranks
from gdyn.rundir import RunDir, read_metrics, write_text

if TYPE_CHECKING:
    from gdyn.engine import Step

log = logging.getLogger("gdyn")


class Meter:
    """Weighted means of step metrics, summed on the device and reduced over ranks once, in float64."""

    def __init__(self, device: torch.device):
        self.device = device
        self.names: list[str] = []
        self.sums: torch.Tensor | None = None
        self.statistics: torch.Tensor | None = None
        self._last: torch.Tensor | None = None

    def add(self, step: Step, weight: float | None = None) -> None:
        """Count a step, by default with its own weight."""
        weight = step.weight if weight is None else weight
        values = [torch.as_tensor(value, dtype=torch.float64) for value in step.metrics.values()]
        one = torch.ones((), dtype=torch.float64, device=values[0].device if values else self.device)
        row = torch.stack([*values, one])
        # A metric that is not finite must not survive a zero weight.
        self._add(list(step.metrics), row * weight if weight else torch.zeros_like(row), step.statistics, bool(weight))
        if weight:
            self._last = row

    def absorb(self, other: Meter) -> None:
        """Count all that another meter has counted."""
        if other.sums is not None:
            self._add(other.names, other.sums, other.statistics, True)
            self._last = other._last

    def _add(self, names: list[str], row: torch.Tensor, statistics: torch.Tensor | None, counts: bool) -> None:
        self.names = names
        self.sums = row if self.sums is None else self.sums + row
        if statistics is not None:
            statistics = statistics if counts else torch.zeros_like(statistics)
            self.statistics = statistics if self.statistics is None else self.statistics + statistics

    def sums_by_name(self) -> dict[str, float]:
        """This rank's weighted sums, and the sum of weights under an empty name: what `add_sums` takes."""
        return {} if self.sums is None else dict(zip([*self.names, ""], self.sums.tolist(), strict=True))

    def add_sums(self, sums: dict[str, float], counts: bool) -> None:
        """Count what a meter's `sums_by_name` says, or zeros of the same names if it does not count on this rank."""
        if sums:
            row = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.device)
            self._add([name for name in sums if name], row if counts else torch.zeros_like(row), None, counts)

    @property
    def last(self) -> dict[str, float]:
        """The metrics of this rank's last step."""
        return {} if self._last is None else dict(zip(self.names, self._last.tolist(), strict=False))

    def means(self) -> dict[str, float]:
        """Over all ranks. Every rank must call this; all or none must have added a step."""
        if self.sums is None:
            return {}
        *totals, weight = sum_over_ranks(self.sums.to(self.device)).tolist()
        return {name: total / weight if weight else math.nan for name, total in zip(self.names, totals, strict=True)}

    def total_statistics(self) -> torch.Tensor | None:
        """Over all ranks. Every rank must call this."""
        return None if self.statistics is None else sum_over_ranks(self.statistics.to(self.device))


class Journal:
    """Rank 0's record of a run. On other ranks every method does nothing.

    A resume removes what was written beyond the checkpoint, so that no step is recorded twice.
    """

    def __init__(self, run_dir: RunDir, active: bool, step: int, hyper_parameters: dict[str, Any], wandb: Any = None):
        self.active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter  # a second of imports that other ranks are spared

        _cut_after(run_dir.metrics_jsonl, step)
        self.file = run_dir.metrics_jsonl.open("a")
        self.board = SummaryWriter(str(run_dir.tensorboard), purge_step=step + 1)
        self.board.add_text("hyper-parameters", _table(hyper_parameters), step)
        self.wandb = _start_wandb(wandb, run_dir, hyper_parameters)

    def write(self, values: dict[str, Any], *, step: int, phase: str, epoch: int, split: str) -> None:
        """One line of metrics.jsonl and one TensorBoard point per number, under `split/name`; train curves also per
        phase."""
        if not self.active:
            return
        record = {"step": step, "phase": phase, "epoch": epoch, "split": split, **values}
        self.file.write(json.dumps(record, default=float) + "\n")
        self.file.flush()
        scalars = {
            name: value for name, value in values.items() if isinstance(value, (int, float)) and math.isfinite(value)
        }
        for name, value in scalars.items():
            self.board.add_scalar(f"{split}/{name}", value, step)
            if name == "loss":
                # The scales of objectives differ; one curve each.
                self.board.add_scalar(f"{split}-{phase}/loss", value, step)
        if self.wandb is not None:
            self.wandb.log({f"{split}/{name}": value for name, value in scalars.items()}, step=step)

    def figure(self, name: str, figure: Any, step: int) -> None:
        if self.active:
            self.board.add_figure(name, figure, step)

    def close(self) -> None:
        """Everything on disk, as a checkpoint's history must be before the checkpoint counts."""
        if self.active:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.board.close()
            if self.wandb is not None:
                self.wandb.finish()


def _cut_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [record for record in read_metrics(path) if record["step"] <= step and record["split"] != "test"]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def _table(values: dict[str, Any]) -> str:
    return "\n".join(["| name | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in values.items())])


def _start_wandb(options: Any, run_dir: RunDir, hyper_parameters: dict[str, Any]) -> Any:
    if options is None or not options.enabled:
        return None
    try:
        import wandb
    except ImportError:
        log.warning(
            'wandb.enabled is true but wandb is not installed (pip install "gdyn[wandb]"); continuing without it.'
        )
        return None
    return wandb.init(
        project=options.project,
        entity=options.entity,
        name=options.run_name,
        dir=str(run_dir.path),
        config=hyper_parameters,
        id=run_dir.path.name,
        resume="allow",
    )
