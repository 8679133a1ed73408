"""Schedulers: hand in a script, ask about jobs and nodes. One adapter per scheduler. Standard library only.

Every call to an outside program ends in bounded time. What changes something (submit, cancel, requeue) raises UserError
where it fails; what only asks (end_time, nodes_down) answers None, because a job must not die of a slow scheduler.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any, Literal, Protocol

from gdyn.errors import MissingFile, UserError

TIMEOUT_S = 60.0  # a busy slurmctld answers late; beyond this it does not


class Scheduler(Protocol):
    """What is asked of a scheduler, on a login node and inside a job. `environ`: os.environ, or a recorded one."""

    @property
    def name(self) -> Literal["slurm", "pbs", "none"]: ...

    def submit(self, script: Path, dependency: str | None = None) -> str:
        """Queue the script, to start once the job `dependency` has ended in whatever way. Returns the job's id.

        Raises: UserError with the scheduler's own words.
        """
        ...

    def queued(self, ids: Sequence[str]) -> list[str]:
        """Those of the jobs that still wait or run. Raises: UserError if the scheduler does not answer."""
        ...

    def cancel(self, ids: Sequence[str]) -> None:
        """End the jobs; one that has already ended is no error. Raises: UserError."""
        ...

    def requeue(self, job: str) -> None:
        """Put the running job back into the queue, which ends it here. Raises: UserError."""
        ...

    def job_id(self, environ: Mapping[str, str]) -> str | None:
        """The job this process belongs to; None outside one."""
        ...

    def end_time(self, environ: Mapping[str, str]) -> float | None:
        """When the wall time ends, in seconds since the epoch; None if not known."""
        ...

    def node_names(self, environ: Mapping[str, str]) -> list[str]:
        """The job's nodes, in the scheduler's order, each once. Raises: UserError where they are not said."""
        ...

    def nodes_down(self, names: Iterable[str], job: str) -> set[str] | None:
        """Those of the job's nodes that the scheduler has given up; None if it does not answer."""
        ...

    def address(self, name: str) -> str | None:
        """Where a node is reached, for one whose name does not resolve; None if that is not known."""
        ...


def named(name: str) -> Scheduler:
    """The adapter of a site's `scheduler` fact. Raises: UserError."""
    found: dict[str, Scheduler] = {"slurm": Slurm(), "pbs": Pbs(), "none": NoScheduler()}
    if name not in found:
        raise UserError(f'unknown scheduler "{name}"; known: {", ".join(found)}.')
    return found[name]


def around(environ: Mapping[str, str]) -> Scheduler:
    """The scheduler whose job this process belongs to."""
    candidates: list[Scheduler] = [Slurm(), Pbs()]
    return next((scheduler for scheduler in candidates if scheduler.job_id(environ)), NoScheduler())


@dataclass(frozen=True)
class Slurm:
    name: Literal["slurm"] = "slurm"

    def submit(self, script: Path, dependency: str | None = None) -> str:
        # afterany: a job that was killed, too, has left a checkpoint for its successor.
        chain = [f"--dependency=afterany:{dependency}"] if dependency else []
        # "123" or "123;cluster", after whatever a site's wrapper likes to say
        answer = _run("sbatch", "--parsable", *chain, str(script)).split()
        job = answer[-1].split(";")[0] if answer else ""
        if not job.isdecimal():
            raise UserError(f'sbatch answered "{" ".join(answer)}"; expected a job id.')
        return job

    def queued(self, ids: Sequence[str]) -> list[str]:
        # Not -j: it fails for a job that has long ended. %F: the id that all jobs of an array share.
        alive = set(_run("squeue", "--noheader", "--me", "--format=%i %F").split()) if ids else set()
        return [job for job in ids if job in alive]

    def cancel(self, ids: Sequence[str]) -> None:
        if ids:
            _run("scancel", *ids)

    def requeue(self, job: str) -> None:
        _run("scontrol", "requeue", job)

    def job_id(self, environ: Mapping[str, str]) -> str | None:
        return environ.get("SLURM_JOB_ID")

    def end_time(self, environ: Mapping[str, str]) -> float | None:
        told = environ.get("SLURM_JOB_END_TIME", "")  # absent in Slurm 22.05
        if told.isdecimal():
            return float(told)
        job = self.job_id(environ)
        answer = _ask("squeue", "--noheader", f"--jobs={job}", "--format=%e") if job else None
        try:
            return datetime.fromisoformat((answer or "").strip()).timestamp()  # the cluster's local time
        except ValueError:  # no answer, or "N/A" for a job without a limit
            return None

    def node_names(self, environ: Mapping[str, str]) -> list[str]:
        text = environ.get("SLURM_JOB_NODELIST", "")
        if not text:
            raise UserError("SLURM_JOB_NODELIST is not set: this is no Slurm job; submit the script with sbatch.")
        return expand(text)

    def nodes_down(self, names: Iterable[str], job: str) -> set[str] | None:
        # A node that was down is lost to the job (--no-kill), even if it is up again.
        kept = _ask("squeue", "--noheader", f"--jobs={job}", "--format=%N")
        lost = set(names) - set(expand(kept)) if kept and kept.strip() else set()
        # All nodes, because thousands of names do not fit into one command. "*" marks one that does not respond.
        answer = _ask("sinfo", "--noheader", "--Node", "--format=%N %T")
        if answer is None:
            return None
        states = dict(line.split()[:2] for line in answer.splitlines() if len(line.split()) >= 2)
        bad = re.compile(r"down|fail|error|unk|powered_down|.*\*$", re.IGNORECASE)
        return lost | {name for name in names if bad.match(states.get(name, ""))}

    def address(self, name: str) -> str | None:
        found = re.search(r"\bNodeAddr=(\S+)", _ask("scontrol", "show", "node", name) or "")
        return found[1] if found else None


@dataclass(frozen=True)
class Pbs:
    """PBS Professional and OpenPBS."""

    name: Literal["pbs"] = "pbs"

    def submit(self, script: Path, dependency: str | None = None) -> str:
        chain = ["-W", f"depend=afterany:{dependency}"] if dependency else []
        answer = _run("qsub", *chain, str(script)).split()
        if not answer or not re.fullmatch(r"\d+(\[\])?(\.[\w.-]+)?", answer[-1]):
            raise UserError(f'qsub answered "{" ".join(answer)}"; expected a job id.')
        return answer[-1]

    def queued(self, ids: Sequence[str]) -> list[str]:
        # Without ids, because qstat fails for those that have ended.
        jobs = json.loads(_run("qstat", "-f", "-F", "json") or "{}").get("Jobs", {}) if ids else {}
        alive = {_number(job) for job, facts in jobs.items() if facts.get("job_state") not in ("F", "X")}
        return [job for job in ids if _number(job) in alive]

    def cancel(self, ids: Sequence[str]) -> None:
        alive = self.queued(ids)
        if alive:
            _run("qdel", *alive)

    def requeue(self, job: str) -> None:
        raise UserError("a PBS user cannot requeue a job (qrerun needs privileges); submit a chain: --chain N.")

    def job_id(self, environ: Mapping[str, str]) -> str | None:
        return environ.get("PBS_JOBID")

    def end_time(self, environ: Mapping[str, str]) -> float | None:
        job = self.job_id(environ)
        answer = _ask("qstat", "-f", "-F", "json", job) if job else None
        try:
            facts: dict[str, Any] = next(iter(json.loads(answer or "{}").get("Jobs", {}).values()), {})
            limit = facts["Resource_List"]["walltime"]
            used = facts.get("resources_used", {}).get("walltime", "0")  # a job that has just begun has used none
            return time.time() + _seconds(limit) - _seconds(used)
        except (json.JSONDecodeError, KeyError, ValueError):
            return None

    def node_names(self, environ: Mapping[str, str]) -> list[str]:
        path = environ.get("PBS_NODEFILE", "")
        if not path:
            raise UserError("PBS_NODEFILE is not set: this is no PBS job; submit the script with qsub.")
        return read_hosts(Path(path))

    def nodes_down(self, names: Iterable[str], job: str) -> set[str] | None:
        answer = _ask("pbsnodes", "-l")
        if answer is None:
            return None
        bad = {line.split()[0].partition(".")[0] for line in answer.splitlines() if line.split()}
        return {name for name in names if name.partition(".")[0] in bad}

    def address(self, name: str) -> str | None:
        return None


@dataclass(frozen=True)
class NoScheduler:
    """This machine, or hosts reached by ssh. A job is a process here, and its id the process's."""

    name: Literal["none"] = "none"

    def submit(self, script: Path, dependency: str | None = None) -> str:
        raise UserError(f"there is no scheduler here to queue anything; start it: bash {script}")

    def queued(self, ids: Sequence[str]) -> list[str]:
        return [job for job in ids if _is_ours(job)]

    def cancel(self, ids: Sequence[str]) -> None:
        for job in self.queued(ids):
            os.kill(int(job), signal.SIGTERM)

    def requeue(self, job: str) -> None:
        raise UserError("there is no scheduler here to requeue anything; start the script again.")

    def job_id(self, environ: Mapping[str, str]) -> str | None:
        return None

    def end_time(self, environ: Mapping[str, str]) -> float | None:
        told = environ.get("GDYN_END_TIME", "")
        return float(told) if told.isdecimal() else None

    def node_names(self, environ: Mapping[str, str]) -> list[str]:
        path = environ.get("GDYN_HOSTFILE", "")
        return read_hosts(Path(path)) if path else ["localhost"]

    def nodes_down(self, names: Iterable[str], job: str) -> set[str] | None:
        return None

    def address(self, name: str) -> str | None:
        return None


# Node lists


def expand(text: str) -> list[str]:
    """The names in a Slurm node list such as "n[01-03,7],m1" or "r[1-2]n[1-2]". Raises: UserError."""
    return [name for part in _split(text.strip()) for name in _expand_one(part)]


def read_hosts(path: Path) -> list[str]:
    """The hosts of a host file, each once: the first word of a line, without ":slots". Raises: UserError."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise MissingFile(f"host file {path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"host file {path} cannot be read ({error}).") from None
    words = [line.split("#")[0].split() for line in lines]
    hosts = list(dict.fromkeys(word[0].split(":")[0] for word in words if word))
    if not hosts:
        raise UserError(f"host file {path} names no host; write one per line.")
    return hosts


def _split(text: str) -> Iterator[str]:
    """At the commas outside brackets."""
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if ",".join(parts) != text or not parts:
        raise UserError(f'node list "{text}" cannot be understood; expected something like n[01-03,7],m1.')
    return iter(parts)


def _expand_one(part: str) -> Iterator[str]:
    pieces = [
        list(_numbers(piece[1:-1])) if piece.startswith("[") else [piece]
        for piece in re.findall(r"\[[^\]]*\]|[^\[]+", part)
    ]
    return ("".join(choice) for choice in product(*pieces))


def _numbers(text: str) -> Iterator[str]:
    """ "01-03,7" -> 01, 02, 03, 7: as wide as the first number is written."""
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if not match:
            raise UserError(f'"[{text}]" in a node list cannot be understood; expected numbers and ranges.')
        first, last = match[1], match[2] or match[1]
        yield from (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))


# Programs


def _run(*command: str) -> str:
    """Standard output. Raises: UserError with the program's own words if it is absent, fails or does not answer."""
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]} is not on PATH; is this a login node of that machine?")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} has not answered within {TIMEOUT_S:.0f} s; try again later.") from None
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started ({error}).") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or "without a word"
        raise UserError(f"{command[0]} failed with exit code {done.returncode}: {said}")
    return done.stdout


def _ask(*command: str) -> str | None:
    """Standard output, or None if the program is absent, fails or does not answer."""
    try:
        return _run(*command)
    except UserError:
        return None


def _number(job: str) -> str:
    """PBS: "123.server" or "123[].server" -> "123"."""
    return re.split(r"[.\[]", job)[0]


def _seconds(text: str) -> int:
    """PBS: "12:34:56" -> seconds."""
    total = 0
    for part in text.split(":"):
        total = total * 60 + int(part)
    return total


def _is_ours(job: str) -> bool:
    """Whether another process of that id lives and is a job of this project: ids are used again."""
    try:
        words = Path(f"/proc/{int(job)}/cmdline").read_bytes()
    except (OSError, ValueError):
        return False
    return int(job) != os.getpid() and any(word in words for word in (b"supervise", b"/job/job.", b"submit"))
