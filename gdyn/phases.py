"""Phase, Plan, Position: what a run trains, in which order, and what is next. Pure arithmetic, standard library only.

A `Position` names the *next* piece of work, so "epoch 45" never has to be interpreted: `Position(phase=1, epoch=15)`
means that epoch 15 of phase 1 is about to run. Extending a schedule, resuming in the middle of a phase or of an epoch
and resuming on another number of ranks are all the one question "what is next?", answered here.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gdyn.errors import UserError


@dataclass(frozen=True)
class Phase:
    """A stretch of training."""

    objective: str
    """A word the engine understands: what is optimized, e.g. vamp2."""

    epochs: int
    """How many passes over the training set."""

    name: str = ""
    """Used in tags and logs; the objective where empty."""

    trains: tuple[str, ...] = ("*",)
    """Globs over parameter names: what this phase trains; "*": all that the objective trains. Everything else is
    frozen."""

    @property
    def label(self) -> str:
        return self.name or self.objective

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Phase:
        """From its JSON; what was written before a field existed has the field's default."""
        return cls(**{**record, "trains": tuple(record.get("trains", cls.trains))})


@dataclass(frozen=True, order=True)
class Position:
    """The next piece of work."""

    phase: int = 0
    epoch: int = 0
    """Within the phase."""
    sample: int = 0
    """How many samples of this epoch's order have been trained, over all ranks. Samples rather than windows, so that a
    resume on another number of ranks continues at the same place."""
    step: int = 0
    """Optimizer steps so far, over all phases."""


@dataclass(frozen=True)
class Plan:
    """The phases of a run, in order."""

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        if not self.phases:
            raise UserError("the run has no phases; give `phases:` or `loss_schedule:` with `epochs:`.")
        for i, phase in enumerate(self.phases):
            if phase.epochs < 1:
                raise UserError(f"phases[{i}].epochs = {phase.epochs}; a phase needs at least one epoch.")
            if not phase.trains:
                raise UserError(f'phases[{i}].trains is empty; give globs over parameter names, or leave it out ("*").')

    def done(self, position: Position) -> bool:
        return position.phase >= len(self.phases)

    def phase(self, position: Position) -> Phase:
        return self.phases[position.phase]

    @property
    def epochs(self) -> int:
        """Over all phases."""
        return sum(phase.epochs for phase in self.phases)

    def global_epoch(self, position: Position) -> int:
        """Completed epochs over the whole run: phase 1, epoch 15 of 30-epoch phases is 45."""
        return sum(phase.epochs for phase in self.phases[: position.phase]) + position.epoch

    def after_window(self, position: Position, samples: int) -> Position:
        return replace(position, sample=position.sample + samples, step=position.step + 1)

    def after_epoch(self, position: Position) -> Position:
        if position.epoch + 1 < self.phase(position).epochs:
            return replace(position, epoch=position.epoch + 1, sample=0)
        return replace(position, phase=position.phase + 1, epoch=0, sample=0)

    def tag(self, position: Position) -> str:
        """The name of the checkpoint from which `position` is next: `p1-vamp1-e0015`, in mid-epoch
        `p1-vamp1-e0015-s00000123` (the optimizer step), after the last phase `p3-done`."""
        if self.done(position):
            return f"p{position.phase}-done-e0000"
        tag = f"p{position.phase}-{self.phase(position).label}-e{position.epoch:04d}"
        return tag if position.sample == 0 else f"{tag}-s{position.step:08d}"

    def check_past(self, before: Sequence[dict[str, Any]], position: Position, allow_change: bool = False) -> str:
        """Compare with the phases a checkpoint was trained under. Appended phases, and changes to phases not yet begun,
        are welcome. Returns a sentence for the log (empty: nothing changed).

        Raises: UserError if a phase that is finished or under way has changed, unless `allow_change`.
        """
        now, then = self.phases, [Phase.of(record) for record in before]
        begun = position.phase + (1 if position.epoch or position.sample else 0)
        changed = [i for i in range(begun) if i >= len(now) or now[i] != then[i]]
        if changed and not allow_change:
            i = changed[0]
            found = _plain(now[i]) if i < len(now) else "nothing"
            raise UserError(
                f"loss schedule mismatch: the checkpoint was trained with phase {i} = {_plain(then[i])}, the run file "
                "now says "
                f"{found}. Append phases to extend a run; restore the old phases, or pass --allow_schedule_change true."
            )
        if changed:
            return (
                f"the schedule of past phases {changed} differs from the checkpoint's; continuing with the run file's."
            )
        if len(now) > len(before):
            return f"the schedule was extended from {len(before)} to {len(now)} phases."
        return ""


def _plain(phase: Phase) -> dict[str, Any]:
    """As a run file would say it."""
    return asdict(phase) | {"trains": list(phase.trains)}


def covered(glob: str, globs: Iterable[str]) -> bool:
    """Whether one of `globs` matches every name that `glob` does: its star must meet a star."""
    return any(fnmatch.fnmatchcase(glob, other) for other in globs)
