"""gdyn analyze: what a finished (or running) run learned: tables, figures, one HTML report."""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script: this folder on the path would shadow other packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from gdyn.cli import guarded
from gdyn.engine import Engine
from gdyn.errors import UserError
from gdyn.inference import load_run

OF_SOME_ENGINES = ("lags",)
"""Options that not every engine's report knows."""


def parser() -> ArgumentParser:
    result = ArgumentParser(prog="gdyn analyze", description=__doc__, exit_on_error=False)
    result.add_argument("run_dir", type=Path, help="folder of a training run")
    result.add_argument("--split", choices=["train", "validation", "test"], default="test", help="whose data")
    result.add_argument(
        "--lags", type=PositiveInt, nargs="+", help="Vamp: of the implied timescales, frames; default: about 20"
    )
    result.add_argument("--checkpoint", default="best", help="best, latest, or a tag such as p1-vamp1-e0015")
    return result


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 if the user can mend it."""

    def command() -> None:
        given = parser().parse_args(argv)
        run = load_run(given.run_dir, given.checkpoint)
        options = {name: given[name] for name in OF_SOME_ENGINES if given[name] is not None}
        refuse_foreign(options, run.engine)
        summary = run.engine.report(run, split=given.split, **options)
        print("\n".join(run.engine.report_lines(summary)))

    return guarded(command)


def refuse_foreign(options: dict[str, object], engine: Engine) -> None:
    """Raises: UserError naming the options that this engine's report does not know."""
    foreign = [f"--{name}" for name in options if name not in engine.report_options]
    if foreign:
        name = type(engine).__name__
        raise UserError(f"{', '.join(foreign)}: the report of {name} has no such option; leave it out.")


if __name__ == "__main__":
    sys.exit(main())
