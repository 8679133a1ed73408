"""gdyn prepare: raw data -> the files an engine trains on."""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script: this folder on the path would shadow other packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging

from jsonargparse import ArgumentParser, set_parsing_settings

from gdyn.cli import guarded
from gdyn.engines.vamp.prepare import Preparation, check, prepare

FLAGS = {
    "atom_labels": "give every atom a type of its own, 1..N, instead of its atomic number: for molecules",
    "open_boundaries": "ignore the cell, e.g. for a whole molecule taken out of its solvent",
    "overwrite": "replace a directory prepared earlier",
}


def parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    trajectories = ArgumentParser(description=Preparation.__doc__, exit_on_error=False)
    inputs = "one .npz, one file for ASE, or a topology and its trajectories"
    trajectories.add_argument("inputs", nargs="+", type=Path, help=inputs)
    trajectories.add_class_arguments(Preparation, skip={"inputs", *FLAGS}, as_group=False)
    for flag, meaning in FLAGS.items():
        trajectories.add_argument(f"--{flag}", action="store_true", help=meaning)
    checking = ArgumentParser(description="Read a whole directory and say what it holds.", exit_on_error=False)
    checking.add_argument("directory", type=Path, help="a trajectory directory")
    checking.add_argument("--ferro", action="store_true", help="atom directions must be there too")
    result = ArgumentParser(prog="gdyn prepare", description=__doc__, exit_on_error=False)
    commands = result.add_subcommands()
    commands.add_subcommand("trajectories", trajectories, help="molecular dynamics -> a trajectory directory for Vamp")
    commands.add_subcommand("check", checking, help="is a trajectory directory sound?")
    return result


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 if the user can mend it."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("gdyn").setLevel(logging.INFO)

    def command() -> None:
        commands = parser()
        options = commands.instantiate(commands.parse_args(argv))
        if options.subcommand == "check":
            print(check(**vars(options.check)))
        else:
            prepare(Preparation(**vars(options.trajectories)))

    return guarded(command)


if __name__ == "__main__":
    sys.exit(main())
