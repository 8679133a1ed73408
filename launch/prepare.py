"""gdyn prepare: raw data -> the files an engine trains on."""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script: this folder on the path would shadow other packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
import os

from jsonargparse import ArgumentParser, set_parsing_settings

from gdyn import ranks
from gdyn.cli import guarded, start_logging
from gdyn.engines.diffusion.prepare import Preparation as Complexes
from gdyn.engines.diffusion.prepare import prepare as prepare_complexes
from gdyn.engines.monodecoder.prepare import Preparation as Proteins
from gdyn.engines.monodecoder.prepare import prepare as prepare_proteins
from gdyn.engines.vamp.prepare import Preparation, check, prepare

WEEK = 7 * 24 * 3600.0
"""Seconds. Ranks with less to do, and all while rank 0 merges, wait for the others."""

FLAGS = {
    "atom_labels": "give every atom a type of its own, 1..N, instead of its atomic number: for molecules",
    "open_boundaries": "ignore the cell, e.g. for a whole molecule taken out of its solvent",
    "overwrite": "replace a directory prepared earlier",
}
PROTEIN_FLAGS = {
    "frames": "give the encoder each residue's absolute frame and step, as foldtree2 does; they turn with the molecule",
    "overwrite": "replace a file prepared earlier",
}
COMPLEX_FLAGS = {
    "hydrogens": "keep the ligand's hydrogens; those of the pocket are never kept",
    "unsafe_unpickle": "read the pickles of --lmdb; only arrays are rebuilt, but trust your source",
    "overwrite": "replace a file prepared earlier",
}


def parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    checking = ArgumentParser(description="Read a whole directory and say what it holds.", exit_on_error=False)
    checking.add_argument("directory", type=Path, help="a trajectory directory")
    checking.add_argument("--ferro", action="store_true", help="atom directions must be there too")
    trajectories = _reader(Preparation, "one .npz, one file for ASE, or a topology and its trajectories", FLAGS)
    proteins = _reader(Proteins, "structure files, folders and archives of them", PROTEIN_FLAGS)
    pairs = "folders or .tar archives of <id>_ligand.sdf and <id>_pocket10.pdb, or tables of two paths"
    complexes = _reader(Complexes, pairs, COMPLEX_FLAGS, nargs="*")
    result = ArgumentParser(prog="gdyn prepare", description=__doc__, exit_on_error=False)
    commands = result.add_subcommands()
    commands.add_subcommand("trajectories", trajectories, help="molecular dynamics -> a trajectory directory for Vamp")
    commands.add_subcommand("proteins", proteins, help="protein structures -> an HDF5 file for Monodecoder")
    commands.add_subcommand("complexes", complexes, help="ligands in proteins -> an HDF5 file for Diffusion")
    commands.add_subcommand("check", checking, help="is a trajectory directory sound?")
    return result


def _reader(job: type, inputs: str, flags: dict[str, str], nargs: str = "+") -> ArgumentParser:
    """Of a job's fields: its inputs are positional, its flags take no value."""
    result = ArgumentParser(description=job.__doc__, exit_on_error=False)
    result.add_argument("inputs", nargs=nargs, type=Path, help=inputs)
    result.add_class_arguments(job, skip={"inputs", *flags}, as_group=False)
    for flag, meaning in flags.items():
        result.add_argument(f"--{flag}", action="store_true", help=meaning)
    return result


def _proteins(job: Proteins) -> None:
    """On all ranks of the job if a launcher started several."""
    if ranks.discover(os.environ).launcher == "single":
        prepare_proteins(job, ranks.ALONE)
        return
    with ranks.join(timeout_s=WEEK) as here:
        start_logging(here.main)
        prepare_proteins(job, here)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 if the user can mend it."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("gdyn").setLevel(logging.INFO)

    def command() -> None:
        commands = parser()
        options = commands.instantiate(commands.parse_args(argv))
        if options.subcommand == "check":
            print(check(**vars(options.check)))
        elif options.subcommand == "proteins":
            _proteins(Proteins(**vars(options.proteins)))
        elif options.subcommand == "complexes":
            prepare_complexes(Complexes(**vars(options.complexes)))
        else:
            prepare(Preparation(**vars(options.trajectories)))

    return guarded(command)


if __name__ == "__main__":
    sys.exit(main())
