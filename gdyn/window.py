"""One optimizer step: the micro-batches of a window through loss, backward pass and DeepSpeed's step.

A window whose loss or gradient is not finite on any rank is skipped by all of them: afterwards weights, the state of
optimizer and schedule and what `Engine.end_window` learns are as if it had not been.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from gdyn import ds_engine
from gdyn.collectives import sum_over_ranks
from gdyn.engine import Engine, Step
from gdyn.loader import Batch
from gdyn.metrics import Meter
from gdyn.phases import Phase

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from gdyn.ranks import RankContext

Norms = dict[str, "float | None"]
SHOWN = 3
"""Of ranks or samples, where a message would name many."""


class Outcome(NamedTuple):
    """How a window went."""

    norms: Norms
    """Gradient norms before clipping, if they were measured and the step was applied."""
    skipped: list[float] | None = None
    """If the window was skipped: the losses of this rank's micro-batches."""


def train(
    engine: Engine,
    ds: DeepSpeedEngine,
    batches: list[Batch],
    phase: Phase,
    here: RankContext,
    meter: Meter,
    measure: bool,
) -> Outcome:
    """Take one optimizer step and, unless it is skipped, count its micro-batches in `meter`. `measure`: also the
    gradient norms. Every rank must call this."""
    batches = [{name: tensor.to(here.device, non_blocking=True) for name, tensor in b.items()} for b in batches]
    window = engine.begin_window(ds, batches, phase, here)
    # DeepSpeed averages over ranks and micro-batches; the shares of a window add up (see Step.loss).
    scale = here.world_size * len(batches)
    steps: list[Step] = []
    for batch in batches[:-1]:
        step = engine.loss(ds, batch, phase, window)
        ds.backward(step.loss * scale)
        ds.step()
        steps.append(_detached(step))
    step = engine.loss(ds, batches[-1], phase, window)
    steps.append(_detached(step))
    losses = torch.stack([step.loss for step in steps])
    # Before the last backward pass, because from then on the ranks share one gradient.
    lost = bool(sum_over_ranks((~losses.isfinite()).sum()))
    with ds_engine.spoilt(ds) if lost else contextlib.nullcontext():
        ds.backward(step.loss * scale)
    norms = _norms_before(engine, ds) if measure and not lost else {}
    applied = ds_engine.step(ds, keep_scale=lost)
    if lost or not (applied or ds_engine.seeks_loss_scale(ds)):
        return Outcome({}, losses.tolist())
    for step in steps:
        meter.add(step)
    if not applied:
        return Outcome({})
    with torch.no_grad():
        engine.end_window(ds.module, steps, phase, window, here)
    return Outcome(norms or _norms_after(ds) if measure else {})


def _detached(step: Step) -> Step:
    return replace(step, loss=step.loss.detach())


def _norms_before(engine: Engine, ds: DeepSpeedEngine) -> Norms:
    """Empty where `_norms_after` is as good, and costs nothing."""
    parts = engine.parts()
    if not parts and ds.zero_optimization_stage() > 0:
        return {}
    return dict(ds_engine.gradient_norms(ds, parts))


def _norms_after(ds: DeepSpeedEngine) -> Norms:
    norm = ds.get_global_grad_norm()
    return {"grad_norm": None if norm is None else float(norm)}


@dataclass
class Skipped:
    """The windows of a run that were skipped."""

    total: int = 0
    row: list[str] = field(default_factory=list)
    """What is known of the last ones, if no other window has come since."""


def described(ranks: Sequence[Sequence[tuple[float, Sequence[int]]]], name: Callable[[int], str]) -> str:
    """Why a window was skipped. ranks: of each rank, loss and samples of its micro-batches; name: of a sample."""
    batches = [(rank, *batch) for rank, batches in enumerate(ranks) for batch in batches]
    lost = [(rank, loss, samples) for rank, loss, samples in batches if not math.isfinite(loss)]
    if not lost:
        samples = [sample for *_, samples in batches for sample in samples]
        return f"every loss is finite, but the gradient is not ({_few([name(sample) for sample in samples])})"
    return _few([f"loss {loss} on rank {rank} ({_few([name(s) for s in samples])})" for rank, loss, samples in lost])


def _few(words: Sequence[str]) -> str:
    more = len(words) - SHOWN
    return ", ".join(words[:SHOWN]) + (f" and {more} more" if more > 0 else "")
