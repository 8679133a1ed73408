"""gdyn compare: runs side by side: scores, what differs between them, throughput, cost. Also while they run."""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script: this folder on the path would shadow other packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jsonargparse import ArgumentParser

from gdyn.cli import guarded
from gdyn.comparison import compare


def parser() -> ArgumentParser:
    result = ArgumentParser(prog="gdyn compare", description=__doc__, exit_on_error=False)
    result.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="folders of training runs")
    result.add_argument("--output", type=Path, default=Path(), help="where comparison.csv, .md and .png go")
    result.add_argument("--metric", help="a validation score to show instead of the objectives")
    return result


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 if the user can mend it."""

    def command() -> None:
        options = parser().parse_args(argv)
        print(compare(options.run_dirs, options.output, options.metric))
        print(f"\n{', '.join(str(options.output / f'comparison.{kind}') for kind in ('csv', 'md', 'png'))}")

    return guarded(command)


if __name__ == "__main__":
    sys.exit(main())
