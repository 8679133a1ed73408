"""Scores of a whole split: the same loss as in training, one batch as its own window, and what only the whole set can
say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gdyn.engine import Dataset, Engine
from gdyn.loader import Loader
from gdyn.metrics import Meter
from gdyn.phases import Phase
from gdyn.ranks import ALONE, RankContext


class Stopped(Exception):
    """The evaluation was left because a rank was asked to stop; all ranks raise it together."""


def evaluate(
    engine: Engine,
    model: nn.Module,
    loader: Loader,
    phase: Phase,
    here: RankContext,
    asked: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Any], dict[str, float]]:
    """(scores of the split, metrics of this rank's last batch). Every rank must call this.

    Raises: Stopped if `asked`, called before each batch, says yes on any rank.

    Scores that `Engine.pooled` computes once over the whole split stand under their own names; means over batches under
    the metric's name, or `batch_<name>` where a pooled score has that name. `model` is in eval mode already.
    """
    meter = Meter(here.device)
    with torch.no_grad(), engine.evaluating(model):
        for (batch, counts), stopping in here.each(loader.shard(), asked):
            if stopping:
                raise Stopped
            batch = {name: tensor.to(here.device, non_blocking=True) for name, tensor in batch.items()}
            window = engine.begin_window(model, [batch], phase, ALONE)
            step = engine.loss(model, batch, phase, window)
            meter.add(step, weight=None if counts else 0.0)
    statistics = meter.total_statistics()
    pooled = engine.pooled(statistics) if statistics is not None else {}
    if phase.objective in pooled:
        sign = -1 if engine.higher_is_better(phase.objective) else 1
        pooled["loss"] = sign * pooled[phase.objective]
    means = {f"batch_{name}" if name in pooled else name: value for name, value in meter.means().items()}
    return pooled | means, meter.last


def evaluate_alone(engine: Engine, model: nn.Module, dataset: Dataset, phase: Phase, batch: int = 16) -> dict[str, Any]:
    """The same scores from this process alone, for what is done with a finished run."""
    return evaluate(engine, model, Loader(dataset, batch, 1, ALONE), phase, ALONE)[0]
