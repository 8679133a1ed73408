"""Can this machine run that DeepSpeed JSON? Asked before training, so that nobody waits for a compiler or for ever.

DeepSpeed compiles some of its optimizers when they are first used, for minutes, and dies where the tools are missing.
PyTorch guards such a build with a file named `lock`; a killed build leaves it, and every later start waits silently.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gdyn import ds_config
from gdyn.ds_config import DsConfig, Values
from gdyn.errors import UserError

log = logging.getLogger("gdyn")

# Measured on two cores (AMD EPYC); a few minutes is all that is meant.
BUILD_MINUTES = {"fused_adam": 4, "cpu_adam": 3}
BUILD_SECONDS = 900.0  # no single compilation takes this long
QUIET_SECONDS = 10.0  # without a sign of life a build counts as dead


@dataclass(frozen=True)
class Machine:
    """What matters here of one rank's machine."""

    device: str
    """As DeepSpeed calls it: cpu, cuda, xpu."""
    precisions: frozenset[str]
    """Of fp32, bf16, fp16, those the device computes in."""
    missing_tools: tuple[str, ...]
    """What a run-time compilation would need and does not find."""
    installed_ops: frozenset[str]
    """DeepSpeed ops that were built when it was installed."""


def look() -> Machine:
    """This machine. Imports torch and DeepSpeed."""
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops
    from torch.utils import cpp_extension

    accelerator = get_accelerator()
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    device = accelerator.device_name()
    compiler = cpp_extension.get_cxx_compiler()
    tools = {
        f"a C++ compiler ({compiler})": shutil.which(compiler) is not None,
        "ninja": cpp_extension.is_ninja_available(),
        "the CUDA or ROCm toolkit": device != "cuda" or bool(cpp_extension.CUDA_HOME or cpp_extension.ROCM_HOME),
    }
    return Machine(
        device=device,
        precisions=frozenset(names[dtype] for dtype in accelerator.supported_dtypes() if dtype in names),
        missing_tools=tuple(tool for tool, there in tools.items() if not there),
        installed_ops=frozenset(op for op, there in installed_ops.items() if there and accelerator_name == device),
    )


def ops_needed(values: Values) -> list[str]:
    """DeepSpeed's names of the compiled ops a config uses; with "torch_adam": true usually none."""
    devices = {ds_config.offload_device(values, key) for key in ("offload_optimizer", "offload_param")}
    ops = ["async_io"] if "nvme" in devices else []
    adam = ds_config.optimizer_type(values) in ("Adam", "AdamW", "Muon")
    if adam and not ds_config.get(values, "optimizer.params.torch_adam", False):
        offloaded = ds_config.offload_device(values, "offload_optimizer") != "none"
        ops.append("cpu_adam" if offloaded else "fused_adam")
    if ds_config.get(values, "zero_optimization.zero_quantized_weights", False):
        ops.append("quantizer")
    return ops


def build_directories(values: Values, machine: Machine) -> dict[str, Path]:
    """Where torch builds, or has built, each op that is needed and was not installed with DeepSpeed. Imports torch."""
    ops = [op for op in ops_needed(values) if op not in machine.installed_ops]
    if not ops:
        return {}
    # Private, but the only one that knows all of torch's rules (TORCH_EXTENSIONS_DIR, python and CUDA version).
    from torch.utils.cpp_extension import _get_build_directory

    return {op: Path(_get_build_directory(op, False)) for op in ops}


def check_hardware(config: DsConfig, values: Values, machine: Machine, directories: Mapping[str, Path]) -> list[str]:
    """Refuse a config this machine cannot run. Returns warnings: compilations to come.

    `values` is what `ds_config.complete` made of `config`, `directories` what `build_directories` says.
    """
    precision = ds_config.precision(values)
    if precision.removeprefix("autocast-") not in machine.precisions:
        raise UserError(
            f"{config}: precision {precision} is not supported on this device ({machine.device}); "
            f"it computes in {', '.join(sorted(machine.precisions))}. Choose a recipe with one of these."
        )
    warnings = []
    for op, directory in directories.items():
        built = (directory / f"{op}.so").exists()
        # A built op is loaded through ninja all the same, but needs no compiler: it may come from a login node.
        missing = [tool for tool in machine.missing_tools if tool == "ninja" or not built]
        if missing:
            cure = ', or write "torch_adam": true in optimizer.params' if op.endswith("adam") else ""
            raise UserError(
                f"{config}: DeepSpeed must compile its {op} op, but does not find "
                f"{' and '.join(missing)}; install what is missing (g++, pip install ninja){cure}."
            )
        if not built:
            warnings.append(
                f"{config}: DeepSpeed compiles its {op} op in {directory} when training starts, about "
                f"{BUILD_MINUTES.get(op, 3)} minutes, once."
            )
    return warnings


def check_build_locks(directories: Mapping[str, Path], quiet_seconds: float = QUIET_SECONDS) -> None:
    """Wait while another process builds one of these ops; raise UserError for a lock nobody works behind.

    A build is alive if a file in its directory is younger than `quiet_seconds`, or while a process works there (one
    file may take minutes). Call this before any rank starts building.
    """
    for op, directory in directories.items():
        lock, announced = directory / "lock", False
        while lock.exists():
            patience = max(quiet_seconds, BUILD_SECONDS) if _process_in(directory) else quiet_seconds
            if _seconds_since_change(directory) > patience:
                raise UserError(
                    f"{lock} exists, but no build of {op} is at work there. A killed build left it, and DeepSpeed would"
                    f" wait for ever: remove it with `rm {lock}` and start again (if another node is building there,"
                    " start again when it has finished)."
                )
            if not announced:
                log.info("another process builds the DeepSpeed op %s in %s; waiting for it", op, directory)
                announced = True
            time.sleep(min(0.5, quiet_seconds / 4))


def _process_in(directory: Path) -> bool:
    """Whether a process on this node has its working directory there, as ninja and the compilers do. Linux only."""
    directory = directory.resolve()
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if link.readlink() == directory:
                return True
        except OSError:  # gone meanwhile, or somebody else's
            continue
    return False


def _seconds_since_change(directory: Path) -> float:
    newest = directory.stat().st_mtime
    for path in directory.iterdir():
        try:
            newest = max(newest, path.stat().st_mtime)
        except FileNotFoundError:  # a compiler's temporary file
            continue
    return time.time() - newest
