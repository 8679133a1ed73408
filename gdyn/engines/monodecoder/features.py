"""The arrays of one protein chain, as `layout` describes them, from its backbone.

Legend: L residues; the backbone (L, 4, 3) has N, CA, C, O of each, Å; joined (L - 1,) says whether a peptide bond joins
residues i and i + 1.
"""

from __future__ import annotations

import numpy as np

from gdyn.engines.monodecoder.chains import PEPTIDE_BOND
from gdyn.engines.monodecoder.layout import (
    AMINO_ACIDS,
    CONTACT_DISTANCE,
    SECONDARY,
    SPECTRUM_2D_WIDTH,
    SPECTRUM_WIDTH,
    TRIANGLE,
)
from gdyn.extras import optional

CARBONYL_BOND = 1.231
"""Å, C=O (Engh and Huber 1991)."""
GAP = 5
"""Rows of nothing that keep what DSSP sees of two fragments apart: its widest turn is of five residues."""


def features(
    letters: str, backbone: np.ndarray, plddt: np.ndarray, properties: np.ndarray, frames: bool = False
) -> dict[str, np.ndarray]:
    """The arrays of a structure by their names within its group ("node/res/x", "edge/res_hbond_res/edge_index"): all
    but `positions` and the two godnodes, which depend on L alone.

    letters: L codes, X unknown. backbone: an O may be NaN. plddt: (L,), 0..1. properties: (20, P), in the order of
    AMINO_ACIDS; an unknown residue's are 0. frames: append frame and step to `res`, which then turn with the molecule.
    """
    joined = peptide_bonds(backbone)
    backbone = with_oxygens(backbone, joined)
    positions = backbone[:, 1]
    amino_acids = (np.array(list(letters))[:, None] == list(AMINO_ACIDS)).astype(float)
    angles = torsions(backbone, joined)
    orientations, steps = orient(backbone), np.zeros_like(positions)
    steps[:-1] = np.where(joined[:, None], np.diff(positions, axis=0), 0)
    distances = np.linalg.norm(positions[:, None] - positions, axis=-1)
    secondary, hbonds = secondary_structure(backbone, joined, np.array(list(letters)) != "P")
    defined = angles != 0
    res = [np.sin(angles), np.cos(angles) * defined, amino_acids @ properties, amino_acids]
    if frames:
        res += [orientations.reshape(-1, 9), steps]
    nodes = {
        "res": np.concatenate(res, axis=1),
        "AA": amino_acids,
        "coords": positions,
        "R_true": orientations,
        "t_true": steps,
        "bondangles": angles,
        "plddt": plddt[:, None],
        "ss": secondary,
    }
    nodes["fourier1dr"], nodes["fourier1di"] = row_spectra(distances)
    nodes["fourier2dr"], nodes["fourier2di"] = corner_spectrum(distances)
    arrays = {f"node/{name}/x": values.astype(np.float32) for name, values in nodes.items()}
    for link, index in links(distances, joined, hbonds).items():
        arrays[f"edge/res_{link}_res/edge_index"] = index.astype(np.int64)
        arrays[f"edge/res_{link}_res/edge_attr"] = distances[tuple(index)].astype(np.float32)
    return arrays


def peptide_bonds(backbone: np.ndarray) -> np.ndarray:
    """(L - 1,) bool."""
    return np.linalg.norm(backbone[1:, 0] - backbone[:-1, 2], axis=-1) < PEPTIDE_BOND


def with_oxygens(backbone: np.ndarray, joined: np.ndarray) -> np.ndarray:
    """The backbone with every missing O where it must be: in the plane of CA, C and the next N, on the outer side. At
    the end of a fragment as if the chain went on, extended."""
    n, ca, c, o = backbone.transpose(1, 0, 2)
    following = c + ca - n
    following[:-1][joined] = n[1:][joined]
    inward = _unit(ca - c) + _unit(following - c)
    ideal = c - CARBONYL_BOND * _unit(inward)
    return np.stack([n, ca, c, np.where(np.isfinite(o).all(axis=1, keepdims=True), o, ideal)], axis=1)


def torsions(backbone: np.ndarray, joined: np.ndarray) -> np.ndarray:
    """(L, 3) phi, psi, omega, radians; omega is that of the bond to the next residue. 0 where an atom is missing: at
    the ends and at breaks."""
    n, ca, c, _ = backbone.transpose(1, 0, 2)
    angles = np.zeros((len(backbone), 3))
    angles[1:, 0] = joined * dihedrals(c[:-1], n[1:], ca[1:], c[1:])
    angles[:-1, 1] = joined * dihedrals(n[:-1], ca[:-1], c[:-1], n[1:])
    angles[:-1, 2] = joined * dihedrals(ca[:-1], c[:-1], n[1:], ca[1:])
    return angles


def dihedrals(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Angles of rotation about b-c, radians, within (-π, π], 0 where a and d are on one side (IUPAC). Each (..., 3)."""
    axis = c - b
    left, right = np.cross(b - a, axis), np.cross(axis, d - c)
    sine = np.linalg.norm(axis, axis=-1) * ((b - a) * right).sum(-1)
    return np.arctan2(sine, (left * right).sum(-1))


def orient(backbone: np.ndarray) -> np.ndarray:
    """(L, 3, 3): the residues' frames, columns x along CA-C, y towards N, z = x × y."""
    n, ca, c, _ = backbone.transpose(1, 0, 2)
    x = _unit(c - ca)
    y = _unit(n - ca - ((n - ca) * x).sum(-1, keepdims=True) * x)
    return np.stack([x, y, np.cross(x, y)], axis=-1)


def secondary_structure(backbone: np.ndarray, joined: np.ndarray, amide: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((L, 3) one-hot loop, helix, strand; (2, E) hydrogen bonds in both directions), by PyDSSP (Minami 2023).

    amide: (L,) bool, false for proline, which has no hydrogen to give. Neither has the first residue of a fragment, as
    its place is unknown.
    """
    pydssp = optional("pydssp.pydssp_numpy")
    row = np.arange(len(backbone)) + GAP * np.concatenate([[0], np.cumsum(~joined)])
    rows = row[-1] + 1 + GAP
    # so far away, and apart, that nothing bonds; float32 because PyDSSP's (L, L, 3) are what takes time and memory
    spaced = np.repeat(1e4 + 1e2 * np.arange(4 * rows, dtype=np.float32), 3).reshape(rows, 4, 3)
    spaced[row] = backbone - backbone.mean(axis=(0, 1))
    donor = np.zeros(rows, np.float32)
    donor[row] = amide & np.concatenate([[False], joined])
    with np.errstate(divide="ignore", invalid="ignore"):  # atoms in one place: no bond
        classes = pydssp.assign(spaced, donor)[row].argmax(axis=-1)
        bonded = pydssp.get_hbond_map(spaced, donor)[np.ix_(row, row)] > 0
    return np.eye(len(SECONDARY))[classes], np.stack(np.nonzero(bonded | bonded.T))


def links(distances: np.ndarray, joined: np.ndarray, hbonds: np.ndarray) -> dict[str, np.ndarray]:
    """Edges (2, E) between residues by link, sorted by source. Neither backbone nor windows cross a break."""
    here = np.arange(len(distances))
    apart = here - here[:, None]
    fragment = np.concatenate([[0], np.cumsum(~joined)])
    near = {step: (apart == step) & (fragment == fragment[:, None]) for step in (-2, -1, 1, 2)}
    masks = {
        "backbone": near[-1],
        "backbonerev": near[1],
        "window": near[-1] | near[-2],
        "windowrev": near[1] | near[2],
        "contactPoints": (distances < CONTACT_DISTANCE) & (apart != 0),
    }
    return {link: np.stack(np.nonzero(mask)) for link, mask in masks.items()} | {"hbond": hbonds}


def row_spectra(distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Magnitude and phase (L, 80) of the lowest frequencies of each row's FFT; both 0 beyond the L that there are."""
    spectra = np.zeros((len(distances), SPECTRUM_WIDTH), complex)
    kept = np.fft.fft(distances, axis=1)[:, :SPECTRUM_WIDTH]
    spectra[:, : kept.shape[1]] = kept
    return _polar(spectra)


def corner_spectrum(distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Magnitude and phase (1, 1300) of the two-dimensional FFT in triangles at its four corners, where the frequencies
    are low, row by row. A matrix smaller than two triangles is padded with zeros, to (50, 50), before the FFT, so that
    the triangles never overlap."""
    size = max(len(distances), 2 * TRIANGLE)
    corners = np.r_[:TRIANGLE, size - TRIANGLE : size]
    columns = np.fft.fft(distances, size, axis=1)[:, corners]
    block = np.fft.fft(columns, size, axis=0)[corners]
    i, j = np.indices((TRIANGLE, TRIANGLE))
    triangles = np.block([[i + j < TRIANGLE, i <= j], [i >= j, i + j >= TRIANGLE - 1]])
    return _polar(block[triangles].reshape(1, SPECTRUM_2D_WIDTH))


def _polar(spectrum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Magnitude, and phase within (-π, π]. Parts that are rounding errors are zeros first: else they would choose
    between π and -π wherever symmetry makes a value real."""
    noise = 1e-12 * np.abs(spectrum).max(initial=0)
    real, imaginary = (np.where(np.abs(part) > noise, part, 0) for part in (spectrum.real, spectrum.imag))
    return np.hypot(real, imaginary), np.arctan2(imaginary, real)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
