"""Attempts: what a run's files say of its starts, while the ranks run and afterwards. Standard library only."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gdyn import rundir
from gdyn.errors import UserError
from gdyn.rundir import DONE, FAILED, RUNNING, STATES, STOPPED, RunDir

SILENCE = 120.0
"""Seconds without a heartbeat after which rank 0 counts as lost."""
LEAVING = 30.0
"""Seconds from the first rank's failure, or the run's verdict, to the end of all."""


@dataclass(frozen=True)
class Attempt:
    """One start of the ranks and how it ended; a line of attempts.jsonl."""

    job: str
    nodes: list[str]
    began: float
    ended: float
    code: int
    """As in gdyn.rundir: what the run's own files say; the launcher's where they say nothing."""
    reason: str
    signature: str = ""
    """Equal for the same failure again."""
    blamed: list[str] = field(default_factory=list)
    """Nodes to do without from now on, if preflight said so."""
    node: str = ""
    """Where the failure was."""
    checkpoint: str = ""
    """The newest when it ended."""
    final: str = ""
    """Why no other attempt is to follow, in no job; empty: one may."""

    @property
    def exit_code(self) -> int:
        """Of the job that it ends for good."""
        return FAILED if self.code == STOPPED else self.code


class Signs:
    """The ranks' signs of life during one attempt, as the run's files show them."""

    def __init__(self, run_dir: RunDir):
        self.run_dir = run_dir
        self.state = RUNNING
        self.beat = 0.0
        """When rank 0 last said that it lives, by its own clock; 0: not yet."""
        self.heard = time.monotonic()
        """When it was seen to have said so, by ours: the clocks of two nodes may differ."""
        self.over: float | None = None
        """When there was first nothing left to do but to leave."""

    def look(self) -> None:
        now = time.monotonic()
        self.state = read(self.run_dir.status_json).get("state", RUNNING)
        beat = read(self.run_dir.heartbeat_json).get("time", self.beat)
        if beat != self.beat:
            self.beat, self.heard = beat, now
        # A run that is done may still be making its report.
        if self.over is None and (self.run_dir.failure_json.exists() or self.state not in (RUNNING, STATES[DONE])):
            self.over = now

    def problem(self, start_timeout: float) -> str:
        """Why the ranks have to be ended; empty: they need not."""
        now = time.monotonic()
        if self.over is not None:
            late = now > self.over + LEAVING
            return f"a rank has failed or all have stopped, and {LEAVING:.0f} s later not all have gone" if late else ""
        patience = SILENCE if self.beat else start_timeout
        if self.state == RUNNING and now > self.heard + patience:
            return f"no sign of life from rank 0 for {patience:.0f} s"
        return ""


def read_all(run_dir: RunDir) -> list[Attempt]:
    """Every attempt of every job of this run, oldest first."""
    return [Attempt(**entry) for entry in rundir.read_metrics(_history(run_dir))]


def _history(run_dir: RunDir) -> Path:
    return run_dir.job / "attempts.jsonl"


def remember(run_dir: RunDir, attempt: Attempt) -> None:
    attempts = [*read_all(run_dir), attempt]
    rundir.write_text(_history(run_dir), "".join(f"{json.dumps(asdict(entry))}\n" for entry in attempts))


def earlier_verdict(run_dir: RunDir, job: str) -> Attempt | None:
    """The attempt with which a predecessor in the chain has ended the run for good."""
    history, chain = read_all(run_dir), _chain(run_dir)
    before = chain[: chain.index(job)] if job in chain else []
    return history[-1] if history and history[-1].job in before and history[-1].final else None


def _chain(run_dir: RunDir) -> list[str]:
    return [str(job) for job in read(run_dir.job / "submission.json").get("jobs", [])]


def successors(run_dir: RunDir, job: str) -> list[str]:
    chain = _chain(run_dir)
    return chain[chain.index(job) + 1 :] if job in chain else []


def last_heard(run_dir: RunDir) -> str:
    """What rank 0 was doing when it last said so, a few seconds before the end."""
    beat = read(run_dir.heartbeat_json)
    if not beat:
        return "before the first heartbeat"
    return f"rank 0 on {beat['node']} was last heard at {beat['stage']}, phase {beat['phase']}, step {beat['step']}"


def newest_checkpoint(run_dir: RunDir) -> str:
    path = run_dir.checkpoints / "latest"
    return path.read_text().strip() if path.exists() else ""


def blamed(run_dir: RunDir, earlier: float) -> list[str]:
    """Nodes that preflight blames; `earlier`: when its file had been written before this attempt."""
    path = run_dir.preflight_json
    return [str(node) for node in read(path).get("blamed", [])] if modified(path) != earlier else []


def modified(path: Path) -> float:
    """0: it is not there."""
    return path.stat().st_mtime if path.exists() else 0.0


def micro_batches(run_dir: RunDir) -> int | None:
    """Of a window, on all ranks together, at the last start; None: there was none."""
    starts, ds_json = run_dir.starts(), read(run_dir.deepspeed_json)
    return int(ds_json["gradient_accumulation_steps"] * starts[-1]["world_size"]) if starts and ds_json else None


def read(path: Path) -> dict[str, Any]:
    """A JSON file that may be absent, or be replaced while it is read over a network."""
    try:
        return dict(rundir.read_json(path))
    except (UserError, OSError):
        return {}
