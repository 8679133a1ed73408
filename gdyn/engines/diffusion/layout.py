"""The HDF5 layout of protein-ligand complexes and the classes of the network. Who writes and who reads share it.

    /ligand/<column>    (rows, ...)    the LIGAND columns below, the atoms of one complex after those of the other
    /ligand/offsets     (N + 1,) int64 complex i has the rows offsets[i] .. offsets[i + 1]
    /ligand/smiles      (N,) string    canonical, without hydrogens; empty: not known
    /ligand/sizes       (S,) int64     entry n: how many ligands have n atoms
    /pocket/<column>    (rows, ...)    the POCKET columns below
    /pocket/offsets     (N + 1,) int64
    /centre             (N, 3) float64 mean of the pocket in the frame of the input, Å
    /identifier         (N,) string    unique
    attributes of the root: layout, version, radius (Å), hydrogens, provenance (JSON)

Positions are relative to `centre`: a pocket has its mean at the origin, and its ligand keeps its place within it.
Elements and charges are kept as such and become classes when they are read; the last class is everything unknown.
"""

from __future__ import annotations

import numpy as np

ELEMENTS = (1, 6, 7, 8, 9, 15, 16, 17, 35, 53)
"""Atomic numbers of the classes 0..9; class 10 is every other element."""
RESIDUES = tuple("ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL".split())
"""Names of the classes 0..19; class 20 is every other residue."""
CHARGES = (-1, 0, 1)
"""Formal charges of the classes 0..2; class 3 is every other charge."""
BACKBONE = ("N", "CA", "C", "O")
PROTONATION_STATES = {
    **dict.fromkeys(("HID", "HIE", "HIP", "HSD", "HSE", "HSP"), "HIS"),
    **dict.fromkeys(("CYX", "CYM"), "CYS"),
    "ASH": "ASP",
    "GLH": "GLU",
    "LYN": "LYS",
}
"""What force fields call standard residues."""

LIGAND: dict[str, tuple[str, tuple[int, ...]]] = {
    "positions": ("f4", (3,)),  # Å
    "element": ("u1", ()),  # atomic number
    "aromatic": ("u1", ()),  # 0, 1
    "charge": ("i1", ()),  # formal
}
POCKET: dict[str, tuple[str, tuple[int, ...]]] = {
    "positions": ("f4", (3,)),  # Å
    "element": ("u1", ()),  # atomic number
    "backbone": ("u1", ()),  # 0, 1: one of BACKBONE
    "residue": ("u1", ()),  # class, see RESIDUES
    "residue_name": ("S5", ()),  # in the input
    "residue_number": ("i4", ()),
    "insertion_code": ("S1", ()),
    "chain": ("S4", ()),
    "atom_name": ("S4", ()),
}
"""Column -> (dtype, shape of a row)."""
COLUMNS = {"ligand": LIGAND, "pocket": POCKET}
HEAVIEST = 118

LAYOUT, VERSION = "gdyn-complexes", 1
"""Attributes `layout` and `version` of the root."""


def element_classes(numbers: np.ndarray) -> np.ndarray:
    """int64 classes of atomic numbers."""
    return _classes(numbers, np.array(ELEMENTS))


def charge_classes(charges: np.ndarray) -> np.ndarray:
    """int64 classes of formal charges."""
    return _classes(charges, np.array(CHARGES))


def residue_classes(names: np.ndarray) -> np.ndarray:
    """int64 classes of residue names."""
    return _classes(np.array([PROTONATION_STATES.get(str(name), str(name)) for name in names]), np.array(RESIDUES))


def _classes(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The place of each value among the known ones, which ascend; their number where it is none of them."""
    place = np.searchsorted(known, values).clip(max=len(known) - 1)
    return np.where(known[place] == values, place, len(known)).astype(np.int64)
