"""Reasons to stop early on this rank: a signal, or the end of the wall time. Pure standard library.

Handlers only take a note. Acting on it is the trainer's, which asks before each piece of work, and agrees with the
other ranks, because most launchers do not deliver a signal to every rank. `launch/train.py` enters this before anything
is imported that takes time: a process without a handler is killed by the very signal that was to save its work.
"""

import signal
from collections.abc import Callable
from types import FrameType

# TERM: schedulers, torchrun. INT: Ctrl-C. USR1, USR2: Slurm's --signal; USR2 where NCCL catches USR1.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

_Handler = Callable[[int, FrameType | None], object] | int | None


class StopRequest:
    """Context manager that notes the first reason to stop in `reason` (None: go on).

    deadline: time.monotonic() by which the process must have ended, or None; it may be set later. Main thread only, as
    signals are.
    A second Ctrl-C raises KeyboardInterrupt, for those who do not want to wait for the checkpoint.
    """

    def __init__(self, deadline: float | None = None):
        self.deadline = deadline
        self.reason: str | None = None
        self._interrupted = False
        self._previous: dict[signal.Signals, _Handler] = {}

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def due(self, now: float, seconds_needed: float) -> bool:
        """Whether to stop now. seconds_needed: what one more window and a checkpoint have been measured to take."""
        if self.reason is None and self.deadline is not None and now + seconds_needed > self.deadline:
            left = max(0.0, self.deadline - now)
            self.reason = f"wall time: {left:.0f} s left, {seconds_needed:.0f} s needed for a window and a checkpoint"
        return self.reason is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.reason = self.reason or f"{signal.Signals(number).name} received"
