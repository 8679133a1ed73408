"""Stable atoms, by the tables of EDM (E. Hoogeboom et al., ICML 2022; its qm9/bond_analyze.py), which GeoLDM uses, too.

Two atoms have a bond of the highest order whose length in the tables, plus a margin, is longer than their distance; an
atom is stable if the orders of its bonds add up to an allowed valence. Charges and aromaticity are unknown to it: an
aromatic ring with bonds of 1.39 Å or more counts as single bonds, so its atoms are not stable.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

LENGTHS = (
    "HH74 HC109 HN101 HO96 HF92 HB119 HSi148 HP144 HAs152 HS134 HCl127 HBr141 HI161 CC154 CN147 CO143 CF135 CSi185 "
    "CP184 CS182 CCl177 CBr194 CI214 NN145 NO140 NF136 NCl175 NBr214 NS168 NI222 NP177 OO148 OF142 OBr172 OS151 OP163 "
    "OSi163 OCl164 OI194 FF142 FS158 FSi160 FCl166 FBr178 FP156 FI187 BCl175 SiSi233 SiS200 SiCl202 SiBr215 SiI243 "
    "ClCl199 ClP203 ClS207 ClBr214 SS204 SBr225 SP210 SI234 BrBr228 BrP222 PP221 II266",
    "CC134 CN129 CO120 CS160 NN125 NO121 OO121 OP150 PS186",
    "CC120 CN116 CO113 NN110",
)
"""pm: single, double and triple bonds."""
MARGINS = (10, 5, 3)
"""pm, tuned by EDM's authors on QM9."""
ALLOWED = {
    **dict.fromkeys(("H", "F", "Cl", "Br", "I"), (1,)),
    "O": (2,),
    **dict.fromkeys(("B", "N", "Al", "As"), (3,)),
    **dict.fromkeys(("C", "Si", "S"), (4,)),
    **dict.fromkeys(("P", "Bi"), (3, 5)),
    "Hg": (1, 2),
}
"""Valences."""


def stable_atoms(molecule: Any) -> np.ndarray:
    """(n,) bool, of the atoms of an RDKit molecule in space; its own bonds are not looked at.

    Where the molecule has no hydrogens, their number cannot be checked: an atom then is stable if its bonds do not
    exceed its highest allowed valence, as hydrogens could make up the rest, and if it has a bond at all or is alone.
    """
    symbols = [atom.GetSymbol() for atom in molecule.GetAtoms()]
    if not symbols:
        return np.zeros(0, bool)
    orders = bond_orders(symbols, molecule.GetConformer().GetPositions()).sum(1)
    allowed = [ALLOWED.get(symbol, ()) for symbol in symbols]
    if "H" in symbols:
        return np.array([order in valences for order, valences in zip(orders, allowed, strict=True)])
    least = min(1, len(symbols) - 1)
    return np.array(
        [least <= order <= max(valences, default=-1) for order, valences in zip(orders, allowed, strict=True)]
    )


def bond_orders(symbols: list[str], x_n3: np.ndarray) -> np.ndarray:
    """(n, n) int: 0, no bond, to 3. Elements without a length in the tables have no bonds."""
    with np.errstate(invalid="ignore"):  # what is infinitely far has no bonds
        distances_nn = 100 * np.linalg.norm(x_n3[:, None] - x_n3[None], axis=-1)
    limits = np.array([[[_LIMITS[k].get((a, b), -1.0) for b in symbols] for a in symbols] for k in range(3)])
    within = np.logical_and.accumulate(distances_nn < limits, axis=0)  # a double bond is one that is short for a single
    orders_nn: np.ndarray = within.sum(0)
    np.fill_diagonal(orders_nn, 0)
    return orders_nn


def _limits(words: str, margin: int) -> dict[tuple[str, str], float]:
    """(symbol, symbol) -> pm below which they have this bond, both ways round."""
    pairs = re.findall(r"([A-Z][a-z]?)([A-Z][a-z]?)(\d+)", words)
    return {pair: float(length) + margin for a, b, length in pairs for pair in ((a, b), (b, a))}


_LIMITS = [_limits(words, margin) for words, margin in zip(LENGTHS, MARGINS, strict=True)]
