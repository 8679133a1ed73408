"""Train: read the config, join the job, open the run folder, fit.

deepspeed launch/train.py --config run.yaml      (or python, torchrun, mpirun, srun; or `gdyn train`)
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts launch/ first, where a file could shadow a library's module; the project's root belongs there.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gdyn import cli, failures, ranks, rundir, schedulers
from gdyn.errors import UserError
from gdyn.rundir import RunDir
from gdyn.signals import StopRequest
from gdyn.watchdog import Watchdog

if TYPE_CHECKING:
    from gdyn.config import Command, RunConfig
    from gdyn.trainer import Trainer

log = logging.getLogger("gdyn")
STARTED = time.monotonic()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 user error, 71 hung, 75 stopped early with a checkpoint."""
    return cli.guarded(lambda: train(sys.argv[1:] if argv is None else argv))


def train(argv: list[str]) -> int:
    """Raises: UserError."""
    if {"--help", "-h", "--print_config"} & {word.split("=")[0] for word in argv} or "--engine.help" in argv:
        parse(argv)  # prints and exits
    # First of all: a process that has no handler yet is killed by the signal that was to save its work.
    with StopRequest() as stop, ranks.join(timeout_s=3600) as here, Watchdog(here, stop) as watch:
        startup = {"import": here.import_seconds, "rendezvous": time.monotonic() - STARTED - here.import_seconds}
        cli.start_logging(here.main)
        log.info("%s", here.evidence)
        with here.together():
            command = parse(argv)
        startup["import"] = time.monotonic() - STARTED - startup["rendezvous"]
        config, run_dir = command.config, RunDir(Path(command.config.run_dir))
        if command.mode == "train":
            watch.limit_to(config.hang_timeout)
            stop.deadline = _deadline(config, here)
            with verdict(run_dir, here, watch) as ending:
                ending.code, ending.reason, summary = fit(command, run_dir, here, stop, watch, startup)
    if command.mode == "evaluate":
        from launch import analyze

        # One process writes the report; the others have nothing to add.
        return analyze.main([str(run_dir.path)]) if here.main else rundir.DONE
    # Out of the job: the other ranks need not wait for a report.
    if here.main and summary:
        conclude(config, run_dir, summary)
    return ending.code


def parse(argv: list[str]) -> Command:
    """Raises: UserError."""
    from gdyn import config  # imports torch, which mpi4py must precede (OLCF's PyTorch page)

    return config.parse(argv)


def _deadline(config: RunConfig, here: ranks.RankContext) -> float | None:
    """time.monotonic() by which this process must have ended, as the run file and the scheduler say."""
    ends = [STARTED + config.wall_time] if config.wall_time else []
    # One rank that knows is enough, and does not bother the scheduler with thousands of questions.
    job_end = schedulers.around(os.environ).end_time(os.environ) if here.main else None
    if job_end is not None:
        ends.append(time.monotonic() + job_end - time.time())
    return min(ends, default=None)


@dataclass
class Ending:
    """How a run ended; `verdict` writes it."""

    code: int = rundir.FAILED
    reason: str = ""


@contextmanager
def verdict(run_dir: RunDir, here: ranks.RankContext, watch: Watchdog) -> Iterator[Ending]:
    """Run the block and write status.json, whatever happens, because launchers lose exit codes. What no user caused
    also leaves this rank's stack in the log and failure.json, and becomes exit code 1. Every rank must enter."""
    ending = Ending()
    try:
        yield ending
    except UserError as error:
        ending.code, ending.reason = rundir.USER_ERROR, str(error)
        raise
    except Exception as error:
        failures.report(run_dir, here, watch.where, error)
        failure = failures.read(run_dir)
        ending.reason = str(failure or error)
        raise SystemExit(rundir.FAILED) from None
    except BaseException as error:  # a second Ctrl-C
        ending.reason = type(error).__name__
        raise
    finally:
        if here.main and run_dir.path.is_dir() and os.access(run_dir.path, os.W_OK):
            run_dir.amend_start({"seconds": round(time.monotonic() - STARTED, 1), "exit_code": ending.code})
            run_dir.write_status(ending.code, ending.reason)


def prepare(
    command: Command, run_dir: RunDir, here: ranks.RankContext, stop: StopRequest, watch: Watchdog | None = None
) -> Trainer:
    """A trainer that has not begun; what the user should know is logged. Every rank must call this.

    Raises: UserError on all ranks.
    """
    from gdyn import ds_config, ds_machine
    from gdyn.engine import Engine
    from gdyn.trainer import Trainer

    config = command.config
    with here.together():
        if config.export and type(config.engine).predictor is Engine.predictor:
            raise UserError(f"export: {type(config.engine).__name__} has no stand-alone predictor; leave the key out.")
        recipe = ds_config.read(config.deepspeed)
        cautions = ds_config.check(recipe)
        if here.main:
            run_dir.create()
    with here.together():
        trainer = Trainer(config, here, run_dir, recipe, stop, watch)
        machine = ds_machine.look()
        builds = ds_machine.build_directories(trainer.ds_json, machine)
        cautions += ds_machine.check_hardware(recipe, trainer.ds_json, machine, builds)
        ds_machine.check_build_locks(builds)
    for sentence in [*command.notices, *cautions]:
        log.warning("%s", sentence)
    return trainer


def fit(
    command: Command,
    run_dir: RunDir,
    here: ranks.RankContext,
    stop: StopRequest,
    watch: Watchdog,
    startup: dict[str, float],
) -> tuple[int, str, dict[str, Any]]:
    """Train and evaluate: the exit code, why, and the summary of a finished run. Every rank must call this. `startup`:
    seconds of what came before.

    Raises: UserError on all ranks.
    """
    config, began = command.config, time.monotonic()
    with here.together():
        if here.main:
            run_dir.create()
            cli.log_to(run_dir.log)
    trainer = prepare(command, run_dir, here, stop, watch)
    with here.together():
        if here.main:
            _record(config, run_dir, here, trainer)
            watch.run_dir = run_dir
    trainer.startup |= startup | {"data": time.monotonic() - began}
    if config.preflight == "on" or (config.preflight == "auto" and here.world_size > 1):
        from gdyn import preflight

        began = time.monotonic()
        watch.at("preflight")
        preflight.check(trainer)
        trainer.startup["preflight"] = time.monotonic() - began
    position = trainer.fit()
    if not trainer.plan.done(position):
        why, tag = stop.reason or "another rank was asked to", trainer.plan.tag(position)
        reason = f"stopped early ({why}); start again to continue at {tag}"
        log.info("%s.", reason)
        trainer.journal.close()
        return rundir.STOPPED, reason, {}
    return rundir.DONE, "finished", trainer.finish(position)


def _record(config: RunConfig, run_dir: RunDir, here: ranks.RankContext, trainer: Trainer) -> None:
    """What runs, and how it was started, into the run folder. Rank 0 calls this."""
    rundir.write_text(run_dir.run_yaml, config.to_yaml())
    rundir.write_json(run_dir.deepspeed_json, trainer.ds_json)
    run_dir.begin_start(
        {
            "launcher": here.evidence,
            "world_size": here.world_size,
            "nodes": here.nodes,
            "node": here.node,
            "job": schedulers.around(os.environ).job_id(os.environ),
            "seed": config.seed,
            "samples": len(trainer.loader.dataset),
            "samples_per_window": trainer.loader.samples_per_window,
        }
    )


def conclude(config: RunConfig, run_dir: RunDir, summary: dict[str, Any]) -> None:
    """What is made of a finished run, and the lines a person wants to read."""
    if config.export:
        from launch import export

        export.export(str(run_dir.path))
    report = f"{run_dir.report_html} (made by: gdyn analyze {run_dir.path})"
    if config.report:
        from gdyn.inference import load_run

        split = "test" if "test" in summary else "validation"
        config.engine.report(load_run(run_dir.path), split=split)
        report = str(run_dir.report_html)
    rows = {
        "report": report,
        "TensorBoard": f"tensorboard --logdir {run_dir.tensorboard}",
        "checkpoints": str(run_dir.checkpoints),
        "summary": str(run_dir.summary_json),
    }
    for line in [*config.engine.headline(summary), *(f"{name:<17} {value}" for name, value in rows.items())]:
        log.info("%s", line)


if __name__ == "__main__":
    sys.exit(main())
