"""From sampled atoms to molecules and back to files; `quality` says how good they are, `sample_page` shows them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gdyn.engines.diffusion.bonds import bond_orders, find_bonds, skeleton
from gdyn.engines.diffusion.quality import summary, table
from gdyn.engines.diffusion.sample_page import write_report
from gdyn.extras import optional

__all__ = ["build", "summary", "table", "write_csv", "write_report", "write_sdf"]

Rows = Sequence[Mapping[str, Any]]
Molecules = Mapping[str, Sequence[Any]]


def build(elements: np.ndarray, positions: np.ndarray, charges: np.ndarray | None) -> Any:
    """An RDKit Mol with a conformer and Kekulé bonds, not sanitised: whether that is possible, `quality.table` says.

    elements: (n,) atomic numbers, 0 an unknown element, which becomes the dummy atom "*"; positions: (n, 3) Å;
    charges: (n,) formal charges, None: all neutral. Atoms keep their order. Never fails on what was sampled: atoms at
    one place, far apart or not finite have no bonds.

    Raises: UserError if a package is missing.
    """
    with optional("rdkit.rdBase", "sample").BlockLogs():
        numbers = np.asarray(elements, np.int64)
        x_n3 = np.asarray(positions, np.float64).reshape(-1, 3)
        formal = np.zeros_like(numbers) if charges is None else np.asarray(charges, np.int64)
        bonds = find_bonds(numbers, x_n3) if len(numbers) > 1 and np.isfinite(x_n3).all() else []
        orders = bond_orders(numbers, x_n3, formal, bonds) if bonds else []
        molecule = skeleton(numbers, x_n3, bonds)
        kinds = optional("rdkit.Chem", "sample").BondType.values
        for bond, order in zip(molecule.GetBonds(), orders, strict=True):
            bond.SetBondType(kinds[order])
        for atom, charge in zip(molecule.GetAtoms(), formal.tolist(), strict=True):
            atom.SetFormalCharge(charge)
        molecule.UpdatePropertyCache(strict=False)
        return molecule.GetMol()


def write_csv(path: Path, rows: Rows) -> None:
    """One line per molecule, a column for each key of any row; true and false as 1 and 0, empty: not known."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)


def write_sdf(path: Path, molecules: Molecules, rows: Rows) -> None:
    """All molecules in space, in the order of `rows`, each named "pocket number" and with its row as properties."""
    chem = optional("rdkit.Chem", "sample")
    with optional("rdkit.rdBase", "sample").BlockLogs(), chem.SDWriter(str(path)) as writer:
        writer.SetKekulize(False)
        for row, molecule in zip(rows, (each for group in molecules.values() for each in group), strict=True):
            labelled = chem.Mol(molecule)
            labelled.SetProp("_Name", f"{row['pocket']} {row['number']}")
            for name, value in row.items():
                if value is not None:
                    labelled.SetProp(name, str(_plain(value)))
            writer.write(labelled)


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value
