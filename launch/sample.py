"""gdyn sample: new ligands for protein pockets, from a trained run, and how good they are."""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script: this folder on the path would shadow other packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt

from gdyn import ranks
from gdyn.cli import guarded, start_logging
from gdyn.inference import load_run

WEEK = 7 * 24 * 3600.0
"""Seconds. Ranks with less to do, and all while rank 0 looks at the molecules, wait for the others."""


def parser() -> ArgumentParser:
    result = ArgumentParser(prog="gdyn sample", description=__doc__, exit_on_error=False)
    result.add_argument("run_dir", type=Path, help="folder of a training run")
    pockets = (
        "a file of gdyn prepare complexes; a folder of <id>_ligand.sdf with <id>_pocket10.pdb or <id>_protein.pdb, "
        "where the molecules go to the ligands' places; or one of pockets alone (.pdb, .cif)"
    )
    result.add_argument("--pockets", type=Path, required=True, help=pockets)
    result.add_argument("--output", type=Path, required=True, help="folder for the molecules (SDF), table and report")
    result.add_argument("--only", metavar="GLOB", default="*", help="the pockets to take, e.g. '1abc*'")
    result.add_argument("--number", type=PositiveInt, default=20, help="molecules for each pocket")
    guidance = "how much the pocket counts: 0 not at all, 1 as trained, more is more; default: the run file's"
    result.add_argument("--guidance", type=float, help=guidance)
    steps = "of noise removal, up to the run's timesteps; default: 100, with the ancestral sampler all"
    result.add_argument("--steps", type=PositiveInt, help=steps)
    sampler = "ddim needs few steps, ancestral many; default: ddim, unless --steps are all"
    result.add_argument("--sampler", choices=["ancestral", "ddim"], help=sampler)
    result.add_argument("--seed", type=NonNegativeInt, default=0, help="another one gives other molecules")
    atoms = "of a molecule: a number, or MIN:MAX; default: as often as in the training data"
    result.add_argument("--atoms", help=atoms)
    batch = "molecules made at a time: memory and speed, not results"
    result.add_argument("--batch_size", type=PositiveInt, default=32, help=batch)
    workers = "processes that look at the finished molecules, seconds each"
    checks = (
        "of PoseBusters: dock, all, seconds per molecule; dock_fast, all but the internal energy; default: dock_fast"
    )
    result.add_argument("--checks", choices=["dock", "dock_fast"], default="dock_fast", help=checks)
    result.add_argument("--workers", type=PositiveInt, default=1, help=workers)
    result.add_argument("--checkpoint", default="best", help="best, latest, or a tag such as p3-denoiser-e0015")
    result.add_argument("--overwrite", action="store_true", help="replace files in the output folder")
    return result


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 if the user can mend it."""

    def command() -> None:
        options = vars(parser().parse_args(argv))
        # Also for a single process, which then finds its device.
        with ranks.join(timeout_s=WEEK) as here:
            start_logging(here.main)
            run = load_run(options.pop("run_dir"), options.pop("checkpoint"))
            lines = run.engine.sample(run, here=here, **options)
            if here.main:
                print("\n".join(lines))

    return guarded(command)


if __name__ == "__main__":
    sys.exit(main())
