"""What the benchmarks train: random frames of two sizes, the default network, VAMP-2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gdyn.engines.vamp import score
from gdyn.engines.vamp.engine import Vamp

BATCH = 32
"""Pairs per step."""


@dataclass(frozen=True)
class Size:
    atoms: int
    neighbours: int
    targets: int

    def __str__(self) -> str:
        return f"N{self.atoms} K{self.neighbours}, {self.targets} targets"


SMALL, LARGE, ALL_TARGETS = Size(64, 12, 20), Size(100, 16, 20), Size(64, 12, 64)


def engine(train: Path, validation: Path | None = None) -> Vamp:
    """The defaults: 3 convolutions, 64 features, 50 Gaussians up to 6 Å, 10 states, two lobes, lag 10 frames."""
    return Vamp(train=[str(train)], validation=[str(validation or train)])


def write_trajectory(folder: Path, frames: int, size: Size) -> Path:
    """Random frames, which take as long as real ones; distances 2-6 Å, nearest first. Returns `folder`."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    shape = (frames, size.atoms, size.neighbours)
    np.save(folder / "atom_types.npy", rng.integers(1, 90, size.atoms, dtype=np.int32))
    np.save(folder / "target_index.npy", np.arange(size.targets, dtype=np.int32))
    np.save(folder / "nbr_lists.npy", rng.integers(0, size.atoms, shape, dtype=np.int32))
    np.save(folder / "nbr_dists.npy", np.sort(2 + 4 * rng.random(shape, dtype=np.float32)))
    return folder


def vamp2_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Its gradient is that of minus VAMP-2 of probabilities (rows, states); its value is not (see `score.share`).
    This is gdyn's algebra, and nothing that training does not need."""
    states = x.shape[-1]
    basis = score.simplex_basis(states)
    x, y = ((p.double() - 1 / states) @ basis for p in (x, y))
    covariances = score.covariances(score.moments(x.detach(), y.detach()))
    slope = score.vamp2(covariances, score.Inversion())
    return -score.share(slope, covariances, x, y)
