"""gdyn encode: protein structures as strings over the alphabet that a run has learned."""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script: this folder on the path would shadow other packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from gdyn.cli import guarded
from gdyn.inference import load_run
from gdyn.ranks import ALONE


def parser() -> ArgumentParser:
    result = ArgumentParser(prog="gdyn encode", description=__doc__, exit_on_error=False)
    result.add_argument("run_dir", type=Path, help="folder of a training run")
    inputs = "prepared .h5 files, or structure files, folders and archives, which are prepared on the way"
    result.add_argument("inputs", type=Path, nargs="+", help=inputs)
    result.add_argument("--output", type=Path, required=True, help="FASTA file; a table is written beside it, as .tsv")
    result.add_argument("--checkpoint", default="best", help="best, latest, or a tag such as p1-vamp1-e0015")
    maps = "printable: up to 64 letters of ASCII; foldtree2: up to 246 bytes as MAFFT --text takes them"
    result.add_argument("--alphabet", choices=["printable", "foldtree2"], default="printable", help=maps)
    residues = "residues that are encoded at once: memory and speed, not results"
    result.add_argument("--batch_residues", type=PositiveInt, default=4096, help=residues)
    result.add_argument("--overwrite", action="store_true", help="replace files written earlier")
    return result


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 if the user can mend it."""

    def command() -> None:
        options = vars(parser().parse_args(argv))
        run = load_run(options.pop("run_dir"), options.pop("checkpoint"))
        print("\n".join(run.engine.encode(run, here=ALONE, **options)))

    return guarded(command)


if __name__ == "__main__":
    sys.exit(main())
