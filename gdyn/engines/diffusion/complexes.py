"""Complexes of a ligand and its pocket on disk (`layout` describes the file) as padded batches.

A file is opened by each process when it first reads, and only the atoms of a batch are read: memory does not grow with
the data. Legend: N complexes, B of a batch, n ligand atoms and m pocket atoms of the largest one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from torch import Tensor

from gdyn.engines.diffusion import layout
from gdyn.errors import MissingFile, UserError
from gdyn.extras import optional
from gdyn.nn.ragged import pad
from gdyn.splits import stable_key

FARTHEST = 1e4
"""Å from the pocket's centre: what lies beyond is no complex."""
OFF_CENTRE = 0.01
"""Å: how far a pocket's mean may be from the origin."""
LIGAND_WEIGHT = 20
"""Of a ligand atom in the size of a complex, with which ligands and pockets of 10 Å are padded about equally."""
ONE_OF_A_FILE = ("radius", "hydrogens")
"""Attributes that files read together must share."""


class Complex(NamedTuple):
    """A ligand in its pocket, the pocket's mean at the origin."""

    identifier: str
    smiles: str
    centre: np.ndarray
    """(3,) float64 Å: what was subtracted from all positions."""
    ligand: dict[str, np.ndarray]
    """The LIGAND columns of `layout`."""
    pocket: dict[str, np.ndarray]
    """The POCKET columns."""


class Complexes:
    """All complexes of one or more files, as a dataset of the loader.

    Raises: MissingFile, UserError naming file, array, what was found and what was expected.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path]):
        self.paths = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
        if not self.paths:
            raise UserError("no file of complexes given; at least one is needed.")
        self._files = [_Shard(path) for path in self.paths]
        for file in self._files[1:]:
            _check_alike(self._files[0], file)
        self.attributes = dict(self._files[0].attributes)
        """How all files were prepared: ONE_OF_A_FILE."""
        self._starts = np.cumsum([0] + [len(file) for file in self._files])
        self.identifiers: list[str] = [name for file in self._files for name in file.identifiers]
        """Unique within a file."""
        self.smiles: list[str] = [smiles for file in self._files for smiles in file.smiles]
        """Canonical, of each ligand; empty where it is not known."""
        lengths = {part: np.concatenate([np.diff(file.offsets[part]) for file in self._files]) for part in PARTS}
        self.sizes: np.ndarray = lengths["pocket"] + LIGAND_WEIGHT * lengths["ligand"]
        """(N,) int64: by which complexes are alike in both their ligands and their pockets."""
        self.ligand_sizes: np.ndarray = np.bincount(lengths["ligand"])
        """(S,) int64: entry n is the number of ligands with n atoms."""

    def __reduce__(self) -> tuple[type[Complexes], tuple[list[Path]]]:
        """A worker process opens the files itself; an open HDF5 file does not travel."""
        return Complexes, (self.paths,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, indices: np.ndarray) -> dict[str, Tensor]:
        """The batch of these complexes; see `collate`.

        Raises: IndexError; UserError if a value of theirs is impossible.
        """
        return collate([self.complex(int(index), BATCH) for index in indices])

    def complex(self, index: int, columns: dict[str, Sequence[str]] | None = None) -> Complex:
        """One complex with these columns of its parts, default all.

        Raises: IndexError; UserError if a value of it is impossible.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"complex {index} of {len(self)}; indices are 0..{len(self) - 1}.")
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._files[which].complex(index - int(self._starts[which]), columns or ALL)


PARTS = tuple(layout.COLUMNS)
ALL: dict[str, Sequence[str]] = {part: tuple(columns) for part, columns in layout.COLUMNS.items()}
BATCH: dict[str, Sequence[str]] = {
    "ligand": ("positions", "element", "aromatic", "charge"),
    "pocket": ("positions", "element", "backbone", "residue"),
}
"""The columns a network sees."""


def collate(complexes: Sequence[Complex]) -> dict[str, Tensor]:
    """A batch with zeros behind each complex:

    ligand_positions (B, n, 3) float32 Å, ligand_mask (B, n) bool, ligand_element, ligand_aromatic, ligand_charge
    (B, n) int64; pocket_positions (B, m, 3), pocket_mask, pocket_element, pocket_backbone, pocket_residue; keys (B,)
    int64, `stable_key` of identifier and positions, which seeds the noise of the complex.
    """
    batch = {"keys": torch.tensor([_key(entry) for entry in complexes])}
    for part, columns in BATCH.items():
        entries = [getattr(entry, part) for entry in complexes]
        lengths = torch.tensor([len(entry["positions"]) for entry in entries])
        for name in columns:
            rows = CLASSES.get(name, _as_is)(np.concatenate([entry[name] for entry in entries]))
            batch[f"{part}_{name}"], batch[f"{part}_mask"] = pad(torch.from_numpy(rows), lengths)
    return batch


def _key(entry: Complex) -> int:
    """Names are unique within a file only."""
    return stable_key(entry.identifier, *(getattr(entry, part)["positions"].tobytes() for part in PARTS))


def write_pocket_pdb(entry: Complex, path: Path) -> None:
    """Write the pocket as PDB, in the frame of the file it came from."""
    gemmi = optional("gemmi")
    structure, model = gemmi.Structure(), gemmi.Model(1)
    structure.name = entry.identifier
    pocket = entry.pocket
    positions = (pocket["positions"] + entry.centre).tolist()
    chain = residue = None
    for i, position in enumerate(positions):
        name, number = pocket["chain"][i].decode(), int(pocket["residue_number"][i])
        if chain is None or chain.name != name:
            chain, residue = model.add_chain(name), None
        label = (number, pocket["insertion_code"][i].decode() or " ", pocket["residue_name"][i].decode())
        if residue is None or (residue.seqid.num, residue.seqid.icode, residue.name) != label:
            residue = chain.add_residue(gemmi.Residue())
            residue.seqid, residue.name, residue.het_flag = gemmi.SeqId(*label[:2]), label[2], "A"
        atom = gemmi.Atom()
        atom.name, atom.element = pocket["atom_name"][i].decode(), gemmi.Element(int(pocket["element"][i]))
        atom.pos = gemmi.Position(*position)
        residue.add_atom(atom)
    structure.add_model(model)
    structure.shorten_chain_names()  # PDB has one column for them
    path.write_text(structure.make_pdb_string(gemmi.PdbWriteOptions(minimal=True)))


def _as_is(values: np.ndarray) -> np.ndarray:
    return values if values.dtype.kind == "f" else values.astype(np.int64)


CLASSES = {
    "element": layout.element_classes,
    "charge": layout.charge_classes,
}
"""Columns that become classes."""


class _Shard:
    """One file: what is small is read at once and checked, the atoms when they are asked for."""

    def __init__(self, path: Path):
        self.path = path
        self._process = -1
        if not path.is_file():
            raise MissingFile(f"{path} does not exist; make it with `gdyn prepare complexes`.")
        with self._reading():
            self._check_layout()
            self.identifiers = self._strings("identifier")
            self.smiles = self._strings("ligand/smiles")
            self.attributes = {name: self.file.attrs[name] for name in ONE_OF_A_FILE if name in self.file.attrs}
            self.centres = self._array("centre", "f", (len(self), 3))[...]
            self.offsets = {part: self._offsets(part) for part in PARTS}
            self.file.close()
        self._process = -1
        twice = len(self) - len(set(self.identifiers))
        if twice:
            raise UserError(f"{path}: identifier has {twice} names more than once; prepare the file anew.")
        if not np.isfinite(self.centres).all():
            worst = int(np.argmin(np.isfinite(self.centres).all(1)))
            raise UserError(f"{path}: centre of {self.identifiers[worst]} is {self.centres[worst]}; finite numbers, Å.")

    def __len__(self) -> int:
        return len(self.identifiers)

    @property
    def file(self) -> h5py.File:
        """Open in this process: a handle that was forked shares its position with the parent's."""
        if self._process != os.getpid():
            # Nobody writes, and parallel file systems are often mounted without locks.
            self._file = h5py.File(self.path, "r", locking=False)
            self._datasets: dict[str, h5py.Dataset] = {}
            self._process = os.getpid()
        return self._file

    def _dataset(self, name: str) -> h5py.Dataset:
        """Kept open, because opening takes longer than reading."""
        file = self.file
        if name not in self._datasets:
            self._datasets[name] = file[name]
        return self._datasets[name]

    def complex(self, index: int, columns: dict[str, Sequence[str]]) -> Complex:
        parts = {}
        with self._reading():
            for part, names in columns.items():
                start, end = self.offsets[part][index : index + 2]
                parts[part] = {name: self._dataset(f"{part}/{name}")[start:end] for name in names}
        entry = Complex(self.identifiers[index], self.smiles[index], self.centres[index], **parts)
        self._check_values(entry)
        return entry

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, KeyError, RuntimeError) as error:
            reason = str(error).strip("'\"")
            raise UserError(f"{self.path} cannot be read as HDF5: {reason}; copy or prepare the file anew.") from None

    def _check_layout(self) -> None:
        found, version = self.file.attrs.get("layout"), self.file.attrs.get("version")
        if found != layout.LAYOUT:
            raise UserError(
                f'{self.path} has the layout {found!r}; "{layout.LAYOUT}" is expected, which `gdyn prepare complexes` '
                "writes."
            )
        if version != layout.VERSION:
            raise UserError(
                f"{self.path} has version {version} of the layout, this program reads {layout.VERSION}; prepare the "
                "file anew."
            )

    def _array(self, name: str, kinds: str, shape: tuple[int, ...]) -> h5py.Dataset:
        """A data set of this shape, -1 for any length, whose dtype is one of these kinds."""
        array = self.file.get(name)
        if not isinstance(array, h5py.Dataset):
            raise UserError(f"{self.path} lacks the array {name}; prepare the file anew.")
        same = len(array.shape) == len(shape) and all(
            wanted in (-1, length) for length, wanted in zip(array.shape, shape, strict=True)
        )
        if not same or array.dtype.kind not in kinds:
            text = ", ".join("any" if length == -1 else str(length) for length in shape)
            raise UserError(
                f"{self.path}: {name} is {array.dtype} {array.shape}; ({text}) of kind {kinds} is expected."
            )
        return array

    def _strings(self, name: str) -> list[str]:
        length = -1 if name == "identifier" else len(self)
        array = self._array(name, "O", (length,))
        if not len(array):
            raise UserError(f"{self.path} holds no complex; prepare it from other data.")
        return array.asstr()[...].tolist()

    def _offsets(self, part: str) -> np.ndarray:
        """(N + 1,) int64; also checks the columns."""
        rows = -1
        for name, (kind, tail) in layout.COLUMNS[part].items():
            array = self._array(f"{part}/{name}", np.dtype(kind).kind, (rows, *tail))
            rows = array.shape[0]
        offsets = self._array(f"{part}/offsets", "iu", (len(self) + 1,))[...].astype(np.int64)
        if offsets[0] != 0 or offsets[-1] != rows or (np.diff(offsets) < 1).any():
            raise UserError(
                f"{self.path}: {part}/offsets runs from {offsets[0]} to {offsets[-1]}; it must ascend from 0 to the "
                f"{rows} rows of {part}/positions, with at least one for each complex."
            )
        return offsets

    def _check_values(self, entry: Complex) -> None:
        """Raises: UserError naming the value no complex can have."""
        for part, columns in (("ligand", entry.ligand), ("pocket", entry.pocket)):
            for name, low, high in LIMITS:
                values = columns.get(name)
                # NaN is within no limits
                if values is not None and not ((values >= low) & (values <= high)).all():
                    worst = values[~((values >= low) & (values <= high))][0]
                    raise UserError(
                        f"{self.path}: {part}/{name} of {entry.identifier} holds {worst}; {low:g} to {high:g} is "
                        "expected. Prepare the file anew."
                    )
        mean = entry.pocket["positions"].mean(0, dtype=np.float64)
        if np.abs(mean).max() > OFF_CENTRE:
            raise UserError(
                f"{self.path}: pocket/positions of {entry.identifier} have their mean at {mean.round(3)} Å; the origin "
                "is expected. Prepare the file anew."
            )


LIMITS = (
    ("positions", -FARTHEST, FARTHEST),
    ("element", 0, layout.HEAVIEST),
    ("aromatic", 0, 1),
    ("backbone", 0, 1),
    ("residue", 0, len(layout.RESIDUES)),
)
"""Column, smallest and largest value."""


def _check_alike(first: _Shard, other: _Shard) -> None:
    for name in ONE_OF_A_FILE:
        if first.attributes.get(name) != other.attributes.get(name):
            raise UserError(
                f"{first.path} was prepared with {name} {first.attributes.get(name)}, {other.path} with "
                f"{other.attributes.get(name)}; files that are read together must be prepared alike."
            )
