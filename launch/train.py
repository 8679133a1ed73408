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
import time
from typing import TYPE_CHECKING, Any

from gdyn import cli, ranks, rundir
from gdyn.rundir import RunDir

if TYPE_CHECKING:
    from gdyn.config import Command, RunConfig

log = logging.getLogger("gdyn")
STARTED = time.monotonic()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 user error, 75 stopped early with a checkpoint."""
    return cli.guarded(lambda: train(sys.argv[1:] if argv is None else argv))


def train(argv: list[str]) -> int:
    """Raises: UserError."""
    if {"--help", "-h", "--print_config"} & {word.split("=")[0] for word in argv} or "--engine.help" in argv:
        _parse(argv)  # prints and exits
    with ranks.join() as here:
        cli.start_logging(here.main)
        log.info("%s", here.evidence)
        with here.together():
            command = _parse(argv)
        run_dir = RunDir(Path(command.config.run_dir))
        if command.mode == "train":
            with cli.verdict(run_dir, here) as verdict:
                verdict.code, verdict.reason, summary = fit(command, run_dir, here)
    if command.mode == "evaluate":
        from launch import analyze

        # One process writes the report; the others have nothing to add.
        return analyze.main([str(run_dir.path)]) if here.main else rundir.DONE
    # Out of the job: the other ranks need not wait for a report.
    if here.main and summary:
        conclude(command.config, run_dir, summary)
    return verdict.code


def _parse(argv: list[str]) -> Command:
    from gdyn import config  # imports torch, which mpi4py must precede (OLCF's PyTorch page)

    return config.parse(argv)


def fit(command: Command, run_dir: RunDir, here: ranks.RankContext) -> tuple[int, str, dict[str, Any]]:
    """Train and evaluate: the exit code, why, and the summary of a finished run. Every rank must call this.

    Raises: UserError on all ranks.
    """
    from gdyn import ds_config, ds_machine
    from gdyn.signals import StopRequest
    from gdyn.trainer import Trainer

    config = command.config
    with here.together():
        recipe = ds_config.read(config.deepspeed)
        cautions = ds_config.check(recipe)
        if here.main:
            run_dir.create()
    with StopRequest(config.wall_time and STARTED + config.wall_time) as stop:
        with here.together():
            if here.main:
                cli.log_to(run_dir.log)
            trainer = Trainer(config, here, run_dir, recipe, stop)
            machine = ds_machine.look()
            builds = ds_machine.build_directories(trainer.ds_json, machine)
            cautions += ds_machine.check_hardware(recipe, trainer.ds_json, machine, builds)
            ds_machine.check_build_locks(builds)
            if here.main:
                rundir.write_text(run_dir.run_yaml, config.to_yaml())
                rundir.write_json(run_dir.deepspeed_json, trainer.ds_json)
                run_dir.write_provenance(
                    {"launcher": here.evidence, "world_size": here.world_size, "seed": config.seed}
                )
        for sentence in [*command.notices, *cautions]:
            log.warning("%s", sentence)
        position = trainer.fit()
        if not trainer.plan.done(position):
            why, tag = stop.reason or "another rank was asked to", trainer.plan.tag(position)
            reason = f"stopped early ({why}); start again to continue at {tag}"
            log.info("%s.", reason)
            trainer.journal.close()
            return rundir.STOPPED, reason, {}
        return rundir.DONE, "finished", trainer.finish(position)


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
