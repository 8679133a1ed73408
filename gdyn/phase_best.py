"""PhaseBest: how good a phase has been since it began, and so whether it ends early and what the next begins from."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gdyn.checkpoints import CheckpointStore
from gdyn.errors import UserError
from gdyn.phases import Plan, Position, improves

log = logging.getLogger("gdyn")


@dataclass(frozen=True)
class Best:
    """The best validation score of a phase's objective, whatever earlier phases with that objective reached."""

    score: float
    epoch: int
    """Of the phase, from 1."""
    tag: str
    """Of the checkpoint after it; empty where the phase does not restore it."""


class PhaseBest:
    """The `Best` of the phase under way, and between phases of the one that has ended. Every rank has the same."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.best: Best | None = None

    def state_dict(self) -> dict[str, Any] | None:
        return asdict(self.best) if self.best else None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self.best = Best(**state) if state else None

    def follow(self, position: Position, score: float, higher_is_better: bool) -> tuple[Position, bool]:
        """(what is next after this epoch with this score, whether its checkpoint is one to restore)."""
        best = self.best if position.epoch else None
        phase, done = self.plan.phase(position), position.epoch + 1
        ahead = improves(score, best.score if best else None, higher_is_better)
        following = self.plan.after_epoch(position, 0 if ahead else done - (best.epoch if best else 0))
        if ahead:
            best = Best(score, done, self.plan.tag(following) if phase.restore_best else "")
        self.best = best
        return following, ahead and phase.restore_best

    def restored(self, position: Position, store: CheckpointStore) -> dict[str, torch.Tensor] | None:
        """The best weights of the phase before, if that restores them and `position` is next after it. Every rank must
        call this.

        Raises: MissingFile, UserError if their checkpoint is gone or damaged.
        """
        if position.phase == 0 or position.epoch or position.sample:
            return None
        phase, best = self.plan.phases[position.phase - 1], self.best
        if not phase.restore_best:
            return None
        if best is None or not best.tag:
            log.warning("phase %s has no best %s to restore; its last weights stay.", phase.label, phase.objective)
            return None
        checkpoint = store.read(store.path / best.tag)
        damage = store.damage(checkpoint)
        if damage:
            raise UserError(
                f"{checkpoint.path}, the best of phase {phase.label}, is damaged: {damage}; resume from a tag before "
                "the end of that phase."
            )
        log.info(
            "restoring the best weights of phase %s: epoch %d, %s %.6g.",
            phase.label,
            best.epoch,
            phase.objective,
            best.score,
        )
        return checkpoint.weights()
