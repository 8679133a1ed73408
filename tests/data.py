"""Tiny generated trajectories with a slow process, in the format of gdyn.engines.vamp.frames."""

from pathlib import Path

import numpy as np

SWITCHING = 0.02
"""Chance per frame that the target changes its site; the slow process decays with -1 / ln(1 - 2 SWITCHING) = 24.5 "
"frames."""


def hidden_states(frames: int, seed: int = 0) -> np.ndarray:
    """A symmetric two-state Markov chain, (F,) of 0 and 1: what a trained network should find."""
    return np.cumsum(np.random.default_rng([seed, 1]).random(frames) < SWITCHING) % 2


def write_trajectory(
    folder: Path,
    frames: int = 400,
    atoms: int = 6,
    neighbours: int = 4,
    targets: int = 1,
    ferro: bool = False,
    seed: int = 0,
) -> Path:
    """A host of atoms that vibrate in place, and targets that hop together between two sites of it. Returns `folder`.

    Distances in Å, `neighbours` nearest first. ferro: every atom also has a noisy vector that points up or
    down with the state.
    """
    rng, states = np.random.default_rng([seed, 2]), hidden_states(frames, seed)
    host = 2.0 * np.random.default_rng(7).normal(size=(atoms, 3))  # of one system, whatever the seed
    sites = host[:targets, None] + np.array([[1.5, 0.0, 0.0], [-1.5, 0.0, 0.0]])
    positions = host + 0.1 * rng.normal(size=(frames, atoms, 3))
    positions[:, :targets] += sites[:, states].transpose(1, 0, 2) - host[:targets]
    distances = np.linalg.norm(positions[:, :, None] - positions[:, None], axis=-1) + 1e6 * np.eye(atoms)
    nearest = np.argsort(distances, axis=-1)[..., :neighbours]
    folder.mkdir(parents=True)
    np.save(folder / "atom_types.npy", np.array([3] * targets + [8] * (atoms - targets), np.int32))
    np.save(folder / "target_index.npy", np.arange(targets, dtype=np.int32))
    np.save(folder / "nbr_lists.npy", nearest.astype(np.int32))
    np.save(folder / "nbr_dists.npy", np.take_along_axis(distances, nearest, -1).astype(np.float32))
    if ferro:
        directions = 0.3 * rng.normal(size=(frames, atoms, 3)) + (2 * states[:, None, None] - 1) * np.array([0, 0, 1.0])
        np.save(folder / "atom_directions.npy", directions.astype(np.float32))
    return folder
