"""RunDir: the folder of one run, every path in it, and its provenance. Standard library only."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from gdyn.errors import MissingFile, UserError

log = logging.getLogger("gdyn")

DONE, FAILED, USER_ERROR, HUNG, STOPPED = 0, 1, 2, 71, 75
"""Exit codes of every program: finished; unforeseen failure; the user can mend it; no progress, the stacks are in the
log; stopped early with a checkpoint, start me again."""
STATES = {DONE: "done", FAILED: "failed", USER_ERROR: "user_error", HUNG: "hung", STOPPED: "stopped"}
RUNNING = "running"


def write_json(path: Path, content: Any) -> None:
    """Write and rename, so that a reader sees the old file or the new one, never half of one."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Like `write_json`, for text."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def create_json(path: Path, content: Any) -> bool:
    """Write a file that is not there yet; of several processes that try, one succeeds. Whether this one did."""
    partial = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.partial")
    write_json(partial, content)
    try:
        os.link(partial, path)
        return True
    except FileExistsError:
        return False
    finally:
        partial.unlink()


def read_json(path: Path) -> Any:
    """Raises: MissingFile, UserError (naming the file) where it is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise MissingFile(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore or remove it.") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s has a damaged line, which is skipped.", path)
    return records


@dataclass(frozen=True)
class RunDir:
    """Where things of one run go. Nothing else composes these paths."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).absolute())

    @property
    def run_yaml(self) -> Path:
        return self.path / "run.yaml"

    @property
    def deepspeed_json(self) -> Path:
        return self.path / "deepspeed.json"

    @property
    def provenance_json(self) -> Path:
        return self.path / "provenance.json"

    @property
    def metrics_jsonl(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary_json(self) -> Path:
        return self.path / "summary.json"

    @property
    def status_json(self) -> Path:
        return self.path / "status.json"

    @property
    def job(self) -> Path:
        """What `gdyn submit` made: the script, the run file and the DeepSpeed JSON as they were then."""
        return self.path / "job"

    @property
    def heartbeat_json(self) -> Path:
        """Where the run is, a few seconds old while it lives."""
        return self.path / "heartbeat.json"

    @property
    def failure_json(self) -> Path:
        """The rank that failed first in the last start, and how. Absent if none did."""
        return self.path / "failure.json"

    @property
    def preflight_json(self) -> Path:
        return self.path / "preflight.json"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def losses(self) -> Path:
        """Loss curves, one PNG a phase."""
        return self.path / "losses"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions"

    @property
    def analysis(self) -> Path:
        return self.path / "analysis"

    @property
    def report_html(self) -> Path:
        return self.analysis / "report.html"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def create(self) -> None:
        """Make the folder and prove that it can be written. Rank 0 calls this.

        Raises: UserError naming the folder if it cannot be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"run_dir {self.path} cannot be written ({error.strerror}); give another --run_dir."
            ) from None

    def existing(self) -> RunDir:
        """Raises: MissingFile if no run was ever made here."""
        if not self.run_yaml.is_file():
            raise MissingFile(
                f"{self.path} is not a run folder: it has no run.yaml; give the --run_dir of a training run."
            )
        return self

    def write_status(self, code: int | None, reason: str) -> None:
        """The verdict in a file, because launchers lose exit codes. `state` is a word for scripts: running (code None),
        done, failed, user_error, hung, stopped."""
        state = RUNNING if code is None else STATES[code]
        write_json(
            self.status_json, {"exit_code": code, "state": state, "reason": reason, "time": time.strftime("%FT%T%z")}
        )

    def begin_start(self, launch: Mapping[str, Any]) -> None:
        """Append how this start was made (commit, versions, host, launcher facts in `launch`) to the run's history, and
        clear what the last one left. Rank 0 calls this."""
        self.failure_json.unlink(missing_ok=True)
        self.write_status(None, "")
        start = {
            "time": time.strftime("%FT%T%z"),
            "command": sys.argv,
            "git_commit": git_commit(),
            "host": platform.node(),
            "python": platform.python_version(),
            "versions": versions(),
            **launch,
        }
        write_json(self.provenance_json, [*self.starts(), start])

    def amend_start(self, facts: Mapping[str, Any]) -> None:
        """Add what has become known of the present start. Rank 0 calls this."""
        starts = self.starts()
        if starts:
            write_json(self.provenance_json, [*starts[:-1], starts[-1] | dict(facts)])

    def starts(self) -> list[dict[str, Any]]:
        """Every start of this run, oldest first."""
        return list(read_json(self.provenance_json)) if self.provenance_json.exists() else []


def git_commit() -> str:
    """The commit of the code that runs, with "+changes" if the tree was edited; empty outside a git checkout."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        try:
            return subprocess.run(
                ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=5
            ).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    commit = git("rev-parse", "HEAD")
    return commit + "+changes" if commit and git("status", "--porcelain", "--untracked-files=no") else commit


def versions() -> dict[str, str]:
    """Installed versions of what a result may depend on."""
    found = {}
    for name in ("gdyn", "torch", "deepspeed", "torch-geometric", "mpi4py", "numpy", "jsonargparse"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found
