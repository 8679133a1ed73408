"""A job worked out, written into its run folder and handed to the scheduler: all of it or nothing."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gdyn import schedulers
from gdyn.errors import UserError
from gdyn.jobs import Job, Request
from gdyn.rundir import RunDir, git_commit, read_json, write_json
from gdyn.schedulers import Scheduler


def refuse_if_alive(run_dir: RunDir) -> None:
    """Raises: UserError if jobs of an earlier submission for this run folder still wait or run."""
    before = _submission(run_dir)
    jobs = [str(job) for job in before.get("jobs", [])]
    alive = schedulers.named(before["scheduler"]).queued(jobs) if jobs else []
    if alive:
        raise UserError(
            f"{', '.join(alive)} of {before['time']} still wait or run in {run_dir.path}, and two jobs must not train "
            "in one folder; cancel them, wait, or choose another folder with --set run_dir=..."
        )


def write(job: Job) -> Path:
    """Make the job folder, whole or not at all, and return the script in it. An earlier one becomes job.1, job.2, ...

    Raises: UserError if it cannot be written.
    """
    run_dir = job.run_dir
    partial = run_dir.path / f".job.{os.getpid()}.partial"
    files = {**job.files, job.script_name: job.script}
    try:
        partial.mkdir(parents=True)
        for name, text in files.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(text)
        write_json(partial / "submission.json", _facts(job))
        _set_aside(run_dir)
        partial.rename(run_dir.job)
    except OSError as error:
        raise UserError(f"{run_dir.job} cannot be written ({error.strerror}); nothing was submitted.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return run_dir.job / job.script_name


def hand_in(job: Job, script: Path, scheduler: Scheduler) -> list[str]:
    """Submit the script, with its successors if it is a chain; note the ids in submission.json, and return them.

    Raises: UserError with the scheduler's words; what had been submitted is cancelled then.
    """
    jobs: list[str] = []
    try:
        for _ in range(job.request.chain):
            jobs.append(scheduler.submit(script, jobs[-1] if jobs else None))
            note_jobs(job.run_dir, jobs)  # at once: the first may run before the last is submitted
    except UserError as error:
        note_jobs(job.run_dir, [])
        left = _cancel(scheduler, jobs)
        raise UserError(f"{script} was written but not submitted: {error}{left}") from None
    return jobs


def _cancel(scheduler: Scheduler, jobs: Sequence[str]) -> str:
    """What the user has to do if the jobs could not be cancelled, as a sentence."""
    try:
        scheduler.cancel(jobs)
    except UserError as error:
        return f" Cancel {', '.join(jobs)} yourself, which failed, too: {error}"
    return ""


def note_jobs(run_dir: RunDir, jobs: Sequence[str]) -> None:
    """Keep the ids where the next submission and the jobs themselves look for them; none: as if never submitted."""
    facts = _submission(run_dir)
    facts.pop("jobs", None)
    write_json(run_dir.job / "submission.json", facts | ({"jobs": list(jobs)} if jobs else {}))


def _facts(job: Job) -> dict[str, Any]:
    request = {item.name: getattr(job.request, item.name) for item in dataclasses.fields(Request)}
    del request["site"]
    return {
        "time": time.strftime("%FT%T%z"),
        "site": job.request.site.name,
        "scheduler": job.request.site.scheduler,
        "git_commit": git_commit(),
        "command": sys.argv,
        "script": job.script_name,
        "members": list(job.members),
        "request": {name: str(value) if isinstance(value, Path) else value for name, value in request.items()},
    }


def _submission(run_dir: RunDir) -> dict[str, Any]:
    """What submission.json says; empty if nothing was ever submitted."""
    path = run_dir.job / "submission.json"
    return read_json(path) if path.exists() else {}


def _set_aside(run_dir: RunDir) -> None:
    """Make room for a new job folder; what has run is kept, with its logs."""
    folder = run_dir.job
    if not folder.exists():
        return
    if not _submission(run_dir).get("jobs") and not (folder / "attempts.jsonl").exists():
        shutil.rmtree(folder)
        return
    number = 1
    while folder.with_name(f"{folder.name}.{number}").exists():
        number += 1
    folder.rename(folder.with_name(f"{folder.name}.{number}"))
