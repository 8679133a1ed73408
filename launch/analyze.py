"""gdyn analyze: what a finished (or running) run learned: tables, figures, one HTML report."""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script: this folder on the path would shadow other packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from gdyn.cli import guarded
from gdyn.inference import load_run
from gdyn.report import number


def parser() -> ArgumentParser:
    result = ArgumentParser(prog="gdyn analyze", description=__doc__, exit_on_error=False)
    result.add_argument("run_dir", type=Path, help="folder of a training run")
    result.add_argument("--split", choices=["train", "validation", "test"], default="test", help="whose trajectories")
    result.add_argument(
        "--lags", type=PositiveInt, nargs="+", help="of the implied timescales, frames; default: about 20, log-spaced"
    )
    result.add_argument("--checkpoint", default="best", help="best, latest, or a tag such as p1-vamp1-e0015")
    return result


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 if the user can mend it."""

    def command() -> None:
        options = parser().parse_args(argv)
        run = load_run(options.run_dir, options.checkpoint)
        print(outline(run.engine.report(run, split=options.split, lags=options.lags)))

    return guarded(command)


def outline(summary: dict[str, Any]) -> str:
    """The short table of a report, for a terminal."""
    times, shares, lives = summary["timescales"], summary["populations"], summary["lifetimes"]
    lines = [f"{'process':>8} {'timescale':>12} {'95 % band':>22}   ({summary['unit']}, lag {number(summary['lag'])})"]
    for i, (value, lower, upper) in enumerate(_rows(times), 1):
        lines.append(f"{i:>8} {value:>12} {f'{lower} .. {upper}':>22}")
    lines += ["", f"{'state':>8} {'population':>12} {'95 % band':>22} {'lifetime':>12}"]
    for i, ((value, lower, upper), (life, *_)) in enumerate(zip(_rows(shares), _rows(lives), strict=True)):
        lines.append(f"{i:>8} {value:>12} {f'{lower} .. {upper}':>22} {life:>12}")
    lines += ["", *(f"warning: {sentence}" for sentence in summary["warnings"])]
    files = summary["files"]
    lines += [f"predictions  {path}" for path in files["predictions"]]
    return "\n".join([*lines, f"report       {files['report']}"])


def _rows(band: dict[str, Any]) -> list[list[str]]:
    """(value, lower, upper) of each entry, as text; a dash for what is not known."""
    columns = (band["values"], band["lower"], band["upper"])
    return [["—" if x is None else number(x) for x in row] for row in zip(*columns, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
