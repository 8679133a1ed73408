"""Complexes from an LMDB of pickled dicts, as TargetDiff and its successors distribute CrossDocked2020.

A pickle is a program. Here it can only rebuild arrays, tensors, strings, numbers and plain containers: whatever else it
asks for is refused before it runs. Entries hold ligand_pos (n, 3) Å, ligand_element, ligand_bond_index (2, b),
ligand_bond_type (4: aromatic), protein_pos (M, 3), protein_element, protein_is_backbone, protein_atom_to_aa_type, and
perhaps ligand_smiles, ligand_filename and protein_atom_name.
"""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gdyn.engines.diffusion.layout import BACKBONE, residue_classes
from gdyn.engines.diffusion.sources import File, Ligand, Protein
from gdyn.errors import MissingFile, UserError
from gdyn.extras import optional

AMINO_ACIDS = "ALA CYS ASP GLU PHE GLY HIS ILE LYS LEU MET ASN PRO GLN ARG SER THR VAL TRP TYR".split()
"""By protein_atom_to_aa_type: in the order of the one-letter codes, not of ours."""
AROMATIC_BOND = 4


def entries(path: Path, split: Path | None = None, part: str = "train") -> tuple[int, Iterator[File]]:
    """Number of entries and the entries, still pickled. A split file has a list of positions among the sorted keys for
    each part.

    Raises: MissingFile, UserError if a file cannot be read or has no such part.
    """
    lmdb = optional("lmdb")
    if not path.exists():
        raise MissingFile(f"{path} does not exist; --lmdb names an LMDB file or its folder.")
    try:
        database = lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise UserError(f"{path} cannot be read as an LMDB: {error}.") from None
    with database.begin() as transaction:
        keys = list(transaction.cursor().iternext(values=False))
    if split is not None:
        keys = [keys[position] for position in _positions(split, part, len(keys))]

    def values() -> Iterator[File]:
        with database.begin() as transaction:
            yield from (File(key.decode(errors="replace"), transaction.get(key)) for key in keys)

    return len(keys), values()


def read_entry(entry: File, hydrogens: bool = False) -> tuple[str, Ligand, Protein]:
    """Identifier, ligand and protein of one entry. Formal charges are not in it: they are taken as zero. Residues
    have no number in it: they are counted.

    Raises: UserError if the pickle asks for code, or an array is missing or of the wrong shape.
    """
    values = unpickle(entry.data)
    if not isinstance(values, dict):
        raise UserError(f"holds a {type(values).__name__}; a dict of arrays is expected.")
    ligand_positions, ligand_element = _atoms(values, "ligand")
    protein_positions, protein_element = _atoms(values, "protein")
    residues = _numbers(values, "protein_atom_to_aa_type", (len(protein_element),))
    if ((residues < 0) | (residues >= len(AMINO_ACIDS))).any():
        raise UserError(f"protein_atom_to_aa_type holds {residues.min()}..{residues.max()}; 0..19 are expected.")
    backbone = _numbers(values, "protein_is_backbone", (len(protein_element),)) != 0
    names = _atom_names(values, backbone)
    residue_names = np.array(AMINO_ACIDS)[residues]
    columns = {
        "element": protein_element,
        "backbone": backbone.astype(np.uint8),
        "residue": residue_classes(residue_names),
        "residue_name": residue_names.astype("S5"),
        "residue_number": _count(residues, backbone, names),
        "insertion_code": np.full(len(names), b"", "S1"),
        "chain": np.full(len(names), b"A", "S4"),
        "atom_name": names,
    }
    protein = Protein(protein_positions, columns)
    ligand = _ligand(values, ligand_positions, ligand_element)
    if not hydrogens:
        ligand = _without_hydrogens(ligand)
        heavy = protein_element != 1
        protein = Protein(protein_positions[heavy], {name: column[heavy] for name, column in columns.items()})
    name = str(values.get("ligand_filename", entry.name))
    return name.removesuffix(".gz").removesuffix(".sdf"), ligand, protein


def unpickle(data: bytes) -> Any:
    """What a pickle of arrays and plain containers holds. Raises: UserError if it is damaged or wants anything else."""
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot be unpickled: {reason}.") from None


class _Unpickler(pickle.Unpickler):
    """Knows the functions below and no others."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        module = module.replace("numpy.core", "numpy._core")  # numpy 1 and 2
        try:
            return ALLOWED[f"{module}.{name}"]
        except KeyError:
            raise UserError(
                f"its pickle asks for {module}.{name}, which is no array; it was not run. Convert the file to arrays "
                "where it was made."
            ) from None


def _load_storage(data: bytes) -> Any:
    """A tensor's numbers. torch's own function of this name unpickles without restriction."""
    return torch.load(io.BytesIO(data), weights_only=True)


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes."""
    assert encoding == "latin1"
    return text.encode("latin1")


ALLOWED: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": collections.OrderedDict,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy._core.multiarray._reconstruct": np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    "numpy._core.multiarray.scalar": np._core.multiarray.scalar,  # type: ignore[attr-defined]
    "numpy._core.numeric._frombuffer": np._core.numeric._frombuffer,  # type: ignore[attr-defined]
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch.storage._load_from_bytes": _load_storage,
    "_codecs.encode": _encode,
}


def _positions(split: Path, part: str, count: int) -> list[int]:
    if not split.exists():
        raise MissingFile(f"{split} does not exist; --split names a file of positions for each part.")
    try:
        parts = torch.load(split, weights_only=True)
        positions = {str(name): [int(position) for position in values] for name, values in parts.items()}
    except Exception as error:  # a damaged pickle raises anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{split} is no dict of lists of positions: {reason}") from None
    if part not in positions:
        raise UserError(f'{split} has no part "{part}"; it has {", ".join(positions)}.')
    wrong = [position for position in positions[part] if not 0 <= position < count]
    if wrong:
        raise UserError(f"{split}: {part} has the position {wrong[0]}, but the LMDB has {count} entries.")
    return positions[part]


def _array(values: dict[str, Any], name: str) -> np.ndarray:
    if name not in values:
        raise UserError(f"lacks {name}; it has {', '.join(map(str, values))}.")
    return np.asarray(values[name])


def _numbers(values: dict[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """int64. Raises: UserError if it has another shape or is not whole numbers."""
    array = _array(values, name)
    if array.shape != shape or array.dtype.kind not in "iub":
        raise UserError(f"{name} is {array.dtype} {array.shape}; whole numbers {shape} are expected.")
    return array.astype(np.int64)


def _atoms(values: dict[str, Any], part: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions (n, 3) float64 and atomic numbers (n,) uint8."""
    positions = _array(values, f"{part}_pos")
    if positions.ndim != 2 or positions.shape[1] != 3 or positions.dtype.kind != "f" or not len(positions):
        raise UserError(f"{part}_pos is {positions.dtype} {positions.shape}; numbers (atoms, 3) are expected.")
    if not np.isfinite(positions).all():
        raise UserError(f"{part}_pos has an atom whose position is not finite.")
    return positions.astype(np.float64), _numbers(values, f"{part}_element", (len(positions),)).astype(np.uint8)


def _ligand(values: dict[str, Any], positions: np.ndarray, element: np.ndarray) -> Ligand:
    bonds = _array(values, "ligand_bond_index")
    bonds = _numbers(values, "ligand_bond_index", (2, bonds.shape[-1] if bonds.ndim else 0))
    kinds = _numbers(values, "ligand_bond_type", bonds.shape[1:])
    if bonds.size and not 0 <= bonds.min() <= bonds.max() < len(element):
        raise UserError(f"ligand_bond_index holds {bonds.min()}..{bonds.max()} for {len(element)} atoms.")
    aromatic = np.zeros(len(element), np.uint8)
    aromatic[bonds[:, kinds == AROMATIC_BOND]] = 1
    smiles = _canonical(str(values.get("ligand_smiles", "")))
    columns = {"element": element, "aromatic": aromatic, "charge": np.zeros(len(element), np.int8)}
    return Ligand(positions, columns, smiles)


def _canonical(smiles: str) -> str:
    """Without hydrogens; empty if it is no molecule."""
    chem = optional("rdkit.Chem")
    with optional("rdkit.rdBase").BlockLogs():
        molecule = chem.MolFromSmiles(smiles)
    return "" if molecule is None else chem.MolToSmiles(molecule)


def _without_hydrogens(ligand: Ligand) -> Ligand:
    heavy = ligand.columns["element"] != 1
    if not heavy.any():
        raise UserError("its ligand has no heavy atom.")
    columns = {name: column[heavy] for name, column in ligand.columns.items()}
    return Ligand(ligand.positions[heavy], columns, ligand.smiles)


def _atom_names(values: dict[str, Any], backbone: np.ndarray) -> np.ndarray:
    """(M,) bytes; empty where the entry does not know them."""
    if "protein_atom_name" not in values:
        return np.full(len(backbone), b"", "S4")
    names = np.array([str(name) for name in values["protein_atom_name"]])
    if len(names) != len(backbone):
        raise UserError(f"protein_atom_name has {len(names)} names for {len(backbone)} atoms.")
    return np.char.encode(names, "ascii", "replace").astype("S4")


def _count(residues: np.ndarray, backbone: np.ndarray, names: np.ndarray) -> np.ndarray:
    """(M,) int32 from 1. A residue begins with another amino acid, an atom N, or a backbone after a side chain."""
    begins = np.zeros(len(residues), bool)
    begins[1:] = (residues[1:] != residues[:-1]) | (backbone[1:] & ~backbone[:-1])
    begins |= names == BACKBONE[0].encode()
    begins[0] = False
    return (1 + np.cumsum(begins)).astype(np.int32)
