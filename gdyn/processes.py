"""The processes below this one: found, told to stop, ended. Linux, standard library only."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TERM_PATIENCE = 15.0
"""Seconds from a request to end to the kill."""
LEFTOVER_PATIENCE = 10.0
"""Seconds that ranks without a launcher get to say what befell them."""


@contextmanager
def children_stay() -> Iterator[None]:
    """Adopt what a dying launcher leaves behind, so that no rank outlives the job on its device. Linux."""
    set_child_subreaper = 36
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(set_child_subreaper, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(set_child_subreaper, 0, 0, 0, 0)


def descendants(root: int) -> list[int]:
    """The processes below `root`."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:  # gone meanwhile
            continue
        # "pid (name with anything) state parent ..."
        state, parent = text[text.rindex(")") + 2 :].split()[:2]
        if state != "Z":
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def pass_on(launcher: int) -> None:
    """USR2, a request to stop, to the launcher and the processes it started here, each only if it listens.

    mpirun, Hydra and srun pass it on to their ranks on all nodes. torchrun and deepspeed would die of it, and leave
    their ranks behind; those ranks, all on this node, are told directly.
    """
    for process in [launcher, *descendants(launcher)]:
        if _listens(process, signal.SIGUSR2):
            _kill(process, signal.SIGUSR2)


def _listens(process: int, number: signal.Signals) -> bool:
    """Whether it catches the signal, or blocks it, to ask for it in a thread of its own as srun does."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return False
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigCgt", "SigBlk"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def end(process: subprocess.Popen[bytes]) -> None:
    """TERM, on which srun and mpirun end their ranks on all nodes; what is still there after a while is killed."""
    process.terminate()
    try:
        process.wait(TERM_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_descendants() -> None:
    """Wait for what an ended launcher has left behind: ranks that still say what befell them. Then kill it."""
    deadline = time.monotonic() + LEFTOVER_PATIENCE
    while leftover := descendants(os.getpid()):
        late = time.monotonic() - deadline
        if late > LEFTOVER_PATIENCE:  # in the kernel's hands: a dead file system, a device that does not answer
            return
        for process in leftover if late > 0 else ():
            _kill(process, signal.SIGKILL)
        _reap()
        time.sleep(0.1)


def _reap() -> None:
    """Adopted children that have ended."""
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return


def _kill(process: int, number: signal.Signals) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:  # it ended meanwhile
        return
