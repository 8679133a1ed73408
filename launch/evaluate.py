"""gdyn evaluate: score a run's checkpoint on other data, each number computed once over the whole set."""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script: this folder on the path would shadow other packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jsonargparse import ArgumentParser

from gdyn.cli import guarded
from gdyn.inference import load_run
from gdyn.rundir import write_json


def parser() -> ArgumentParser:
    result = ArgumentParser(prog="gdyn evaluate", description=__doc__, exit_on_error=False)
    result.add_argument("run_dir", type=Path, help="folder of a training run")
    data = "prepared data, as in the run file (a directory for Vamp, an .h5 file for Monodecoder); repeat to pool"
    result.add_argument("--data", action="append", required=True, help=data)
    result.add_argument("--json", type=Path, help="also write the result to this file")
    result.add_argument("--checkpoint", default="best", help="best, latest, or a tag such as p1-vamp1-e0015")
    return result


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 if the user can mend it."""

    def command() -> None:
        options = parser().parse_args(argv)
        run = load_run(options.run_dir, options.checkpoint)
        result = run.engine.evaluate(run, options.data)
        print("\n".join(run.engine.evaluation_lines(result)))
        if options.json is not None:
            write_json(options.json, result)

    return guarded(command)


if __name__ == "__main__":
    sys.exit(main())
