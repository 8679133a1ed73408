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
from typing import TYPE_CHECKING

from gdyn import cli, ranks, rundir
from gdyn.rundir import RunDir

if TYPE_CHECKING:
    from gdyn.config import Command

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
                verdict.code, verdict.reason = fit(command, run_dir, here)
            return verdict.code
    from launch import analyze

    return analyze.main([str(run_dir.path)])


def _parse(argv: list[str]) -> Command:
    from gdyn import config  # imports torch, which mpi4py must precede (OLCF's PyTorch page)

    return config.parse(argv)


def fit(command: Command, run_dir: RunDir, here: ranks.RankContext) -> tuple[int, str]:
    """Train and evaluate; the exit code and why. Every rank must call this. Raises: UserError on all ranks."""
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
            reason = f"stopped early: {stop.reason or 'another rank asked to'}; start again to continue at {trainer.plan.tag(position)}"
            log.info("%s", reason)
            trainer.journal.close()
            return rundir.STOPPED, reason
        summary = trainer.finish(position)
    if config.export and here.main:
        from launch import export

        export.export(str(run_dir.path))
    _say(trainer.engine.headline(summary), run_dir)
    return rundir.DONE, "finished"


def _say(headline: list[str], run_dir: RunDir) -> None:
    rows = {
        "report": f"gdyn analyze {run_dir.path}",
        "TensorBoard": f"tensorboard --logdir {run_dir.tensorboard}",
        "checkpoints": str(run_dir.checkpoints),
        "summary": str(run_dir.summary_json),
    }
    for line in [*headline, *(f"{name:<17} {value}" for name, value in rows.items())]:
        log.info("%s", line)


if __name__ == "__main__":
    sys.exit(main())
