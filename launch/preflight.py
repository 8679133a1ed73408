"""gdyn preflight: is this job healthy, before it spends its node-hours? Start it as the training, on the same nodes.

srun gdyn preflight --config run.yaml      (or mpirun, torchrun, deepspeed; launch/preflight.py is the same)
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script: this folder on the path would shadow other packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
from argparse import ArgumentError
from typing import TYPE_CHECKING

from gdyn import cli, ranks
from gdyn.errors import UserError
from gdyn.rundir import RunDir
from gdyn.signals import StopRequest
from launch import train

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from gdyn.preflight.limits import Limits

log = logging.getLogger("gdyn")


def parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser
    from jsonargparse.typing import PositiveFloat

    result = ArgumentParser(
        prog="gdyn preflight",
        description="Is this job healthy? Every other option is one of gdyn train: --config run.yaml, and its keys.",
        exit_on_error=False,
    )
    result.add_argument(
        "--min_bandwidth", type=PositiveFloat, help="refuse less between nodes: GB/s per rank and direction"
    )
    return result


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 go, 2 no go or another mistake that the user can mend."""
    return cli.guarded(lambda: preflight(sys.argv[1:] if argv is None else argv))


def preflight(argv: list[str]) -> None:
    """Raises: UserError."""
    own, run = _split(argv)
    if {"--help", "-h"} & set(argv):
        parser().parse_args(["--help"])  # prints and exits
    with StopRequest() as stop, ranks.join() as here:
        cli.start_logging(here.main)
        log.info("%s", here.evidence)
        with here.together():
            limits, command = _limits(own), train.parse(run)
        trainer = train.prepare(command, RunDir(Path(command.config.run_dir)), here, stop)
        for notice in trainer.notices:
            log.warning("%s", notice)
        from gdyn.preflight import check

        check(trainer, limits)


def _limits(words: list[str]) -> Limits:
    """Raises: UserError."""
    from gdyn.preflight.limits import Limits

    try:
        floor = parser().parse_args(words).min_bandwidth
    except ArgumentError as error:
        raise UserError(f"{' '.join(str(error).split())}; see gdyn preflight --help.") from None
    return Limits() if floor is None else Limits(min_bandwidth=floor)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """(this program's own words, those of the run)."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--min_bandwidth=") else [word])]
    if "--min_bandwidth" not in words:
        return [], words
    i = words.index("--min_bandwidth")
    return words[i : i + 2], words[:i] + words[i + 2 :]


if __name__ == "__main__":
    sys.exit(main())
