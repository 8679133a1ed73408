"""Who this process is in the job, and how it enters and leaves torch.distributed.

`gdyn.launchers` turns the variables of any launcher into a `RankInfo`. `join()` completes it (through MPI where there
is MPI), meets the other ranks (`gdyn.rendezvous`), and yields a `RankContext`, called `here` everywhere. Nothing else
in the package reads or writes rank variables. Importing this module imports neither torch, DeepSpeed nor mpi4py: login
nodes have no use for them, and DataLoader workers crash if they import mpi4py again.
"""

import atexit
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from gdyn.errors import UserError
from gdyn.launchers import RankInfo, discover, number
from gdyn.rendezvous import all_failed, check_in, open_store

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

__all__ = ["ALONE", "AgreedError", "RankContext", "RankInfo", "discover", "join"]

log = logging.getLogger("gdyn")
T = TypeVar("T")


class AgreedError(UserError):
    """A user error that every rank raises together, so that all of them can leave in good order."""


@dataclass(frozen=True)
class RankContext:
    """Who this process is (`here`). The defaults are a process alone, for which torch.distributed is never touched."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Number of this process among those on its node; the device index may differ (one visible device per task)."""
    local_size: int = 1
    device_name: str = "cpu"
    launcher: str = "single"
    evidence: str = "rank 0/1, alone"
    node: str = field(default_factory=socket.gethostname)
    """This node as its scheduler calls it."""
    nodes: int = 1
    """How many nodes the ranks are on."""
    first_node: str = ""
    """Where rank 0 is."""
    stores: "list[Store]" = field(default_factory=list, repr=False, compare=False)
    """What `store` returns; emptied when the job is left, for whoever still holds this would keep the port open."""
    import_seconds: float = 0.0
    """What importing torch and DeepSpeed took, of the time it took to join."""

    @cached_property
    def device(self) -> "torch.device":
        import torch

        return torch.device(self.device_name)

    @property
    def main(self) -> bool:
        """Whether this rank writes files and logs."""
        return self.rank == 0

    @property
    def store(self) -> "Store | None":
        """Where the ranks met; it lives and dies with rank 0 (under torchrun: with its agent). None alone."""
        return self.stores[0] if self.stores else None

    def max(self, number: int) -> int:
        """The largest `number` of any rank. Every rank must call this."""
        if self.world_size == 1:
            return int(number)
        import torch

        numbers = torch.tensor(int(number), dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
        return int(numbers.item())

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank. Every rank must call this."""
        return bool(self.max(bool(flag)))

    def barrier(self) -> None:
        """Wait for all ranks. Every rank must call this."""
        self.any(False)  # unlike dist.barrier, uses the right device on every backend

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` (anything picklable) on every rank. Every rank must call this."""
        if self.world_size == 1:
            return value
        import torch

        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """`value` (anything picklable) of each rank, in rank order, on every rank. Every rank must call this."""
        if self.world_size == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def collect(self, value: Any) -> list[Any] | None:
        """`value` (anything picklable) of each rank, in rank order, on rank 0; None elsewhere. Every rank must call
        this. What rank 0 alone needs goes this way: `gather` sends world^2 messages."""
        if self.world_size == 1:
            return [value]
        import torch

        values: list[Any] | None = [None] * self.world_size if self.main else None
        torch.distributed.gather_object(value, values, dst=0)
        return values

    def limit_collectives(self, seconds: float) -> None:
        """From now on no collective between devices waits longer for a rank: when one times out, NCCL writes its flight
        record. On CPUs there is none, and the watchdog says all there is to say. Every rank must call this."""
        if self.world_size > 1 and self.device.type != "cpu":
            from torch.distributed import distributed_c10d as c10d

            # Private, but the only way to set it once the run file has been read.
            c10d._set_pg_timeout(timedelta(seconds=seconds), c10d._get_default_group())

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the block, then agree on how it went. Every rank must enter; the block may not talk to other ranks.

        If any rank raised UserError or OSError, all raise AgreedError (a UserError) with the message of the lowest such
        rank. Anything else is a bug: it is raised where it happened.
        """
        problem: Exception | None = None
        try:
            yield
        except (UserError, OSError) as error:
            problem = error
        if self.world_size == 1 and isinstance(problem, UserError):
            raise problem
        if not self.any(problem is not None):
            return
        messages = self.gather(problem and str(problem))
        for rank, message in enumerate(messages):
            if message is not None:
                raise AgreedError(f"[rank {rank}] {message}" if rank else message) from problem

    def each(self, items: Iterable[T], asked: Callable[[], bool] = lambda: False) -> Iterator[tuple[T, bool]]:
        """(item, whether `asked` said yes on any rank just before it), until a rank cannot make its next item
        (UserError, OSError): then all raise, as in `together`. Every rank must iterate, over equally many; making an
        item may not talk to other ranks."""
        iterator = iter(items)
        while True:
            item, problem = None, None
            try:
                item = next(iterator, None)
            except (UserError, OSError) as error:
                problem = error
            told = self.max(2 if problem is not None else int(item is not None and asked()))
            if told == 2:
                with self.together():
                    if problem is not None:
                        raise problem
            if item is None:
                return
            yield item, bool(told)


ALONE = RankContext()


@contextmanager
def join(timeout_s: float = 600, rendezvous_s: float | None = None) -> Iterator[RankContext]:
    """Enter the job, yield `here`, leave. Every rank must enter; under MPI once per process.

    timeout_s: how long a collective may wait for a rank. rendezvous_s: how long the ranks may take to arrive (default
    60, or GDYN_RENDEZVOUS_S); UserError if they do not. While inside, the variables DeepSpeed wants are set.
    A UserError that every rank raises becomes one AgreedError. A block that ends with anything else but AgreedError
    leaves nobody waiting: under MPI the whole job is aborted.
    """
    info, comm = discover(os.environ), None
    if rendezvous_s is None:
        rendezvous_s = number(os.environ, "GDYN_RENDEZVOUS_S") or 60
    if info.mpi:
        # mpi4py before torch: Cray MPICH otherwise fails to choose its NICs (OLCF's PyTorch page)
        info, comm = _ask_mpi(info)
    agreed: BaseException | None = None
    try:
        with _enter(info, comm, timeout_s, rendezvous_s) as here:
            log.info("%s", here.evidence)
            try:
                yield here
            except BaseException as error:
                agreed = error
                if here.world_size > 1 and not isinstance(error, AgreedError):
                    assert here.store is not None
                    message = all_failed(here.store, here, str(error)) if isinstance(error, UserError) else None
                    if message is None:
                        raise
                    agreed = AgreedError(message)
            here.barrier()  # a rank that leaves early can break the others' last messages
        if comm is not None:
            _mpi().Finalize()
    except BaseException as error:
        if comm is not None:
            # At exit, after the message: MPI's own exit handler would wait for the others, which wait for us.
            atexit.register(_abort, comm, error)
        raise
    if agreed is not None:
        raise agreed


@contextmanager
def _enter(info: RankInfo, comm: Any, timeout_s: float, rendezvous_s: float) -> "Iterator[RankContext]":
    """torch.distributed and DeepSpeed's wrapper around it, initialised; destroyed after a good end."""
    began = time.monotonic()
    import deepspeed
    import torch

    import_seconds = time.monotonic() - began

    accelerator = deepspeed.get_accelerator()
    store, info = open_store(info, comm, rendezvous_s)
    assert info.rank is not None and info.world_size is not None and info.local_rank is not None
    index, device_name, identity = _device(accelerator, info.local_rank)
    # torchrun's agent serves one store to all of its attempts
    desk = torch.distributed.PrefixStore(f"gdyn/{info.attempt}", store)
    stores: list[Store] = [desk]
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    first_node, nodes = check_in(desk, info, identity, rendezvous_s, node)
    with _exported(info, index):
        if device_name != "cpu":
            accelerator.set_device(index)  # before the process group: XPU hangs otherwise
        timeout = timedelta(seconds=timeout_s)
        torch.distributed.init_process_group(
            accelerator.communication_backend_name(),
            store=store,
            rank=info.rank,
            world_size=info.world_size,
            timeout=timeout,
        )
        _avoid_compilation()
        deepspeed.init_distributed(timeout=timeout, verbose=False)
        host = socket.gethostname()
        here = RankContext(
            info.rank,
            info.world_size,
            info.local_rank,
            device_name=device_name,
            launcher=info.launcher,
            evidence=f"rank {info.rank}/{info.world_size} on {host} via {info.evidence}, device {device_name}",
            node=node,
            nodes=nodes,
            first_node=first_node,
            stores=stores,
            import_seconds=import_seconds,
        )
        local_size = info.local_size or here.gather(host).count(host)
        os.environ["LOCAL_SIZE"] = str(local_size)  # without it ZeRO-3 forks numactl in every step on CPU
        try:
            yield replace(here, local_size=local_size)
            deepspeed.comm.destroy_process_group()
        finally:
            stores.clear()


def _avoid_compilation() -> None:
    """Keep DeepSpeed from compiling its shared-memory op (only inference uses it): 105 s, and g++ and ninja needed."""
    # by name: as an attribute, deepspeed.comm.torch is the real torch
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


@contextmanager
def _exported(info: RankInfo, device_index: int) -> Iterator[None]:
    """The variables DeepSpeed reads, set; afterwards the environment is as before."""
    ours = {
        "RANK": str(info.rank),
        "WORLD_SIZE": str(info.world_size),
        "LOCAL_RANK": str(device_index),  # DeepSpeed does set_device(LOCAL_RANK)
        "MASTER_ADDR": str(info.master_addr),
        "MASTER_PORT": str(info.master_port),
    }
    # DeepSpeed asserts that Open MPI's local rank equals LOCAL_RANK, so it has to go
    names = [*ours, "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"]
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def _device(accelerator: Any, local_rank: int) -> tuple[int, str, str | None]:
    """Index, torch name and, unless it is the CPU, an identity of this rank's device that no other device shares."""
    kind = accelerator.device_name()
    if kind == "cpu":
        return local_rank, kind, None
    import torch

    visible = accelerator.device_count()
    if not visible:
        raise UserError(f"No {kind} device is visible; ask the scheduler for one per rank, or set DS_ACCELERATOR=cpu.")
    index = local_rank % visible  # one visible device per task: always 0
    identity = getattr(torch.get_device_module(kind).get_device_properties(index), "uuid", None)
    if identity is None:
        masks = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
        identity = [*(os.environ.get(mask) for mask in masks), index]
    return index, accelerator.device_name(index), f"{socket.gethostname()}:{identity}"


def _mpi() -> Any:
    """mpi4py's MPI, not initialised on import: a library that does not fit the launcher would end the process."""
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    return MPI


def _ask_mpi(info: RankInfo) -> tuple[RankInfo, Any]:
    """`info` as MPI's COMM_WORLD knows it, and that communicator. (`info`, None) if MPI is missing but not needed.

    Every rank must call this. UserError if MPI sees another world than the launcher started.
    """
    try:
        mpi = _mpi()
    except (ImportError, RuntimeError) as error:  # no mpi4py, or no MPI library for it
        if info.complete:
            return info, None
        raise UserError(
            f"Started by {info.evidence}, which needs mpi4py and its MPI library for the ranks to meet ({error}). "
            "Install mpi4py against this machine's MPI, or set MASTER_ADDR and MASTER_PORT."
        ) from error
    name, version = mpi.get_vendor()
    vendor, cure = f"{name} {'.'.join(map(str, version))}", _pmi_cure(info, name)
    if info.launcher == "openmpi" and name == "MPICH":
        raise UserError(f"Started by {info.evidence}, but mpi4py uses {vendor}, which cannot join. {cure}")
    if info.pmix_only and name != "Open MPI" and info.rank == 0:
        # MPICH without PMIx support ends the process here, with a message that names no cure
        log.warning("initialising %s, though %s offers PMIx only. If it aborts now: %s", vendor, info.evidence, cure)
    if not mpi.Is_initialized():
        mpi.Init_thread()
    comm = mpi.COMM_WORLD
    if info.world_size not in (None, comm.size) or info.rank not in (None, comm.rank):
        raise UserError(
            f"{info.evidence} says rank {info.rank} of {info.world_size}, but mpi4py ({vendor}) says rank {comm.rank} "
            f"of {comm.size}: several models would be trained, not one. {cure}"
        )
    node = comm.Split_type(mpi.COMM_TYPE_SHARED)
    local_rank, local_size = node.rank, node.size
    if info.local_rank is not None and info.local_size is not None and info.local_size > local_size:
        # Seen with a PMIx of another version than Slurm's: MPI works, but takes every rank to be alone on its node
        local_rank, local_size = info.local_rank, info.local_size
    address = info.master_addr or ("127.0.0.1" if node.size == comm.size else socket.gethostname())
    info = replace(
        info,
        rank=comm.rank,
        world_size=comm.size,
        local_rank=local_rank,
        local_size=local_size,
        master_addr=comm.bcast(address),
        evidence=f"mpi4py ({vendor}), started by {info.evidence}",
    )
    return info, comm


def _pmi_cure(info: RankInfo, vendor: str) -> str:
    if info.launcher != "slurm":
        return "Use the mpirun or mpiexec that belongs to this MPI, or build mpi4py against the MPI of that launcher."
    flavour = "pmix" if vendor == "Open MPI" else "pmi2"
    return (
        f"Start with srun --mpi={flavour} (Cray: --mpi=cray_shasta, and mpi4py built against cray-mpich), "
        "or set GDYN_LAUNCHER=slurm to do without MPI."
    )


def _abort(comm: Any, error: BaseException) -> None:
    """End every rank, with the exit code the launch programs return for this error."""
    code = 2 if isinstance(error, UserError) else 1
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        code = error.code
    sys.stdout.flush()
    sys.stderr.flush()
    if code != 2:
        _let_go()
    comm.Abort(code)


def _let_go(seconds: float = 4) -> None:
    """Close the connections to the other ranks, which then notice at once, and give them time to say where they are:
    MPI's abort leaves them none."""
    import torch

    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()
        time.sleep(seconds)
