"""What a rank can say of the place it runs in."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gdyn import rundir
from gdyn.preflight.memory import Trial
from gdyn.preflight.storage import Rate

if TYPE_CHECKING:
    from gdyn.ranks import RankContext

MARKS = 5


@dataclass(frozen=True)
class Report:
    """One rank's. Memory in bytes; of a CPU rank the device is the node itself, and only host memory counts."""

    rank: int
    node: str
    device: str = ""
    """Model name."""
    device_free: int | None = None
    device_total: int | None = None
    host_free: int = 0
    host_total: int = 0
    """Of the whole node; a smaller limit of the job's (cgroup) is not seen. 0: not known."""
    driver: str = ""
    """Of the GPU; empty on the CPU."""
    versions: dict[str, str] = field(default_factory=dict)
    clock: tuple[float, ...] = ()
    """time.time() right after each of a few barriers."""
    read: Rate | None = None
    write: Rate | None = None
    """None: another rank of the node wrote."""
    trial: Trial | None = None
    problems: dict[str, str] = field(default_factory=dict)
    """What could not be done -> the message: read, write, window."""


def look(here: RankContext) -> dict[str, Any]:
    """The fields of this rank's Report that say where it is. Every rank must call this."""
    return {
        "rank": here.rank,
        "node": here.node,
        "versions": {name: version for name, version in rundir.versions().items() if version}
        | {"python": platform.python_version()},
        "clock": clock_marks(here),
        **host(),
        **device(here.device),
    }


def clock_marks(here: RankContext) -> tuple[float, ...]:
    """Ranks leave a barrier within the time of a few messages, at any number of nodes; how much later by its own clock
    a rank leaves it than rank 0 is its clock's offset. Every rank must call this."""
    marks = []
    for _ in range(MARKS):
        here.barrier()
        marks.append(time.time())
    return tuple(marks)


def host() -> dict[str, int]:
    """host_free and host_total, bytes. Linux only; elsewhere nothing is known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return {"host_free": 1024 * kib["MemAvailable"], "host_total": 1024 * kib["MemTotal"]}


def device(which: torch.device) -> dict[str, Any]:
    """Name, memory and driver of this rank's device."""
    if which.type == "cpu":
        return {"device": _processor()}
    module = torch.get_device_module(which)
    free, total = module.mem_get_info(which)
    return {
        "device": module.get_device_name(which),
        "device_free": free,
        "device_total": total,
        "driver": getattr(module.get_device_properties(which), "driver_version", "") or _driver(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


def _driver() -> str:
    """Version of NVIDIA's or AMD's kernel module; empty if neither says."""
    for path in (Path("/sys/module/nvidia/version"), Path("/sys/module/amdgpu/version")):
        try:
            return path.read_text().strip()
        except OSError:
            continue
    return ""
