"""gdyn evaluate: score a run's checkpoint on other data directories, each number computed once over the whole set."""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script: this folder on the path would shadow other packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from typing import Any

from jsonargparse import ArgumentParser

from gdyn.cli import guarded
from gdyn.inference import load_run
from gdyn.report import number
from gdyn.rundir import write_json


def parser() -> ArgumentParser:
    result = ArgumentParser(prog="gdyn evaluate", description=__doc__, exit_on_error=False)
    result.add_argument("run_dir", type=Path, help="folder of a training run")
    result.add_argument("--data", action="append", required=True, help="a data directory; repeat to pool several")
    result.add_argument("--json", type=Path, help="also write the result to this file")
    result.add_argument("--checkpoint", default="best", help="best, latest, or a tag such as p1-vamp1-e0015")
    return result


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 if the user can mend it."""

    def command() -> None:
        options = parser().parse_args(argv)
        run = load_run(options.run_dir, options.checkpoint)
        result = run.engine.evaluate(run, options.data)
        print(outline(result))
        if options.json is not None:
            write_json(options.json, result)

    return guarded(command)


def outline(result: dict[str, Any]) -> str:
    """One line per number; scores do not include the constant singular function."""
    times = result["timescales"]
    shown = {
        "checkpoint": result["checkpoint"],
        "VAMP-1": f"{result['vamp1']:.6f}",
        "VAMP-2": f"{result['vamp2']:.6f}",
        "VAMP-E": f"{result['vampe']:.6f}",
        "singular values": "  ".join(f"{value:.6f}" for value in result["singular_values"]),
        f"timescales ({times['unit']}, lag {number(times['lag'])})": "  ".join(
            "—" if value is None else number(value, 4) for value in times["values"]
        ),
        "effective rank": result["effective_rank"],
    }
    width = max(map(len, shown))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())


if __name__ == "__main__":
    sys.exit(main())
