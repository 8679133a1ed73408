"""How the ranks of a job find each other: one TCP store that all reach, and a check-in that ends in bounded time."""

import socket
import time
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from gdyn.errors import UserError
from gdyn.launchers import RankInfo

if TYPE_CHECKING:
    from torch.distributed import Store

    from gdyn.ranks import RankContext


def open_store(info: RankInfo, comm: Any, timeout_s: float) -> "tuple[Store, RankInfo]":
    """A store that all ranks reach, and `info` with its address. Every rank must call this.

    Rank 0 serves it: at a free port under MPI (`comm`) or alone, else at MASTER_PORT. UserError if it is out of reach.
    """
    from torch.distributed import TCPStore

    if info.world_size == 1 and not info.agent_store:
        info = replace(info, master_addr="127.0.0.1", master_port=None)
    store = None
    if info.rank == 0 and not info.agent_store:
        store = _serve(info, any_port=comm is not None or info.world_size == 1)
        info = replace(info, master_port=store.port)
    if comm is not None:
        info = replace(info, master_port=comm.bcast(info.master_port))
    _await_port(info, timeout_s)
    if store is None:
        assert info.master_addr is not None and info.master_port is not None
        timeout = timedelta(seconds=timeout_s)
        store = TCPStore(info.master_addr, info.master_port, info.world_size, False, timeout)
    return store, info


def _serve(info: RankInfo, any_port: bool) -> Any:
    """The store, on all interfaces of this host, at MASTER_PORT or, if that is free to choose, another free port."""
    from torch.distributed import DistNetworkError, TCPStore

    port = info.master_port or 0
    try:
        return TCPStore("127.0.0.1", port, info.world_size, True, wait_for_workers=False)
    except DistNetworkError as error:
        if any_port and port:
            return TCPStore("127.0.0.1", 0, info.world_size, True, wait_for_workers=False)
        raise UserError(
            f"Rank 0 cannot serve port {port} of {socket.gethostname()}, perhaps another job does ({error}). "
            "Choose another by MASTER_PORT (deepspeed and torchrun: --master_port)."
        ) from error


def _await_port(info: RankInfo, timeout_s: float) -> None:
    """Return once rank 0's port answers. With plain sockets, because torch's own attempts print C++ stack traces."""
    assert info.master_addr is not None and info.master_port is not None
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((info.master_addr, info.master_port), timeout=timeout_s).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"Rank {info.rank} of {info.world_size} found no rank 0 at {info.master_addr}:{info.master_port} "
                    f"within {timeout_s:g} s ({error}). MASTER_ADDR must be the host of rank 0, and rank 0 must run."
                ) from error
            time.sleep(0.1)


def check_in(desk: "Store", info: RankInfo, device: str | None, timeout_s: float, node: str = "") -> tuple[str, int]:
    """Return when all ranks are here, each once and each with a `device` of its own (None: the CPU, for all): the node
    of rank 0, and how many nodes there are.

    Every rank must call this. Otherwise UserError with the same message on every rank that came.
    """
    from torch.distributed import DistError

    place = f"{info.master_addr}:{info.master_port}"
    try:
        problem = ""
        if desk.add(f"rank/{info.rank}", 1) > 1:
            problem = (
                f"Rank {info.rank} came twice to {place}. If another job uses this port, choose another MASTER_PORT; "
                "else give each process its own RANK."
            )
        elif device and desk.add(f"device/{device}", 1) > 1:
            problem = (
                f"Two ranks share the device {device}. Start as many ranks per node as it has devices, and let each "
                "rank see its own (srun --gpus-per-task=1) or all of them."
            )
        if problem:
            desk.set("problem", problem)  # before arriving, so that whoever arrives last knows
        desk.set(f"node/{info.rank}", node)
        desk.add("nodes", int(info.local_rank == 0))
        all_here = desk.add("arrived", 1) == info.world_size
        if all_here and desk.check(["problem"]):
            problem = desk.get("problem").decode()
        if problem or all_here:
            desk.set("verdict", problem)
        deadline, pause = time.monotonic() + timeout_s, 0.01
        while not desk.check(["verdict"]):
            if time.monotonic() > deadline:
                arrived = desk.add("arrived", 0)
                desk.set(
                    "verdict",
                    f"{arrived} of {info.world_size} ranks arrived at {place} within {timeout_s:g} s "
                    f"({info.evidence}). Start them all, or unset RANK and WORLD_SIZE to run as a single process.",
                )
            time.sleep(pause)
            pause = min(1.5 * pause, 0.25)
        problem = problem or desk.get("verdict").decode()
        if not problem:
            return desk.get("node/0").decode(), desk.add("nodes", 0)
    except DistError as error:
        raise UserError(f"Rank {info.rank} lost rank 0 while the ranks were meeting; see rank 0's message.") from error
    if info.rank == 0:
        time.sleep(1)  # the store ends with this process: let the others read why
    raise UserError(problem)


def all_failed(desk: "Store", here: "RankContext", message: str, timeout_s: float = 3) -> str | None:
    """Rank 0's message if every rank fails with one, within seconds; None if some rank still works. Every rank that
    fails must call this."""
    from torch.distributed import DistError

    try:
        if here.main:
            desk.set("failure", message)
        if not _all_add("failures", desk, here.world_size, timeout_s):
            return None
        return desk.get("failure").decode()
    except DistError:  # the store ended with rank 0
        return None


def roll_call(desk: "Store", here: "RankContext", timeout_s: float = 3) -> list[tuple[int, str]] | None:
    """(rank, node) of those that do not answer within `timeout_s`, on rank 0; an empty list elsewhere. None if rank 0
    itself is gone. Every rank that has lost another must call this."""
    from torch.distributed import DistError

    try:
        desk.set(f"alive/{here.rank}", "")
        desk.add("alive", 1)
        if not here.main or _all_add("alive", desk, here.world_size, timeout_s, amount=0):
            return []
        missing = [rank for rank in range(here.world_size) if not desk.check([f"alive/{rank}"])]
        return [(rank, desk.get(f"node/{rank}").decode()) for rank in missing]
    except DistError:
        return None


def _all_add(key: str, desk: "Store", world_size: int, timeout_s: float, amount: int = 1) -> bool:
    """Add to a counter, and whether it reaches the number of ranks in time."""
    desk.add(key, amount)
    deadline = time.monotonic() + timeout_s
    while desk.add(key, 0) < world_size:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
