"""The k nearest neighbours of every atom, and the local polarisation of a perovskite, in one frame.

Legend: B frames, N atoms, k neighbours, p pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from gdyn.engines.vamp.sources import SYMBOLS, Frame
from gdyn.errors import UserError
from gdyn.extras import optional

ALL_PAIRS_ATOMS = 64
"""Open systems up to this size take all pairs in NumPy, many frames at once: exact, and quicker than list by list."""
FIRST_CUTOFF = 4.0
"""Å; grown by `GROWTH` until every atom has its neighbours."""
GROWTH = 1.25
C_PER_M2 = 16.02176634
"""1 e/Å² in C/m²."""


class KNearest:
    """Finds k neighbours per atom.

    Every periodic image of an atom, of the centre itself too, is a neighbour of its own, so cells smaller than the
    neighbour shell work. Equal distances (as float32) are ordered by index.
    """

    def __init__(self, k: int, max_cutoff: float):
        self.k = k
        self.max_cutoff = max_cutoff
        self.cutoff = min(FIRST_CUTOFF, max_cutoff)

    def find(self, frames: Sequence[Frame]) -> tuple[np.ndarray, np.ndarray]:
        """Indices (B, N, k) int32 and distances (B, N, k) float32 Å, ascending, of B frames of one system.

        Raises: UserError naming the frame and the atom that has fewer than k neighbours within max_cutoff.
        """
        if len(frames[0].positions) <= ALL_PAIRS_ATOMS and all(frame.cell is None for frame in frames):
            return self._all_pairs(frames)
        found = [self._search(frame) for frame in frames]
        return np.stack([indices for indices, _ in found]), np.stack([distances for _, distances in found])

    def _search(self, frame: Frame) -> tuple[np.ndarray, np.ndarray]:
        while True:
            i, j, distance = pairs(frame, self.cutoff, "ijd")
            found = np.bincount(i, minlength=len(frame.positions))
            if found.min() >= self.k:
                break
            if self.cutoff >= self.max_cutoff:
                self._too_few(frame, int(found.argmin()), int(found.min()))
            self.cutoff = min(self.cutoff * GROWTH, self.max_cutoff)
        order = _by_distance(i, j, distance)
        chosen = order[(np.cumsum(found) - found)[:, None] + np.arange(self.k)]
        return j[chosen].astype(np.int32), distance[chosen].astype(np.float32)

    def _all_pairs(self, frames: Sequence[Frame]) -> tuple[np.ndarray, np.ndarray]:
        positions = np.stack([frame.positions for frame in frames])
        square = np.zeros((*positions.shape[:2], positions.shape[1]))
        for axis in range(3):
            x = positions[..., axis]
            square += (x[:, None, :] - x[:, :, None]) ** 2
        distance = np.sqrt(square).astype(np.float32)
        itself = np.arange(positions.shape[1])
        distance[:, itself, itself] = np.inf
        indices = np.argsort(distance, axis=-1, kind="stable")[..., : self.k].astype(np.int32)
        nearest = np.take_along_axis(distance, indices, axis=-1)
        if nearest.max() > self.max_cutoff:
            frame, atom, rank = np.argwhere(nearest > self.max_cutoff)[0]
            self._too_few(frames[frame], int(atom), int(rank))
        return indices, nearest

    def _too_few(self, frame: Frame, atom: int, found: int) -> NoReturn:
        raise UserError(
            f"frame {frame.number}: atom {atom} of the graph has {found} neighbours within {self.max_cutoff:g} Å, "
            f"{self.k} are wanted; ask for fewer with --neighbours or raise --max_cutoff."
        )


def pairs(frame: Frame, cutoff: float, quantities: str) -> list[np.ndarray]:
    """All p pairs within the cutoff, both ways: "i" (p,), "j" (p,), "D" the vector i -> j (p, 3) Å, "d" (p,) Å."""
    search = optional("vesin").NeighborList(cutoff=cutoff, full_list=True, n_threads=1)
    box = np.zeros((3, 3)) if frame.cell is None else frame.cell
    found = search.compute(frame.positions, box, frame.periodic, quantities)
    return [values.astype(np.int64) if values.dtype.kind == "u" else values for values in found]


def _by_distance(i: np.ndarray, j: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Order pairs by i, then distance, then j; float32 so that a perfect crystal's equal distances are equal."""
    # The bits of a positive float32 sort like the number: i and distance in one integer sort 4 times as fast.
    key = (i.astype(np.uint64) << np.uint64(32)) | distance.astype(np.float32).view(np.uint32)
    by_index = np.argsort(j, kind="stable")
    return by_index[np.argsort(key[by_index], kind="stable")]


@dataclass(frozen=True)
class Perovskite:
    """Species of an ABO3 perovskite with their Born effective charges, e; several species may share a site."""

    a: dict[str, float]
    """Element -> charge on the A site, e.g. Ba: 2.75."""
    b: dict[str, float]
    """Element -> charge on the B site, e.g. Ti: 7.16."""
    o: dict[str, float]
    """Element -> (isotropic) charge on the anion site, e.g. O: -3.303; A + B + 3 O must be neutral."""

    def charges(self, site: str, atom_types: np.ndarray) -> np.ndarray:
        """(N,) the Born charge of every atom on site "a", "b" or "o", NaN for all others."""
        species: dict[str, float] = getattr(self, site)
        result = np.full(len(atom_types), np.nan)
        for symbol, charge in species.items():
            if symbol not in SYMBOLS:
                raise UserError(f"--ferro.{site}: {symbol!r} is not an element symbol.")
            result[atom_types == SYMBOLS.index(symbol)] = charge
        if np.isnan(result).all():
            raise UserError(f"--ferro.{site}: the trajectory has no {' or '.join(species)} atom.")
        return result

    def check(self, atom_types: np.ndarray) -> None:
        """Raises: UserError if a site is empty, or if the charges do not add up: P would depend on the origin."""
        a, b, o = (float(np.nanmean(self.charges(site, atom_types))) for site in "abo")
        if abs(a + b + 3 * o) > 0.1:
            total = a + b + 3 * o
            raise UserError(f"--ferro: A {a:g} + B {b:g} + 3 x O {o:g} = {total:g} e per cell; make it neutral.")

    def polarisation(self, frame: Frame, atom_types: np.ndarray) -> np.ndarray:
        """Local polarisation around every B atom, (N, 3) float32, C/m²; zero for the other atoms.

        P = (Z_B r_B + 1/8 sum_8 Z_A r_A + 1/2 sum_6 Z_O r_O) / V with V the volume per B atom. Positions are relative
        to B, so its own term vanishes and its charge acts through neutrality. The term of a vacancy is left out.
        Raises: UserError if the frame is not periodic or a B atom has no A or no O around it.
        """
        if frame.cell is None or not frame.periodic.all():
            raise UserError(f"frame {frame.number}: --ferro needs a cell that is periodic in three directions.")
        on_b = ~np.isnan(self.charges("b", atom_types))
        volume = abs(float(np.linalg.det(frame.cell))) / on_b.sum()
        edge = volume ** (1 / 3)
        total = np.zeros((len(atom_types), 3))
        i, j, vector, distance = pairs(frame, 1.25 * edge, "ijDd")
        # In units of the edge, A sits at 0.87 and its next shell at 1.66; O at 0.5, its next at 1.12.
        for site, count, radius in (("a", 8, 1.25 * edge), ("o", 6, 0.8 * edge)):
            charge = self.charges(site, atom_types)
            near = np.flatnonzero(on_b[i] & ~np.isnan(charge[j]) & (distance < radius))
            near = near[_by_distance(i[near], j[near], distance[near])]
            found = np.bincount(i[near], minlength=len(atom_types))
            if (found[on_b] == 0).any():
                atom = int(np.flatnonzero(on_b & (found == 0))[0])
                raise UserError(
                    f"frame {frame.number}: atom {atom} has no {site.upper()}-site neighbour within {radius:.2f} Å; "
                    "is this a perovskite?"
                )
            rank = np.arange(len(near)) - (np.cumsum(found) - found)[i[near]]
            near = near[rank < count]
            np.add.at(total, i[near], charge[j[near], None] * vector[near] / count * (1 if site == "a" else 3))
        return (total / volume * C_PER_M2).astype(np.float32)
