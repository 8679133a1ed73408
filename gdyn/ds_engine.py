"""What surrounds a DeepSpeed engine's life: which parameters it trains, making it, what it shows, letting it go."""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gdyn import ds_config, optimizer
from gdyn.ds_config import Values
from gdyn.engine import Engine
from gdyn.errors import UserError
from gdyn.learning_rate import LearningRates
from gdyn.phases import Phase

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger("gdyn")


def trainable(model: nn.Module, phase: Phase) -> list[str]:
    """Names of the parameters a phase trains.

    Raises: UserError if its globs match none.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in phase.trains)]
    if not chosen:
        raise UserError(
            f"phase {phase.label}: trains {list(phase.trains)} matches no parameter; the first are "
            f"{', '.join(names[:3])}."
        )
    return chosen


def count(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers these parameters are, also where ZeRO-3 has partitioned them, which makes them look empty."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


@contextlib.contextmanager
def whole(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within, parameters that ZeRO-3 has partitioned are there in full, to be read. Not for a module's own `forward`,
    for which DeepSpeed gathers them. Every rank must call this."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed  # slow to import

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def make(
    engine: Engine, model: nn.Module, phase: Phase, values: Values, rates: LearningRates | None
) -> DeepSpeedEngine:
    """An engine that trains what requires a gradient. `values`: the completed DeepSpeed JSON. `rates`: the run's
    schedule, if the JSON has none. Every rank must call this.

    Raises: UserError for a ZeRO stage that the engine cannot be trained with.
    """
    import deepspeed  # slow to import

    if engine.calls_depend_on_data and ds_config.zero_stage(values) == 3:
        raise UserError(
            f"{type(engine).__name__} cannot be trained with ZeRO stage 3, because its ranks call the modules of the "
            'network at different times; set "zero_optimization": {"stage": 2} or less in the DeepSpeed JSON.'
        )
    everything = list(model.parameters())
    trained = [parameter for parameter in everything if parameter.requires_grad]
    log.info("%d trainable parameters of %d.", count(trained), count(everything))
    groups = optimizer.param_groups(model, engine.param_groups(model, phase), values, phase.label)
    if len(groups) > 1:
        log.info("%s.", optimizer.described(groups))
    if ds_config.optimizer_type(values) == "Muon":
        optimizer.run_muon_eagerly()
    ours = optimizer.names_matrices(groups)
    # Where an optimizer is offloaded, DeepSpeed asks for this before it takes ours.
    config = {**values, "zero_force_ds_cpu_optimizer": False} if ours else dict(values)
    ds, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups,
        config=config,
        optimizer=optimizer.muon(values) if ours else None,
        lr_scheduler=rates.attach if rates else None,
    )
    unchecked = ("zero_optimization.compute_grad_norm", "bf16.check_grad_overflow")
    if any(ds_config.get(values, key) is False for key in unchecked):
        # Without the gradient's norm, or a look at it, ZeRO 1 and 2 would apply what is not finite.
        ds.optimizer.check_grad_overflow = True
    return ds


def learning_rates(ds: DeepSpeedEngine) -> dict[str, float]:
    """`lr` of the first parameter group, `lr_<name>` of further ones, for the optimizer step that comes next."""
    groups = ds.optimizer.param_groups
    names = ["lr", *(f"lr_{optimizer.name_of(group, i)}" for i, group in enumerate(groups[1:], start=1))]
    return dict(zip(names, map(float, ds.get_lr()), strict=True))


def gradient_norms(ds: DeepSpeedEngine, parts: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
    """`grad_norm` of all gradients and `grad_norm_<part>` of the parameters each part's globs match: of the whole
    window, not clipped, without loss scale. Between the last backward pass of a window and `ds.step()`; every rank must
    call this.

    With Muon at ZeRO stages 1 and 2 the gradients of its matrices are orthogonalised by then.
    """
    from deepspeed.utils import safe_get_full_grad

    squares = {}
    for name, parameter in ds.module.named_parameters():
        gradient = safe_get_full_grad(parameter) if parameter.requires_grad else None
        if gradient is not None:
            squares[name] = gradient.double().square().sum()
    values = dict(zip(squares, torch.stack(list(squares.values())).tolist(), strict=True))
    scale = _loss_scale(ds)

    def norm(globs: tuple[str, ...]) -> float:
        chosen = (value for name, value in values.items() if any(fnmatch.fnmatchcase(name, glob) for glob in globs))
        return float(sum(chosen) ** 0.5 / scale)

    return {"grad_norm": norm(("*",))} | {f"grad_norm_{part}": norm(globs) for part, globs in parts.items()}


@contextlib.contextmanager
def spoilt(ds: DeepSpeedEngine) -> Iterator[None]:
    """Within, every gradient of a backward pass is NaN, whatever it would have been. A loss that is NaN does not make
    it so by itself: `clamp` and `where`, for instance, have the gradient 0 there."""
    trained = [parameter for parameter in ds.module.parameters() if parameter.requires_grad]
    hooks = [parameter.register_hook(lambda gradient: torch.full_like(gradient, math.nan)) for parameter in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def step(ds: DeepSpeedEngine, keep_scale: bool) -> bool:
    """DeepSpeed's step at the end of a window; whether it was applied. Where the gradient is not finite it changes
    neither weights nor the state of optimizer and schedule, with any optimizer. `keep_scale`: nor fp16's loss scale.
    Every rank must call this."""
    changes: dict[str, Any] = {}
    if keep_scale:
        changes["_update_scale"] = _nothing
    if ds.optimizer is ds.basic_optimizer and not _finite_gradients(ds):
        # PyTorch's own optimizer, at ZeRO 0, which DeepSpeed lets do what it will. `overflow` is what it asks others.
        changes |= {"step": _nothing, "overflow": True}
    attributes = vars(ds.optimizer)
    assert not attributes.keys() & changes.keys()
    attributes.update(changes)
    try:
        ds.step()
    finally:
        for name in changes:
            del attributes[name]
    return bool(ds.was_step_applied())


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _finite_gradients(ds: DeepSpeedEngine) -> bool:
    """Judged by their norm, as DeepSpeed does where it judges. At ZeRO 0 all ranks hold the same."""
    gradients = [parameter.grad for parameter in ds.module.parameters() if parameter.grad is not None]
    return bool(torch.nn.utils.get_total_norm(gradients).isfinite())


def seeks_loss_scale(ds: DeepSpeedEngine) -> bool:
    """Whether steps are skipped now and then to find fp16's loss scale, which is as it should be."""
    return bool(ds.torch_autocast_z0_gradscaler or (ds.fp16_enabled() and ds.dynamic_loss_scale()))


def _loss_scale(ds: DeepSpeedEngine) -> float:
    """What fp16 gradients are multiplied by; 1 otherwise."""
    scaler = ds.torch_autocast_z0_gradscaler or getattr(ds.optimizer, "torch_autocast_gradscaler", None)
    return float(scaler.get_scale() if scaler else getattr(ds.optimizer, "loss_scale", 1.0))


def release(ds: DeepSpeedEngine) -> None:
    """Destroy `ds`, and what `destroy` leaves behind: hooks on the module and references to the optimizer would keep
    every phase's engine alive."""
    ds.destroy()
    for hook in ("module_forward_pre_hook", "module_forward_post_hook"):
        if getattr(ds, hook, None) is not None:
            getattr(ds, hook).remove()
    ds.optimizer = ds.basic_optimizer = ds.lr_scheduler = None
    gc.collect()
