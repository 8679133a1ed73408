"""Backbones built from their angles, and the text of structure files, without the code under test."""

from collections.abc import Sequence

import numpy as np

THREE = dict(
    zip(
        "ACDEFGHIKLMNPQRSTVWY",
        "ALA CYS ASP GLU PHE GLY HIS ILE LYS LEU MET ASN PRO GLN ARG SER THR VAL TRP TYR".split(),
        strict=True,
    )
)
HELIX, STRAND = (-57.8, -47.0), (-139.0, 135.0)
"""phi, psi in degrees (Arnott and Dover 1967)."""


def place(a: np.ndarray, b: np.ndarray, c: np.ndarray, bond: float, angle: float, torsion: float) -> np.ndarray:
    """The atom d at `bond` Å from c, with the angle b-c-d and the torsion a-b-c-d in degrees."""
    angle, torsion = np.deg2rad([angle, torsion])
    forward = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, forward)
    normal /= np.linalg.norm(normal)
    local = bond * np.array([-np.cos(angle), np.sin(angle) * np.cos(torsion), np.sin(angle) * np.sin(torsion)])
    return c + local @ [forward, np.cross(normal, forward), normal]


def build(angles: Sequence[tuple[float, float]], omega: float = 180.0) -> np.ndarray:
    """(L, 4, 3) N, CA, C, O with these phi and psi, degrees; the first phi has no effect."""
    n, ca, c = np.array([[0.0, 0, 0], [1.458, 0, 0], [2.009, 1.420, 0]])
    residues = []
    for i, (_, psi) in enumerate(angles):
        residues.append([n, ca, c, place(n, ca, c, 1.231, 120.5, psi + 180)])
        if i + 1 < len(angles):
            following = place(n, ca, c, 1.329, 116.2, psi)
            alpha = place(ca, c, following, 1.458, 121.7, omega)
            n, ca, c = following, alpha, place(c, following, alpha, 1.525, 111.2, angles[i + 1][0])
    return np.array(residues)


def wandering(residues: int, seed: int = 0) -> np.ndarray:
    """A chain of any shape, its angles drawn from helix and strand; omega is not 180 degrees, where signs flip."""
    rng = np.random.default_rng(seed)
    kinds = np.repeat(rng.integers(0, 2, -(-residues // 5)), 5)[:residues]
    return build([tuple(np.array((HELIX, STRAND)[kind]) + rng.normal(0, 12, 2)) for kind in kinds], omega=176.0)


def atom_line(
    atom: str,
    residue: str,
    number: int,
    position: Sequence[float],
    b: float = 20.0,
    chain: str = "A",
    altloc: str = " ",
    occupancy: float = 1.0,
    record: str = "ATOM",
) -> str:
    x, y, z = position
    return (
        f"{record:<6}{1:>5} {' ' + atom if len(atom) < 4 else atom:<4}{altloc}{residue:>3} {chain}{number:>4}    "
        f"{x:8.3f}{y:8.3f}{z:8.3f}{occupancy:6.2f}{b:6.2f}          {atom[0]:>2}"
    )


def pdb(
    letters: str, backbone: np.ndarray, b: Sequence[float] | float = 20.0, chain: str = "A", header: str = ""
) -> str:
    """The text of a PDB file with one chain; an atom that is NaN is left out."""
    values = np.broadcast_to(b, len(letters))
    lines = [header] if header else []
    for number, (letter, atoms, value) in enumerate(zip(letters, backbone, values, strict=True), 1):
        for name, position in zip(("N", "CA", "C", "O"), atoms, strict=True):
            if np.isfinite(position).all():
                lines.append(atom_line(name, THREE.get(letter, letter), number, position, value, chain))
    return "\n".join([*lines, "TER", "END", ""])


def mmcif(letters: str, backbone: np.ndarray, b: Sequence[float] | float = 20.0, header: str = "") -> str:
    """The text of an mmCIF file with one chain."""
    values = np.broadcast_to(b, len(letters))
    names = (
        "group_PDB id type_symbol label_atom_id label_alt_id label_comp_id label_asym_id label_entity_id label_seq_id"
    )
    names += " Cartn_x Cartn_y Cartn_z occupancy B_iso_or_equiv auth_seq_id auth_asym_id pdbx_PDB_model_num"
    lines = ["data_x", header, "loop_", *(f"_atom_site.{name}" for name in names.split())]
    for number, (letter, atoms, value) in enumerate(zip(letters, backbone, values, strict=True), 1):
        for name, (x, y, z) in zip(("N", "CA", "C", "O"), atoms, strict=True):
            site = f"ATOM 1 {name[0]} {name} . {THREE[letter]} A 1 {number}"
            lines.append(f"{site} {x:.3f} {y:.3f} {z:.3f} 1.0 {value:.2f} {number} A 1")
    return "\n".join([*lines, "#", ""])
