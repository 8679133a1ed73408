"""An engine that fails on order, for tests of what happens then: Vamp with trouble on one rank, at one window."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gdyn import watchdog
from gdyn.engines.vamp.engine import Vamp


@dataclass(frozen=True)
class Troubled(Vamp):
    """Vamp, with trouble."""

    pause: float = 0.0
    """Seconds a window takes longer."""
    trouble: str = ""
    """kill, stop, hang, raise; several words: one after the other, at the next starts; empty: none."""
    on_rank: int = 1
    at_window: int = 3
    """Counted from the start of the process, from 1."""
    once: str | None = None
    """A file that notes the trouble made, so that none is made again; None: the first is, at every start."""
    grace: float | None = None
    """Of the watchdog, seconds; None: its own."""

    def begin_window(self, model: Any, batches: Any, phase: Any, here: Any) -> Any:
        # An evaluation's window, and preflight's, is of one rank alone.
        if here.store is not None and here.world_size == torch.distributed.get_world_size():
            time.sleep(self.pause)
            watchdog.GRACE = self.grace or watchdog.GRACE
            windows.append(1)
            if here.rank == self.on_rank and len(windows) == self.at_window:
                make_trouble(self._due())
        return super().begin_window(model, batches, phase, here)

    def _due(self) -> str:
        if self.once is None:
            return self.trouble.partition(" ")[0]
        with Path(self.once).open("a+") as file:
            file.seek(0)
            due = "".join(self.trouble.split()[len(file.readlines()) :][:1])
            file.write(f"{due}\n")
        return due


windows: list[int] = []


def make_trouble(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "hang":
        while True:
            time.sleep(1)
    elif kind == "raise":
        raise ArithmeticError("one apple too many")


TROUBLED = f"{Troubled.__module__}.{Troubled.__qualname__}"
