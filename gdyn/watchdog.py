"""Watchdog: a thread that knows where its rank is, and ends a job that gets nowhere.

A rank that hangs makes all others wait in the next collective, where no launcher notices anything. So every rank
watches itself: after `limit` seconds without progress it writes its stack to the log; rank 0 finds out which ranks are
*not* waiting for others, and names them; then all leave with exit code 71, `limit` + GRACE seconds after the last
progress. A rank that holds Python's lock is ended by faulthandler's own thread, GRACE seconds later; one that is
stopped by its launcher, or by the supervisor, which sees that the others have failed.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from gdyn import failures
from gdyn.failures import Where
from gdyn.rundir import HUNG, RunDir, write_json

if TYPE_CHECKING:
    from gdyn.ranks import RankContext
    from gdyn.signals import StopRequest

log = logging.getLogger("gdyn")

GRACE = 15.0
"""Seconds between the first stack and the end of the process: for all ranks' stacks, and for NCCL's flight recorder."""
COLLECTIVES = 5.0
"""Seconds by which collectives outlive `limit`: the watchdog speaks first, NCCL writes its record, all leave."""
BEAT = 5.0
"""Seconds between two writings of heartbeat.json."""
SAVING = 10.0
"""Seconds after a SIGTERM without progress after which a rank shows its stack: it will be killed soon."""


class Watchdog:
    """Context manager around everything a rank does. `at` is called where there is progress; unstarted, it only notes.

    limit: seconds without progress after which the job has failed.
    """

    def __init__(self, here: RankContext, stop: StopRequest | None = None, limit: float = 600.0):
        self.here, self.stop, self.limit = here, stop, limit
        self.where, self.since = Where(), time.monotonic()
        self.run_dir: RunDir | None = None
        """Where heartbeat.json and failure.json go, once it is known."""
        self._thread: threading.Thread | None = None
        self._end = threading.Event()
        self._armed = self._beaten = 0.0
        self._shown = False

    def __enter__(self) -> Watchdog:
        self.since = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        self._arm()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        faulthandler.cancel_dump_traceback_later()

    def at(self, stage: str, phase: str = "", epoch: int = 0, step: int = 0) -> None:
        """There was progress, and this is what comes next. Costs microseconds."""
        self.where, self.since = Where(stage, phase, epoch, step), time.monotonic()
        if self.since > self._armed + 1:
            self._arm()

    @contextmanager
    def away(self, stage: str) -> Iterator[None]:
        """In the block there are no signs of progress, though there is progress: it is not watched."""
        self.at(stage)
        self.since = math.inf
        faulthandler.cancel_dump_traceback_later()
        yield
        self.at(stage)

    def limit_to(self, seconds: float) -> None:
        self.limit = seconds
        self.at(self.where.stage)
        self._arm()

    def _arm(self) -> None:
        """A thread outside Python, which needs no lock: it writes all stacks and ends the process."""
        self._armed = time.monotonic()
        if self._thread is not None and _has_descriptor(sys.stderr):
            faulthandler.dump_traceback_later(self.limit + 2 * GRACE, exit=True, file=sys.stderr)

    def _watch(self) -> None:
        while not self._end.wait(min(1.0, self.limit / 10)):
            now = time.monotonic()
            if now > self.since + self.limit:
                self._hang(now - self.since)
            if self.here.main and self.run_dir is not None and now > self._beaten + BEAT:
                self._beaten = now
                self._beat(self.run_dir)
            if not self._shown and now > self.since + SAVING and self._terminated():
                # In a collective that a dead rank will never join, nothing else tells where this rank was.
                self._shown = True
                failures.say(self.here, f"asked to stop, but no progress since\n{self._stack()}")

    def _terminated(self) -> bool:
        return self.stop is not None and self.stop.reason == f"{signal.SIGTERM.name} received"

    def _beat(self, run_dir: RunDir) -> None:
        try:
            content = {"time": time.time(), "pid": os.getpid(), "node": self.here.node, "limit": self.limit}
            write_json(run_dir.heartbeat_json, content | asdict(self.where))
        except OSError as error:  # a full disk is the trainer's to report, at the next checkpoint
            log.debug("no heartbeat: %s", error)

    def _stack(self) -> str:
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        return "".join(["at ", str(self.where), "\n", *traceback.format_stack(frame)])

    def _hang(self, idle: float) -> None:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        failures.say(self.here, f"no progress for {idle:.0f} s: {failures.place(frame)}\n{self._stack()}")
        deadline = time.monotonic() + GRACE
        try:
            self._name_the_guilty(failures.place(frame))
        except Exception as error:
            failures.say(self.here, f"cannot ask the other ranks ({error})")
        time.sleep(max(0.0, deadline - time.monotonic()))
        os._exit(HUNG)  # nothing else ends a process whose main thread is stuck

    def _name_the_guilty(self, mine: str) -> None:
        """Rank 0 hears what every rank is doing, and records those that do not wait for others. All ranks call this."""
        here, answers = self.here, [{"node": self.here.node, "what": mine}]
        if here.store is not None and here.world_size > 1:
            store = here.store.clone()  # type: ignore[attr-defined]  # the main thread may be waiting on the other one
            store.set_timeout(timedelta(seconds=GRACE / 3))
            store.set(f"hang/{here.rank}", json.dumps(answers[0]))
            if not here.main:
                return
            time.sleep(GRACE / 3)
            answers = [_answer(store, rank) for rank in range(here.world_size)]
        guilty = blamed([answer["what"] for answer in answers])
        sentences = [f"rank {rank} on {answers[rank]['node']} {answers[rank]['what']}" for rank in guilty]
        failures.say(here, f"the job hangs at {self.where}: {'; '.join(sentences[:8])}")
        if self.run_dir is not None and guilty:
            first = answers[guilty[0]]
            failures.record_hang(self.run_dir, guilty[0], first["node"], self.where, first["what"])


def blamed(answers: Sequence[str]) -> list[int]:
    """The ranks that do not wait for others; all of them if all do."""
    return [rank for rank, what in enumerate(answers) if not what.startswith("waits")] or list(range(len(answers)))


def _answer(store: Any, rank: int) -> dict[str, str]:
    if store.check([f"hang/{rank}"]):
        return dict(json.loads(store.get(f"hang/{rank}")))
    node = store.get(f"node/{rank}").decode()
    return {"node": node, "what": "does not answer: stopped, swapping, or its node is gone"}


def _has_descriptor(stream: Any) -> bool:
    try:
        return int(stream.fileno()) >= 0
    except (AttributeError, OSError, ValueError):  # replaced, as test runners do
        return False
