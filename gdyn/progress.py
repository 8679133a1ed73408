"""What a person sees of an epoch: a bar on a terminal, a table row, or what scripts parse."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from gdyn.phases import Phase

log = logging.getLogger("gdyn")


class ConsoleHandler(logging.Handler):
    """Log lines that leave a progress bar intact."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@dataclass(frozen=True)
class EpochReport:
    """One finished epoch."""

    epoch: int
    """Completed epochs over the whole run."""
    epochs: int
    epoch_of_phase: int
    """From 1."""
    phase: Phase
    train: dict[str, float]
    """Means over the epoch's windows."""
    train_last: dict[str, float]
    validation: dict[str, Any]
    """Scores of the whole set; `batch_*` are means over its batches."""
    validation_last: dict[str, float]
    learning_rate: float
    samples_per_second: float
    seconds: float
    improved: bool
    early: bool = False
    """Whether the phase ends here because its patience is over."""
    checkpoint: str = ""
    """Tag of the checkpoint written after this epoch, if any."""
    shown: list[str] = field(default_factory=list)
    """The objective and other scores worth a column."""


def bar(windows: Iterator[Any], total: int, done: int, label: str, style: str) -> tqdm:
    """A progress bar over one epoch's windows; auto: none where standard error is no terminal."""
    hidden = {"auto": None, "on": False, "off": True}[style]
    return tqdm(
        windows, total=total, initial=done, desc=label, unit="step", leave=False, disable=hidden, dynamic_ncols=True
    )


class Console:
    """How phases and epochs are printed, in each style."""

    def __init__(self, style: Literal["table", "gdynet", "lines"], checkpoints: Path):
        self.style, self.checkpoints = style, checkpoints
        self.header = ""

    def phase(self, index: int, phase: Phase) -> None:
        if self.style == "gdynet":
            log.info("%s", gdynet_header(index, phase))

    def epoch(self, report: EpochReport) -> None:
        if self.style == "lines":
            for line in plain_lines(report):
                log.info("%s", line)
            return
        if self.style == "gdynet":
            log.info("%s", gdynet_block(report))
            if report.checkpoint:
                log.info("Saved checkpoint: %s", self.checkpoints / report.checkpoint)
        else:
            header = table_header(report)
            if header != self.header:  # another objective has another column
                log.info("%s", header)
                self.header = header
            log.info("%s", table_row(report))
        if report.early:
            log.info("%s", early_stopping(report))


def early_stopping(report: EpochReport) -> str:
    phase = report.phase
    return (
        f"early stopping of phase {phase.label} at epoch {report.epoch_of_phase}: no better {phase.objective} for "
        f"{phase.patience} epochs."
    )


def plain_lines(report: EpochReport) -> list[str]:
    """One line per epoch, numbered within its phase from 1, with the losses of training and validation, which is called
    Test because the scripts that parse such lines know it by that name; the test set is scored at the end of a run."""
    train, validation = (split.get("loss", math.nan) for split in (report.train, report.validation))
    lines = [f"Epoch {report.epoch_of_phase}: Train Loss = {train:.4f}, Test Loss = {validation:.4f}"]
    if report.improved:
        lines.append(f"Saved best {report.phase.objective} weights: {report.checkpoint}")
    if report.early:
        lines.append(f"Early stopping at epoch {report.epoch_of_phase}")
    return lines


def table_header(report: EpochReport) -> str:
    scores = "".join(f"{'val ' + name:>{_width(name)}}" for name in report.shown)
    return f"{'epoch':>9}  {'phase':<10}{'train loss':>12}{scores}{'lr':>10}{'samples/s':>11}{'s':>7}"


def table_row(report: EpochReport) -> str:
    scores = "".join(f"{report.validation.get(name, float('nan')):>{_width(name)}.4f}" for name in report.shown)
    numbers = f"{report.learning_rate:>10.2g}{report.samples_per_second:>11.0f}{report.seconds:>7.1f}"
    star = "  *" if report.improved else ""
    loss = report.train.get("loss", float("nan"))
    return f"{report.epoch:>4}/{report.epochs:<4}  {report.phase.label:<10}{loss:>12.4f}{scores}{numbers}{star}"


def _width(name: str) -> int:
    """Of a score's column."""
    return max(14, len(name) + 6)


def gdynet_header(index: int, phase: Phase) -> str:
    return f"{'=' * 50}\nPhase {index}: Training with loss type: {phase.objective}\n{'=' * 50}"


def gdynet_block(report: EpochReport) -> str:
    """The original trainer's lines, which scripts parse. "Avg" of validation is over batches there, so it is here."""
    val_avg = {name: report.validation.get(f"batch_{name}", report.validation.get(name, 0.0)) for name in report.train}

    def pair(name: str, last: dict[str, float], average: dict[str, float]) -> str:
        return f"(Last: {last.get(name, 0.0):.6f}, Avg: {average.get(name, 0.0):.6f})"

    def lines(split: str, last: dict[str, float], average: dict[str, float]) -> str:
        return (
            f"{split} Loss - Last: {last.get('loss', 0.0):.6f}, Avg: {average.get('loss', 0.0):.6f}\n"
            f"{split} Metrics - VAMP1 {pair('vamp1', last, average)}, VAMP2 {pair('vamp2', last, average)}"
        )

    return "\n".join(
        [
            f"\nWorld Rank : 0 || Train Epoch: {report.epoch}, Loss Type: {report.phase.objective}",
            lines("Train", report.train_last, report.train),
            lines("Val", report.validation_last, val_avg),
            f"--- {report.seconds:.2f} seconds ---",
        ]
    )
