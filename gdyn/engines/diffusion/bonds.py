"""Bonds of a molecule from its atoms in space, whose hydrogens are usually missing.

Which atoms are bonded is read off distances by RDKit ("connect the dots": covalent radii, excess bonds removed again).
Orders are a matching: an atom has free valences, what its element and charge allow less its neighbours, and each of
them can take part in one double bond; chosen are the double bonds whose evidence from the geometry sums up highest
(J. Edmonds, "Paths, trees, and flowers", 1965). Thus no atom gets more bonds than its charge allows, unless it has too
many neighbours, and rings come out as Kekulé structures.

RDKit finds orders only where all hydrogens are there. Open Babel (GPL-2) does without, but not with given charges: of
the 87 ligands of examples/ligands_in_pockets' validation and test sets, stripped of their bonds, 79 % could be
sanitised and 63 % had their SMILES; here it is 100 % and 98 % (52 % and 63 % if atoms are moved by 0.05 Å). The weights
of the evidence were fitted on the training set (94 %) and then rounded with the other two in sight. What remains are
tautomers and rings that were drawn flat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gdyn.extras import optional

Bond = tuple[int, int]

RADII = {
    5: (0.85, 0.78, 0.73),
    6: (0.75, 0.67, 0.60),
    7: (0.71, 0.60, 0.54),
    8: (0.63, 0.57, 0.53),
    14: (1.16, 1.07, 1.02),
    15: (1.11, 1.02, 0.94),
    16: (1.03, 0.94, 0.95),
    33: (1.21, 1.14, 1.06),
    34: (1.16, 1.07, 1.07),
}
"""Å: covalent radii in single, double and triple bonds (P. Pyykkö and M. Atsumi, Chem. Eur. J. 2009, 15, 12770)."""
HYPERVALENT = (15, 16, 33, 34)
"""With more than two neighbours these take one of their higher valences: sulfoxides, sulfones, phosphates."""
SOFT = 0.06
"""Å: a bond this much shorter than half-way between two orders is one unit of evidence; coordinates are no better."""
LINEAR = 150.0
"""Degrees from which on an atom counts as linear."""


def find_bonds(numbers: np.ndarray, x_n3: np.ndarray) -> list[Bond]:
    """Which atoms are bonded. numbers: (n,) atomic numbers, 0 an unknown element; x_n3: Å."""
    molecule = skeleton(numbers, x_n3, [])
    optional("rdkit.Chem.rdDetermineBonds", "sample").DetermineConnectivity(molecule)
    return [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds()]


def bond_orders(numbers: np.ndarray, x_n3: np.ndarray, charges: np.ndarray, bonds: Sequence[Bond]) -> list[int]:
    """1, 2 or 3 for each bond. charges: (n,) formal charges."""
    networkx = optional("networkx", "sample")
    seen = _Surroundings(numbers, x_n3, charges, bonds)
    slots = [seen.slots(i) for i in range(len(numbers))]
    graph = networkx.Graph()
    for i, j in bonds:
        if min(slots[i], slots[j]) == 0 or not {int(numbers[i]), int(numbers[j])} <= RADII.keys():
            continue
        double, triple = seen.evidence(i, j), seen.evidence_triple(i, j)
        for a in range(slots[i]):
            for b in range(slots[j]):
                evidence = triple if a and b else double  # the second slots of both: the second of two extra bonds
                if evidence > 0:
                    graph.add_edge((i, a), (j, b), weight=evidence)
    extra = [frozenset((i, j)) for (i, _), (j, _) in networkx.max_weight_matching(graph)]
    return [1 + extra.count(frozenset(bond)) for bond in bonds]


def skeleton(numbers: np.ndarray, x_n3: np.ndarray, bonds: Sequence[Bond]) -> Any:
    """An RDKit RWMol in space, all bonds single. Position by position and bond by bond in the given order."""
    chem, geometry = optional("rdkit.Chem", "sample"), optional("rdkit.Geometry", "sample")
    molecule, conformer = chem.RWMol(), chem.Conformer(len(numbers))
    conformer.Set3D(True)
    for number in numbers:
        molecule.AddAtom(chem.Atom(int(number)))
    for i, position in enumerate(np.asarray(x_n3, float).tolist()):
        conformer.SetAtomPosition(i, geometry.Point3D(*position))
    molecule.AddConformer(conformer)
    for i, j in bonds:
        molecule.AddBond(i, j, chem.BondType.SINGLE)
    return molecule


class _Surroundings:
    """What the geometry says about each atom and bond."""

    def __init__(self, numbers: np.ndarray, x_n3: np.ndarray, charges: np.ndarray, bonds: Sequence[Bond]):
        chem = optional("rdkit.Chem", "sample")
        self.numbers, self.x, self.charges = [int(z) for z in numbers], x_n3, [int(q) for q in charges]
        self.neighbours: list[list[int]] = [[] for _ in self.numbers]
        for i, j in bonds:
            self.neighbours[i].append(j)
            self.neighbours[j].append(i)
        rings = [list(ring) for ring in chem.GetSymmSSSR(skeleton(numbers, x_n3, bonds))]
        self.in_small_ring = {i for ring in rings if len(ring) <= 5 for i in ring}
        self.in_ring = {bond: -1.0 for ring in rings for bond in _edges(ring)}
        """Bond -> how flat its flattest ring of five or six is, -1 to 1."""
        for ring in rings:
            if len(ring) in (5, 6):
                for bond in _edges(ring):
                    self.in_ring[bond] = max(self.in_ring[bond], _flatness(x_n3[ring]))
        self.linear = [self._is_linear(i) for i in range(len(self.numbers))]
        self.planarity = [self._planarity(i) for i in range(len(self.numbers))]

    def slots(self, i: int) -> int:
        """Free valences that can be in multiple bonds: two at the end of a chain, in a line or around sulfur."""
        both = self.linear[i] or self.numbers[i] in HYPERVALENT
        return min(self._free_valences(i), 2 if both else 1)

    def evidence(self, i: int, j: int) -> float:
        """That a bond is double. In units of about one standard deviation; single where it is negative."""
        ring = self.in_ring.get(frozenset((i, j)))
        total = self._shortness(i, j, 2) - 2 * self._twist(i, j) + (ring or 0.0)
        for k in (i, j):
            if self.numbers[k] == 6:
                # A flat carbon has a double bond to somewhere; a methyl group looks like nothing in particular.
                total += 1 + 2 * self.planarity[k] if len(self.neighbours[k]) > 1 else -1
            elif self.numbers[k] == 7 and self.charges[k] == 1:
                total += 2  # the charge of an amidine or pyridine is where the double bond is
            elif self.numbers[k] == 7 and ring is None:
                total -= 1  # of two tautomers, the one with an aromatic ring
        return total

    def evidence_triple(self, i: int, j: int) -> float:
        """That a bond whose atoms have two free valences each is triple rather than double."""
        return 2 + self._shortness(i, j, 3) if self.linear[i] and self.linear[j] else -1.0

    def _free_valences(self, i: int) -> int:
        """As the element with as many electrons has: O⁻ as F, N⁺ as C."""
        chem = optional("rdkit.Chem", "sample")
        degree, alike = len(self.neighbours[i]), self.numbers[i] - self.charges[i]
        if not (self.numbers[i] and 0 < alike <= 118):
            return 0
        higher = alike in HYPERVALENT and degree > 2
        valences = [v - degree for v in chem.GetPeriodicTable().GetValenceList(alike)]
        return min((v for v in valences if v > 0 or (v == 0 and not higher)), default=0)

    def _shortness(self, i: int, j: int, order: int) -> float:
        """Against half-way between the lengths of bonds of `order` and one order less, in units of SOFT, at most 3."""
        radii = [RADII[self.numbers[k]][n] for k in (i, j) for n in (order - 2, order - 1)]
        return float(np.clip((sum(radii) / 2 - np.linalg.norm(self.x[i] - self.x[j])) / SOFT, -3, 3))

    def _twist(self, i: int, j: int) -> float:
        """How far the neighbours of a bond are from its plane: 0 within 10 degrees, at most 2."""
        if self.linear[i] or self.linear[j] or {self.numbers[i], self.numbers[j]} & set(HYPERVALENT):
            return 0.0
        ends = [(a, b) for a in self.neighbours[i] for b in self.neighbours[j] if a != j and b != i and a != b]
        angles = np.array([_dihedral(*self.x[[a, i, j, b]]) for a, b in ends])
        return float(np.clip((np.minimum(angles, 180 - angles).mean() - 10) / 20, 0, 2)) if ends else 0.0

    def _planarity(self, i: int) -> float:
        """-1, tetrahedral, to 1, trigonal; 0 where the angles do not tell."""
        if len(self.neighbours[i]) == 3:
            return float(np.clip((np.mean(self._angles(i)) - 116) / 3, -1, 1))
        if len(self.neighbours[i]) == 2 and not self.linear[i] and i not in self.in_small_ring:
            return float(np.clip((self._angles(i)[0] - 115) / 5, -1, 1))
        return 0.0

    def _is_linear(self, i: int) -> bool:
        """The end of a chain is in line with it."""
        degree = len(self.neighbours[i])
        return degree == 1 or (degree == 2 and self._angles(i)[0] > LINEAR)

    def _angles(self, i: int) -> list[float]:
        """Degrees between the bonds of an atom."""
        arms = self.x[self.neighbours[i]] - self.x[i]
        return [_angle(arms[a], arms[b]) for a in range(len(arms)) for b in range(a)]


def _edges(ring: Sequence[int]) -> list[frozenset[int]]:
    return [frozenset((ring[k - 1], ring[k])) for k in range(len(ring))]


def _flatness(x_k3: np.ndarray) -> float:
    """Of a ring: 1 for a root mean square deviation from its plane of 0.06 Å, -1 for 0.18 Å; cyclohexane has 0.25."""
    off = np.linalg.svd(x_k3 - x_k3.mean(0), compute_uv=False)[2] / np.sqrt(len(x_k3))
    return float(np.clip((0.12 - off) / 0.06, -1, 1))


def _angle(u_3: np.ndarray, v_3: np.ndarray) -> float:
    """Degrees; 90 if one of the two is zero."""
    size = np.linalg.norm(u_3) * np.linalg.norm(v_3)
    return float(np.degrees(np.arccos(np.clip(u_3 @ v_3 / size, -1, 1)))) if size > 0 else 90.0


def _dihedral(a_3: np.ndarray, i_3: np.ndarray, j_3: np.ndarray, b_3: np.ndarray) -> float:
    """Degrees between the planes a-i-j and i-j-b, 0 to 180."""
    return _angle(np.cross(a_3 - i_3, j_3 - i_3), np.cross(b_3 - j_3, j_3 - i_3))
