"""Clock: frames to physical time, and to the words for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gdyn.report import number


@dataclass(frozen=True)
class Clock:
    """Spacing of the stored frames and its unit. All arguments below are in frames."""

    frame_time: float = 1.0
    unit: str = "frames"

    def number(self, frames: float) -> str:
        return number(frames * self.frame_time)

    def say(self, frames: float) -> str:
        """113 ps"""
        return f"{self.number(frames)} {self.unit}"

    def between(self, lower: float, upper: float) -> str:
        """A confidence band in words: 101–126; a bound of 0 or infinity is none."""
        if not math.isfinite(upper):
            return f"above {self.number(lower)}" if 0 < lower < math.inf else "no bounds"
        return f"{self.number(lower)}–{self.number(upper)}" if lower > 0 else f"below {self.number(upper)}"
