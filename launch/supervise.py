"""gdyn supervise: what a job script starts. Runs the command that starts the ranks, and decides what follows its end.

Restarts from the last whole checkpoint, does without nodes that failed, hands a stopped run over to a successor. The
command's words may hold {nodes}, {ranks} and {hosts}: a file with one host a line.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script: this folder on the path would shadow other packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import logging
import os
import signal

from gdyn import rundir, schedulers
from gdyn.cli import guarded
from gdyn.rundir import RunDir
from gdyn.supervisor import Order, Supervisor


def parser() -> argparse.ArgumentParser:
    # argparse: this runs before the environment is proven to work, and beside the ranks
    result = argparse.ArgumentParser(
        prog="gdyn supervise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--run_dir", type=Path, required=True, help="folder of the run")
    result.add_argument("--nodes", type=_count, required=True, help="on how many to run; the job's others are spares")
    result.add_argument("--ranks_per_node", type=_count, required=True)
    result.add_argument("--max_restarts", type=int, default=3, help="after failures, in this job")
    result.add_argument("--requeue", action="store_true", help="put this job back into the queue when its time ends")
    result.add_argument("--ensemble", type=Path, help="folder of its members' run files: the last one to end compares")
    result.add_argument("--start_timeout", type=float, default=1800, help="seconds until rank 0's first sign of life")
    result.add_argument("command", nargs="+", metavar="-- COMMAND", help="starts the ranks")
    return result


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: of the run (0, 1, 2, 71), 75 if a successor is to go on, 130 after a second Ctrl-C."""
    options = parser().parse_args(argv)
    logging.basicConfig(format="gdyn supervise: %(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        return guarded(lambda: supervise(options))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def compare_members(folder: Path) -> None:
    """Once every member of an ensemble has ended, one table of them all, beside the folder of their run files."""
    import yaml  # the environment of the ranks

    from gdyn import comparison

    files = sorted(folder.glob("*.yaml"), key=lambda path: int(path.stem))
    runs = [RunDir(Path(yaml.safe_load(path.read_text())["run_dir"])) for path in files]
    states = [rundir.read_json(run.status_json)["state"] if run.status_json.exists() else "" for run in runs]
    if not {"", rundir.RUNNING, rundir.STATES[rundir.STOPPED]} & set(states):
        print(comparison.compare([run.path for run in runs], folder.parent))


def supervise(options: argparse.Namespace) -> int:
    """Raises: UserError."""
    order = Order(
        run_dir=RunDir(options.run_dir),
        nodes=options.nodes,
        ranks_per_node=options.ranks_per_node,
        command=tuple(options.command),
        max_restarts=options.max_restarts,
        requeue=options.requeue,
        start_timeout=options.start_timeout,
    )
    code = Supervisor(order, schedulers.around(os.environ), os.environ).run()
    if options.ensemble and code != rundir.STOPPED:
        compare_members(options.ensemble)
    return code


if __name__ == "__main__":
    sys.exit(main())
