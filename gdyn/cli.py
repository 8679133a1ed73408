"""The `gdyn` command and what all programs share: exit codes, logging."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path

from gdyn import rundir
from gdyn.errors import UserError

COMMANDS = {
    "submit": "make and submit a job script for a machine; --plan what it will cost",
    "train": "train an engine, or resume",
    "analyze": "what a run learned: tables, figures, one HTML report",
    "evaluate": "score a run's best checkpoint on other data",
    "encode": "protein structures as strings over a run's alphabet",
    "sample": "new ligands for protein pockets, and how good they are",
    "prepare": "raw data to an engine's data files",
    "export": "weights and a stand-alone predictor",
    "compare": "runs side by side: scores, differences, throughput, cost",
    "preflight": "is this job healthy, before it spends its node-hours",
    "lint-job": "what is known to be wrong with a job script",
    "supervise": "what a job script starts: attempts, restarts, spare nodes, hand-over",
}


def main(argv: list[str] | None = None) -> int:
    """`gdyn COMMAND ...`: the same programs as launch/COMMAND.py."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return int(importlib.import_module(f"launch.{argv[0].replace('-', '_')}").main(argv[1:]))
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
