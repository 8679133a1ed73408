"""What a rank leaves behind when the run fails: where it stood, in the log, and the rank at fault, in failure.json.

The rank that fails first is the one to look at; the others only lose it. So an error of a rank's own is recorded at
once; after a lost connection a roll call shows which rank does not answer.
"""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from gdyn.errors import UserError
from gdyn.rendezvous import roll_call
from gdyn.rundir import RunDir, create_json, read_json, write_json

if TYPE_CHECKING:
    from gdyn.ranks import RankContext

# What gloo, NCCL, RCCL, xccl and MPI say when another process has gone.
_LOST = re.compile(
    r"peer|connection (was )?(closed|reset|refused)|broken pipe|read error|timed ?out|timeout|nccl|rccl|ccl|socket",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Where:
    """What a rank is doing: a stage of the run, and the next piece of work."""

    stage: str = "starting"
    phase: str = ""
    epoch: int = 0
    step: int = 0

    def __str__(self) -> str:
        return f"{self.stage}, phase {self.phase}, epoch {self.epoch}, step {self.step}" if self.phase else self.stage


@dataclass(frozen=True)
class Failure:
    """The first rank that failed, as failure.json tells it."""

    kind: Literal["error", "died", "hang"]
    """An exception of its own; gone without a word; alive, but getting nowhere."""
    rank: int | None
    """None: one of those that were lost, it is not known which."""
    node: str
    where: Where
    error: str
    """One line."""

    @property
    def signature(self) -> str:
        """Equal for two failures that are the same one again."""
        return f"{self.kind} at step {self.where.step}: {self.error}"

    def __str__(self) -> str:
        who = "another rank" if self.rank is None else f"rank {self.rank} on {self.node}"
        return f"{who} ({self.where}): {self.error}"


def report(run_dir: RunDir, here: RankContext, where: Where, error: BaseException) -> None:
    """Write this rank's stack to the log, and failure.json if no rank did so before. Every rank that fails calls this;
    it takes seconds if another rank was lost."""
    line = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    stack = "".join(traceback.format_exception(error))
    say(here, f"{line}\nat {where}\n{stack}")
    lost = here.world_size > 1 and isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))
    if not lost:
        _record(run_dir, Failure("error", here.rank, here.node, where, line))
        return
    # Now, because some launchers leave no time to find out which.
    _record(run_dir, Failure("died", None, "", where, "gone without a word"))
    assert here.store is not None
    missing = roll_call(here.store, here)
    if missing is None:
        missing = [(0, here.first_node)]
    if missing:
        rank, node = missing[0]
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        _record(run_dir, Failure("died", rank, node, where, f"gone without a word{others}"))


def say(here: RankContext, text: str) -> None:
    """To standard error in one piece, every line with its rank, so that the lines of many ranks can be told apart."""
    mark = f"[rank {here.rank} on {here.node}] "
    sys.stderr.flush()
    os.write(2, "".join(f"{mark}{line}\n" for line in text.rstrip().splitlines()).encode(errors="replace"))


def place(frame: FrameType | None) -> str:
    """One line on where a thread is: that it waits for the other ranks, or its innermost line of code."""
    stack = traceback.extract_stack(frame)
    for entry in reversed(stack[-15:]):
        if re.search(r"torch/distributed|deepspeed/comm", entry.filename):
            return f"waits for the other ranks in {entry.name}"
    entry = stack[-1]
    return f"is in {entry.name} ({Path(entry.filename).name}:{entry.lineno})"


def record_hang(run_dir: RunDir, rank: int, node: str, where: Where, what: str) -> None:
    _record(run_dir, Failure("hang", rank, node, where, what))


def read(run_dir: RunDir) -> Failure | None:
    """The failure of the last start, if a rank could still write one."""
    try:
        content = read_json(run_dir.failure_json)
        del content["time"]
        return Failure(**content | {"where": Where(**content["where"])})
    except (UserError, KeyError, TypeError):  # absent, or cut short by the same event
        return None


def _record(run_dir: RunDir, failure: Failure) -> None:
    """Write failure.json, unless a record is there that names a rank: the first to fail is nearest to the cause."""
    if not run_dir.path.is_dir():
        return
    content = {**asdict(failure), "time": time.time()}
    known = read(run_dir)
    if known is not None and known.rank is None and failure.rank is not None:
        write_json(run_dir.failure_json, content)
    else:
        create_json(run_dir.failure_json, content)
