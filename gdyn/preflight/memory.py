"""What a run needs of memory and disk: one real window, and arithmetic for what DeepSpeed adds."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from gdyn import collectives, ds_config, ds_engine
from gdyn.ds_config import Values
from gdyn.engine import Engine
from gdyn.loader import Batch
from gdyn.phases import Phase

if TYPE_CHECKING:
    from gdyn.ranks import RankContext

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ModelStates:
    """Bytes each rank holds between steps, after Rajbhandari et al., SC20 (arXiv:1910.02054), section 5: without
    buckets, buffers and what ZeRO-3 gathers."""

    parameters: int
    gradients: int
    optimizer: int
    """Moments, and the fp32 master copy where there is one."""
    on_host: int = 0
    """Of these, what is offloaded to the host."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    @property
    def on_device(self) -> int:
        return self.total - self.on_host


def model_states(values: Values, parameters: int, trainable: int, world_size: int) -> ModelStates:
    """`values`: the completed DeepSpeed JSON; numbers of all parameters and of those that are trained."""
    stage, size = ds_config.zero_stage(values), _parameter_bytes(values)
    shards = [world_size if stage >= least else 1 for least in (3, 2, 1)]
    held, gradients, optimizer = (
        -(-nbytes // shard)
        for nbytes, shard in zip(
            (size * parameters, size * trainable, (_master_bytes(values) + _moment_bytes(values)) * trainable),
            shards,
            strict=True,
        )
    )
    on_host = optimizer if ds_config.offload_device(values, "offload_optimizer") == "cpu" else 0
    on_host += held if ds_config.offload_device(values, "offload_param") == "cpu" else 0
    return ModelStates(held, gradients, optimizer, on_host)


def checkpoint_bytes(values: Values, parameters: int, trainable: int) -> int:
    """Of one checkpoint: DeepSpeed's files of all ranks, and our fp32 weights. With ZeRO-3 the former hold the master
    copy only."""
    held = _parameter_bytes(values) if ds_config.zero_stage(values) < 3 else 0
    return (held + 4) * parameters + (_master_bytes(values) + _moment_bytes(values)) * trainable


def _parameter_bytes(values: Values) -> int:
    return 2 if ds_config.precision(values) in DTYPES else 4


def _master_bytes(values: Values) -> int:
    """ZeRO keeps its own fp32 copy of what it shards, whatever the precision."""
    return 4 if ds_config.precision(values) in DTYPES or ds_config.zero_stage(values) else 0


def _moment_bytes(values: Values) -> int:
    """Per trained parameter, in fp32. Muon: as if all were Adam's, which is an upper bound."""
    if ds_config.optimizer_type(values) == "SGD":
        return 4 if ds_config.get(values, "optimizer.params.momentum", 0) else 0
    return 8


@dataclass(frozen=True)
class Trial:
    """One window of training on this rank, without DeepSpeed."""

    seconds: float = 0.0
    peak: int = 0
    """Bytes at most: device memory; on the CPU the growth of resident memory, less what the process had in reserve."""
    loss: float = math.nan
    parameters: int = 0
    trainable: int = 0
    """How many of them are trained."""
    weights: int = 0
    """Bytes of weights and gradients in `peak`."""
    out_of_memory: str = ""
    """What the allocator said."""


def try_window(
    engine: Engine, window: list[Batch], phases: Sequence[Phase], values: Values, here: RankContext
) -> Trial:
    """Forward and backward over the first two micro-batches of this rank's window, with all of it on the device, in the
    JSON's precision, in the phase that trains most; later micro-batches repeat the second. Talks to no other rank, so
    one that runs out of memory leaves nobody waiting. Leaves no tensor, and torch's random state as it was.

    Memory that the operating system takes back by killing the process cannot be reported.
    Raises: UserError if a phase trains nothing.
    """
    with collectives.alone(), _random_state(here.device):
        trial = _try(engine, window, phases, ds_config.precision(values), here)
    gc.collect()
    if here.device.type != "cpu":
        torch.get_device_module(here.device).empty_cache()
    return trial


def _try(engine: Engine, window: list[Batch], phases: Sequence[Phase], precision: str, here: RankContext) -> Trial:
    memory = _HostMemory() if here.device.type == "cpu" else _DeviceMemory(here.device)
    began, loss, problem = time.perf_counter(), math.nan, ""
    model = engine.model()
    phase = max(phases, key=lambda phase: len(ds_engine.trainable(model, phase)))
    trained = set(ds_engine.trainable(model, phase))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    try:
        loss = _step(engine, model, window, phase, precision, here)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        problem = str(error).split("\n")[0] or "out of memory"
    everything = list(model.parameters())
    chosen = [parameter for parameter in everything if parameter.requires_grad]
    return Trial(
        seconds=time.perf_counter() - began,
        peak=memory.growth(),
        loss=loss,
        parameters=ds_engine.count(everything),
        trainable=ds_engine.count(chosen),
        weights=sum(parameter.nbytes for parameter in everything + chosen),
        out_of_memory=problem,
    )


def _step(
    engine: Engine, model: nn.Module, window: list[Batch], phase: Phase, precision: str, here: RankContext
) -> float:
    """This rank's part of the loss, after a backward pass."""
    model.to(here.device, DTYPES.get(precision))
    if precision.startswith("autocast-"):
        autocast = torch.autocast(here.device.type, DTYPES[precision.removeprefix("autocast-")])
        model.forward = autocast(model.forward)
    batches = [{name: tensor.to(here.device) for name, tensor in batch.items()} for batch in window]
    shared = engine.begin_window(model, batches[:2], phase, replace(here, rank=0, world_size=1))
    loss = 0.0
    for batch in batches[:2]:
        step = engine.loss(model, batch, phase, shared)
        step.loss.backward()
        loss += step.loss.item()
    return loss


def _is_out_of_memory(error: Exception) -> bool:
    # The allocator of the CPU has no exception of its own.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    """Torch's generators afterwards as before."""
    devices = [] if device.type == "cpu" else [device.index]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        yield


class _DeviceMemory:
    """Growth of what torch has allocated on a device."""

    def __init__(self, device: torch.device):
        self.device, self.module = device, torch.get_device_module(device)
        self.module.reset_peak_memory_stats(device)
        self.before = self.module.memory_allocated(device)

    def growth(self) -> int:
        return int(self.module.max_memory_allocated(self.device)) - self.before


class _HostMemory:
    """Growth of this process's resident memory. Linux only; elsewhere 0."""

    def __init__(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is resident
        self.before = self._peak()

    def growth(self) -> int:
        return self._peak() - self.before

    @staticmethod
    def _peak() -> int:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return 0
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
