"""Schedule: a number that changes with the optimizer step: loss weights, the commitment cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, PositiveInt

from gdyn.errors import UserError

Shape = Literal["linear", "cosine", "cosine_with_restarts"]


@dataclass(frozen=True)
class Schedule:
    """From `start` to `end` within `steps` optimizer steps, and `end` from then on."""

    start: NonNegativeFloat
    end: NonNegativeFloat
    steps: PositiveInt
    """Optimizer steps until `end`."""
    shape: Shape = "cosine"
    """linear; cosine: half a period, flat at both ends; cosine_with_restarts: five such ramps in a row, each back from
    `start`."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"a schedule has steps = {self.steps}; it needs at least one step.")
        if not (0 <= self.start < math.inf and 0 <= self.end < math.inf):
            raise UserError(f"a schedule goes from {self.start} to {self.end}; expected finite numbers, 0 or more.")

    def at(self, step: int) -> float:
        """The value for the optimizer step after `step` finished ones."""
        if step >= self.steps:
            return self.end
        return self.start + (self.end - self.start) * self._progress(step)

    def _progress(self, step: int) -> float:
        """0 at the start, 1 at the end."""
        t = step / self.steps
        if self.shape == "linear":
            return t
        if self.shape == "cosine_with_restarts":
            period = max(1, self.steps // 5)  # foldtree2
            t = step % period / period
        return (1 - math.cos(math.pi * t)) / 2


def value(scheduled: Schedule | float, step: int) -> float:
    """A number that may be a schedule, after `step` finished optimizer steps."""
    return scheduled.at(step) if isinstance(scheduled, Schedule) else scheduled


def final(scheduled: Schedule | float) -> float:
    """What it comes to."""
    return scheduled.end if isinstance(scheduled, Schedule) else scheduled
