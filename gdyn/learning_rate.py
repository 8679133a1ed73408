"""How learning rates change over a run: LearningRateSchedule (what a run file says) and LearningRates (where they
are). Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from gdyn.errors import UserError

Shape = Literal["plateau", "cosine", "linear", "cosine_restarts", "polynomial", "none"]


@dataclass(frozen=True)
class LearningRateSchedule:
    """A warm-up, then a decay over the rest of the run. Steps are optimizer steps of all phases, or with `each_phase`
    of the present one. All parameter groups are multiplied by the same number, so their rates keep their ratios."""

    shape: Shape = "none"
    """What follows the warm-up. none: constant; linear, cosine: to the floor at the end of the run; polynomial: linear
    to a power; cosine_restarts: several cosines; plateau: less when the validation score of the phase's objective stops
    improving."""

    warmup_steps: int = 0
    """Steps of linear rise from 0, where the first step has learning rate 0."""

    warmup_ratio: float = 0.0
    """The same as a fraction of all steps; where above 0 it overrides warmup_steps."""

    min_lr: float = 0.0
    """The floor, as a learning rate of the first parameter group; other groups' floors are in proportion."""

    cycles: int = 3
    """How many cosines cosine_restarts has."""

    power: float = 1.0
    """Of polynomial."""

    factor: float = 0.1
    """What plateau multiplies by."""

    patience: int = 2
    """Epochs without a new best validation score that plateau lets pass; it acts on the next."""

    each_phase: bool = False
    """Begin anew with every phase, for phases that train different parts."""

    def __post_init__(self) -> None:
        rules = {
            "warmup_steps": (self.warmup_steps >= 0, "0 or more"),
            "warmup_ratio": (0 <= self.warmup_ratio <= 1, "0 to 1"),
            "min_lr": (0 <= self.min_lr < math.inf, "0 or more"),
            "cycles": (self.cycles >= 1, "1 or more"),
            "power": (0 < self.power < math.inf, "above 0"),
            "factor": (0 < self.factor < 1, "between 0 and 1"),
            "patience": (self.patience >= 0, "0 or more"),
        }
        for name, (kept, expected) in rules.items():
            if not kept:
                raise UserError(f"optimization.lr_schedule.{name} is {getattr(self, name)}; expected {expected}.")

    def at(self, step: int, total_steps: int, drops: int = 0, floor: float = 0.0) -> float:
        """What learning rates are multiplied by in the optimizer step after `step` finished ones.

        `drops`: how often plateau has acted. `floor`: the smallest value after the warm-up. Warm-up and shapes as in
        Hugging Face transformers (get_cosine_with_hard_restarts_schedule_with_warmup and its siblings); the floor as in
        torch.optim.lr_scheduler, CosineAnnealingLR and ReduceLROnPlateau.
        """
        ratio = self.warmup_ratio
        warmup = math.ceil(ratio * total_steps) if ratio else self.warmup_steps
        if step < warmup:
            return step / warmup
        if self.shape == "plateau":
            return max(self.factor**drops, floor)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return floor + (1 - floor) * self._left(progress)

    def _left(self, progress: float) -> float:
        """1 at the end of the warm-up; 0 at the end of the run, but for none."""
        if self.shape == "none":
            return 1.0
        if self.shape in ("linear", "polynomial"):
            return (1 - progress) ** (self.power if self.shape == "polynomial" else 1)
        cycles = self.cycles if self.shape == "cosine_restarts" else 1
        return 0.0 if progress == 1 else (1 + math.cos(math.pi * (cycles * progress % 1))) / 2


class LearningRates:
    """The learning rates of a run, which outlive its optimizers: what DeepSpeed takes for its `lr_scheduler`, and
    advances once per optimizer step that was applied."""

    def __init__(self, schedule: LearningRateSchedule, total_steps: int):
        self.schedule, self.total_steps = schedule, total_steps
        self.optimizer: Any = None
        self.base: list[float] = []
        """Learning rate of each parameter group, before it is multiplied."""
        self.steps, self.drops, self.waiting = 0, 0, 0
        self.phase, self.start = 0, 0
        """With `each_phase`: the phase, and the steps before it."""
        self.objective, self.best = "", math.nan

    def attach(self, optimizer: Any) -> LearningRates:
        """From now on schedule this optimizer, whose rates are taken for the unscheduled ones; returns itself."""
        self.optimizer, self.base = optimizer, [float(group["lr"]) for group in optimizer.param_groups]
        self.apply()
        return self

    def apply(self) -> None:
        """Set the rates, whatever they are: loading a checkpoint brings those it was written with."""
        for group, rate in zip(self.optimizer.param_groups, self.get_last_lr(), strict=True):
            group["lr"] = rate

    def get_last_lr(self) -> list[float]:
        """Of each parameter group, for the optimizer step that comes next."""
        floor = min(1.0, self.schedule.min_lr / self.base[0]) if self.base[0] else 0.0
        multiplier = self.schedule.at(self.steps - self.start, self.total_steps, self.drops, floor)
        return [rate * multiplier for rate in self.base]

    def begin_phase(self, phase: int, total_steps: int) -> None:
        """What `each_phase` reacts to: a phase begins or is resumed. total_steps: its own."""
        if not self.schedule.each_phase:
            return
        self.total_steps = total_steps
        if phase != self.phase:
            self.phase, self.start, self.drops = phase, self.steps, 0
        if self.optimizer is not None:
            self.apply()

    def step(self) -> None:
        self.steps += 1
        self.apply()

    def end_epoch(self, objective: str, score: float, higher_is_better: bool) -> None:
        """What plateau reacts to. `score` must be the same on all ranks. Another objective starts anew, with the rate
        that was reached: scores of different objectives cannot be compared."""
        if self.schedule.shape != "plateau":
            return
        if objective != self.objective:
            self.objective, self.best, self.waiting = objective, math.nan, 0
        improved = score > self.best if higher_is_better else score < self.best
        if improved or (math.isnan(self.best) and math.isfinite(score)):
            self.best, self.waiting = score, 0
            return
        self.waiting += 1
        if self.waiting > self.schedule.patience:
            self.drops, self.waiting = self.drops + 1, 0
            self.apply()

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs and the run file does not say."""
        best = None if math.isnan(self.best) else self.best
        return {"steps": self.steps, "drops": self.drops, "waiting": self.waiting} | {
            "objective": self.objective,
            "best": best,
            "phase": self.phase,
            "start": self.start,
        }

    def load_state_dict(self, state: Any) -> None:
        """A `state_dict`. Anything else is passed over: DeepSpeed brings what a checkpoint holds, which may be
        another scheduler's state, or None."""
        ours = self.state_dict().keys()
        # Older ones know no phase.
        if isinstance(state, dict) and ours - {"phase", "start"} <= state.keys() <= ours:
            best = math.nan if state["best"] is None else state["best"]
            self.__dict__.update(state, best=best)
