"""What a rule reports, and the sources that several rules share. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from gdyn.lint.request import Job

SLURM_SEEN = "seen on Slurm 22.05.8, 2026-11"
SBATCH = "sbatch manual, Slurm 22.05"
BASH = "bash manual"
OLCF = "OLCF Frontier User Guide, 2026-07"
OLCF_TORCH = "OLCF, PyTorch on Frontier, 2026-07"
PRACTICE = "seen in public job scripts, 2026-08"


@dataclass(frozen=True)
class Finding:
    """Something wrong with a script."""

    line: int
    severity: Literal["error", "warning"]
    """An error breaks the job or makes a setting void; a warning costs time, logs or certainty."""
    rule: str
    what: str
    cure: str
    source: str
    """Document and date."""


Rule = Callable[["Job"], Iterator[Finding]]
"""Speaks where it is sure of what the script says, and keeps silent where a value is not static."""


def error(line: int, rule: str, what: str, cure: str, source: str) -> Finding:
    return Finding(line, "error", rule, what, cure, source)


def warning(line: int, rule: str, what: str, cure: str, source: str) -> Finding:
    return Finding(line, "warning", rule, what, cure, source)
