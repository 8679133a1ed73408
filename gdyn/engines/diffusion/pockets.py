"""Pockets to put ligands in: from prepared complexes, from pairs of files, or from files of pockets alone."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gdyn.engines.diffusion.complexes import Complex, Complexes
from gdyn.engines.diffusion.layout import LIGAND
from gdyn.engines.diffusion.prepare import cut
from gdyn.engines.diffusion.sources import (
    PROTEIN_NAME,
    File,
    Protein,
    Skipped,
    Source,
    open_source,
    read_ligand,
    read_pairs,
    read_protein,
)
from gdyn.errors import MissingFile, UserError

PREPARED = (".h5", ".hdf5")
STRUCTURES = (".pdb", ".ent", ".cif", ".mmcif")
LARGEST = 3000
"""Atoms. More are a protein, not the surroundings of one ligand; a pocket of 10 Å has 200 to 700."""

log = logging.getLogger("gdyn")


class Pocket(NamedTuple):
    """A pocket, and where in it ligands are wanted."""

    entry: Complex
    """Its ligand is empty where none is known."""
    centre: np.ndarray
    """(3,) float64 Å, the mean of a ligand's atoms relative to the pocket's mean."""


def read_pockets(path: Path, radius: float = 10.0, hydrogens: bool = False) -> list[Pocket]:
    """All pockets of a prepared file, or of a folder or archive of pairs (`gdyn prepare complexes` says which names),
    where a pocket is what is within `radius` Å of the ligand; or of a folder of structure files alone, or of one such
    file, each a pocket as a whole. The ligand's place is that of the one in the file, else the pocket's mean. What
    cannot be read is left out with a warning.

    Raises: MissingFile, UserError if nothing can be read.
    """
    if path.suffix.lower() in PREPARED:
        complexes = Complexes(path)
        return [_around_ligand(complexes.complex(index)) for index in range(len(complexes))]
    if _is_structure(path) and path.is_file():
        return _usable(path, [_alone(path.parent, path.name, path.name.partition(".")[0])])
    source = open_source(path)
    if source.pairs:
        return _usable(path, [*source.skipped, *_pairs(source, radius, hydrogens)])
    alone = [_alone(path, *name) for name in _structures(path)] if path.is_dir() else []
    return _usable(path, alone or source.skipped)


def _around_ligand(entry: Complex) -> Pocket:
    return Pocket(entry, entry.ligand["positions"].mean(0, dtype=np.float64))


def _pairs(source: Source, radius: float, hydrogens: bool) -> list[Pocket | Skipped]:
    def pocket(pair: Skipped | tuple[str, File, File]) -> Pocket | Skipped:
        if isinstance(pair, Skipped):
            return pair
        identifier, protein, ligand = pair
        try:
            return _around_ligand(cut(identifier, read_ligand(ligand, hydrogens), read_protein(protein), radius))
        except UserError as error:
            return Skipped(identifier, str(error))

    return [pocket(pair) for pair in read_pairs(source)]


def _structures(folder: Path) -> list[tuple[str, str]]:
    """(path below the folder, identifier) of its structure files: the name, or the path where two have one name."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if _is_structure(path))
    short = [_identifier(Path(name)) for name in names]
    times = Counter(short)
    return [(name, word if times[word] == 1 else name) for name, word in zip(names, short, strict=True)]


def _is_structure(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(STRUCTURES) and not path.name.startswith(".")


def _identifier(path: Path) -> str:
    match = PROTEIN_NAME.fullmatch(path.name)
    return match["id"] if match else path.name.partition(".")[0]


def _alone(folder: Path, name: str, identifier: str) -> Pocket | Skipped:
    """A file that is a pocket as a whole."""
    path = folder / name
    try:
        protein = read_protein(File(str(path), path.read_bytes()))
        _check_size(path, protein)
    except UserError as error:
        return Skipped(identifier, str(error))
    except OSError as error:
        return Skipped(identifier, f"{path} cannot be read: {error.strerror}.")
    mean = protein.positions.mean(0)
    pocket = {"positions": (protein.positions - mean).astype(np.float32)} | protein.columns
    ligand = {column: np.zeros((0, *tail), kind) for column, (kind, tail) in LIGAND.items()}
    return Pocket(Complex(identifier, "", mean, ligand, pocket), np.zeros(3))


def _check_size(path: Path, protein: Protein) -> None:
    if len(protein.positions) > LARGEST:
        raise UserError(
            f"{path} has {len(protein.positions)} atoms, a pocket at most {LARGEST}; put a ligand beside it, around "
            "which the pocket is cut (<id>_ligand.sdf with <id>_protein.pdb), or cut the file yourself."
        )


def _usable(path: Path, found: Sequence[Pocket | Skipped]) -> list[Pocket]:
    """Raises: UserError, MissingFile if there is no pocket."""
    pockets = [pocket for pocket in found if isinstance(pocket, Pocket)]
    skipped = [item for item in found if isinstance(item, Skipped)]
    if not pockets and not skipped:
        raise MissingFile(
            f"{path} has no pockets: a file of `gdyn prepare complexes`, a folder of <id>_ligand.sdf with "
            "<id>_pocket10.pdb or <id>_protein.pdb, or one of .pdb or .cif files is expected."
        )
    if not pockets:
        more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
        raise UserError(f"no pocket in {path} can be used; {skipped[0].identifier}{more}: {skipped[0].reason}")
    for item in skipped:
        log.warning("%s is left out: %s", item.identifier, item.reason)
    return pockets
