"""Toy with losses and gradients that are not finite on order."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gdyn.engine import Dataset, Step
from gdyn.phases import Phase
from tests.toy import Rows, Toy

TROUBLES = ("", "nan", "inf", "hidden", "backward")
"""What may be wrong with a batch: nothing; a row of it is NaN; the loss is infinite; it is NaN, with a gradient that is
finite; it is finite, with a gradient of NaN."""


class SpoiltRows(Rows):
    """Rows with names, some of them NaN."""

    def __init__(self, count: int, spoilt: list[int]):
        super().__init__(count, 0)
        self.identifiers = [f"row{i}" for i in range(count)]
        self.rows[spoilt] = torch.nan


@dataclass(frozen=True)
class Spoilt(Toy):
    """An autoencoder of random rows, some of which are NaN."""

    spoilt: list[int] = field(default_factory=list)
    """Rows to learn from that are NaN."""

    def datasets(self) -> dict[str, Dataset]:
        return {"train": SpoiltRows(self.samples, self.spoilt), "validation": Rows(24, 1)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor], phase: Phase, window: int) -> Step:
        step = super().loss(model, {"x": batch["x"]}, phase, window)
        trouble = TROUBLES[int(batch["trouble"])] if "trouble" in batch else ""
        if trouble == "inf":
            return replace(step, loss=step.loss / 0)
        if trouble == "hidden":
            return replace(step, loss=step.loss + torch.nan)
        if trouble == "backward":
            return replace(step, loss=step.loss + (step.loss - step.loss).sqrt())
        return step


def batch(seed: int, trouble: str = "") -> dict[str, Tensor]:
    """Six rows."""
    x = Rows(6, seed)[np.arange(6)]["x"]
    if trouble == "nan":
        x[3, 2] = torch.nan
    return {"x": x, "trouble": torch.tensor(TROUBLES.index(trouble))}


def finite(values: Any) -> bool:
    """Whether every number in a line of metrics is."""
    return all(np.isfinite(value) for value in values.values() if isinstance(value, float))
