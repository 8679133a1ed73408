"""The `gdyn` command and what all programs share: exit codes, logging, the verdict file."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gdyn import rundir
from gdyn.errors import UserError
from gdyn.rundir import RunDir

if TYPE_CHECKING:
    from gdyn.ranks import RankContext

COMMANDS = {
    "train": "train an engine, or resume",
    "analyze": "what a run learned: tables, figures, one HTML report",
    "evaluate": "score a run's best checkpoint on other data",
    "prepare": "raw trajectories to an engine's data files",
    "export": "weights and a stand-alone predictor",
}


def main(argv: list[str] | None = None) -> int:
    """`gdyn COMMAND ...`: the same programs as launch/COMMAND.py."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return int(importlib.import_module(f"launch.{argv[0]}").main(argv[1:]))
    usage = "usage: gdyn COMMAND ...\n\n" + "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
    if argv and argv[0] in ("-h", "--help"):
        sys.stdout.write(usage + "\n\ngdyn COMMAND --help explains each.\n")
        return rundir.DONE
    if argv and argv[0] == "--version":
        sys.stdout.write(f"gdyn {rundir.versions()['gdyn']}\n")
        return rundir.DONE
    sys.stderr.write((f'gdyn: unknown command "{argv[0]}".\n' if argv else "") + usage + "\n")
    return rundir.USER_ERROR


def guarded(program: Callable[[], int | None]) -> int:
    """Run a program; a user's mistake becomes one message on standard error and exit code 2, without a traceback."""
    try:
        return program() or rundir.DONE
    except ArgumentError as error:
        sys.stderr.write(f"gdyn: {' '.join(str(error).split())}; see --help.\n")
        return rundir.USER_ERROR
    except (UserError, FileNotFoundError, PermissionError) as error:
        if not _repeats(error):
            sys.stderr.write(f"gdyn: {error}\n")
        return rundir.USER_ERROR


def _repeats(error: BaseException) -> bool:
    """Whether rank 0 prints this very message, too."""
    from gdyn import ranks

    return isinstance(error, ranks.AgreedError) and bool(ranks.discover(os.environ).rank)


def start_logging(main: bool) -> None:
    """Sentences on standard error: INFO from rank 0, errors from the others."""
    from gdyn.progress import ConsoleHandler

    log = logging.getLogger("gdyn")
    log.handlers.clear()
    handler = ConsoleHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if main else logging.ERROR)
    log.propagate = False
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    # Its lines are about itself, several hundred a run.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def log_to(path: Path) -> None:
    """Also write the log, with times, to the run's own file."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.getLogger("gdyn").addHandler(handler)


@dataclass
class Verdict:
    """How a run ended; `verdict` writes it."""

    code: int = rundir.FAILED
    reason: str = ""


@contextmanager
def verdict(run_dir: RunDir, here: RankContext) -> Iterator[Verdict]:
    """Run the block and write status.json, whatever happens, because launchers lose exit codes."""
    result = Verdict()
    try:
        yield result
    except UserError as error:
        result.code, result.reason = rundir.USER_ERROR, str(error)
        raise
    except BaseException as error:
        result.code, result.reason = rundir.FAILED, f"{type(error).__name__}: {error}"
        raise
    finally:
        if here.main and run_dir.path.is_dir() and os.access(run_dir.path, os.W_OK):
            run_dir.write_status(result.code, result.reason)
