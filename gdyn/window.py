"""One optimizer step: the micro-batches of a window through loss, backward pass and DeepSpeed's step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from gdyn import ds_engine
from gdyn.engine import Engine, Step
from gdyn.loader import Batch
from gdyn.metrics import Meter
from gdyn.phases import Phase

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from gdyn.ranks import RankContext

Norms = dict[str, "float | None"]


def train(
    engine: Engine,
    ds: DeepSpeedEngine,
    batches: list[Batch],
    phase: Phase,
    here: RankContext,
    meter: Meter,
    measure: bool,
) -> Norms:
    """Take one optimizer step and count its micro-batches in `meter`; returns the gradient norms before clipping if
    `measure`. Every rank must call this."""
    batches = [{name: tensor.to(here.device, non_blocking=True) for name, tensor in b.items()} for b in batches]
    window = engine.begin_window(ds, batches, phase, here)
    # DeepSpeed averages over ranks and micro-batches; the shares of a window add up (see Step.loss).
    scale = here.world_size * len(batches)
    steps: list[Step] = []
    norms: Norms = {}
    for i, batch in enumerate(batches, start=1):
        step = engine.loss(ds, batch, phase, window)
        ds.backward(step.loss * scale)
        if measure and i == len(batches):
            norms = _norms_before(engine, ds)
        ds.step()
        meter.add(step)
        steps.append(replace(step, loss=step.loss.detach()))
    if ds.was_step_applied():
        with torch.no_grad():
            engine.end_window(ds.module, steps, phase, window, here)
    return norms or _norms_after(ds) if measure else {}


def _norms_before(engine: Engine, ds: DeepSpeedEngine) -> Norms:
    """Empty where `_norms_after` is as good, and costs nothing."""
    parts = engine.parts()
    if not parts and ds.zero_optimization_stage() > 0:
        return {}
    return dict(ds_engine.gradient_norms(ds, parts))


def _norms_after(ds: DeepSpeedEngine) -> Norms:
    norm = ds.get_global_grad_norm()
    return {"grad_norm": None if norm is None else float(norm)}
