"""Tiny generated protein structures in the layout of gdyn.engines.monodecoder.layout, without the readers' code."""

from pathlib import Path

import h5py
import numpy as np

from gdyn.engines.monodecoder import layout

FEATURES = 26


def chain(residues: int, rng: np.random.Generator) -> np.ndarray:
    """CA positions (L, 3), Å: steps of 3.8 Å that turn slowly, so that the chain folds back upon itself."""
    turns = rng.normal(size=(residues, 3)).cumsum(0) * 0.4 + rng.normal(size=(residues, 3))
    return 3.8 * (turns / np.linalg.norm(turns, axis=1, keepdims=True)).cumsum(0)


def structure(residues: int, rng: np.random.Generator, features: int = FEATURES) -> dict[str, np.ndarray]:
    """Arrays of one structure by their names below its group: "node/res/x", "edge/.../edge_index" and so on. Secondary
    structure and amino acids follow each other, so that something can be learned."""
    coordinates = chain(residues, rng)
    secondary = rng.integers(0, 3, -(-residues // 6)).repeat(6)[:residues]
    amino = (6 * secondary + rng.integers(0, 6, residues)) % 20
    angles = np.stack([secondary - 1.5, 1.5 - secondary, np.full(residues, 3.0)], 1) + 0.2 * rng.normal(
        size=(residues, 3)
    )
    angles[0] = angles[-1] = 0
    distances = np.linalg.norm(coordinates[:, None] - coordinates[None], axis=-1)
    contacts = np.argwhere((distances < layout.CONTACT_DISTANCE) & ~np.eye(residues, dtype=bool)).T
    following = np.stack([np.arange(residues - 1), np.arange(1, residues)])
    spectrum = np.zeros((residues, layout.SPECTRUM_WIDTH), complex)
    width = min(residues, layout.SPECTRUM_WIDTH)
    spectrum[:, :width] = np.fft.fft(distances, axis=1)[:, :width]
    flat = rng.normal(size=(2, 1, layout.SPECTRUM_2D_WIDTH))
    flat[0] = np.abs(flat[0])  # magnitudes
    node = {
        "res": np.concatenate([np.sin(angles), np.cos(angles) * (angles != 0), np.eye(20)[amino]], 1)[:, :features],
        "AA": np.eye(20)[amino],
        "coords": coordinates,
        "bondangles": angles,
        "plddt": rng.uniform(0.2, 1.0, (residues, 1)),
        "positions": np.zeros((residues, layout.POSITION_WIDTH)),
        "fourier1dr": np.abs(spectrum),
        "fourier1di": np.angle(spectrum),
        "fourier2dr": flat[0],
        "fourier2di": flat[1],
        "ss": np.eye(3)[secondary],
    }
    edges = {"contactPoints": contacts, "backbone": following[::-1], "backbonerev": following}
    arrays = {f"node/{name}/x": values.astype(np.float32) for name, values in node.items()}
    for link, index in edges.items():
        arrays[f"edge/res_{link}_res/edge_index"] = index.astype(np.int64)
        arrays[f"edge/res_{link}_res/edge_attr"] = distances[tuple(index)].astype(np.float32)
    return arrays


def write_proteins(
    path: Path, structures: int = 8, residues: tuple[int, int] = (20, 60), seed: int = 0, index: bool = True
) -> Path:
    """A file of `structures` chains whose lengths lie within `residues`. Returns `path`."""
    rng = np.random.default_rng([seed, 3])
    lengths = rng.integers(residues[0], residues[1] + 1, structures)
    names = [f"protein{seed}_{i:04d}" for i in range(structures)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, length in zip(names, lengths, strict=True):
            for key, values in structure(int(length), rng).items():
                file[f"structs/{name}/{key}"] = values
        if index:
            file["index/identifier"] = np.array(names, dtype=h5py.string_dtype())
            file["index/residues"] = lengths.astype(np.int32)
            file.attrs.update(layout=layout.LAYOUT, version=layout.VERSION, amino_acids=layout.AMINO_ACIDS)
    return path
