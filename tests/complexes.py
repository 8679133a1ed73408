"""Tiny generated ligands in pockets, in the layout of gdyn.engines.diffusion.layout, without the reader's code."""

from pathlib import Path

import h5py
import numpy as np

from gdyn.engines.diffusion import layout

BOND = 1.5
"""Å from one ligand atom to the next."""
SHELL = (3.0, 6.0)
"""Å: how far a pocket atom is from the ligand atom nearest to it, about."""


def ligand(atoms: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A random walk. Element, aromaticity and charge follow each other, so that something can be learned."""
    steps = rng.normal(size=(atoms, 3))
    element = rng.choice([6, 6, 6, 7, 8, 34], atoms)  # 34: an element without a class of its own
    return {
        "positions": (BOND * steps / np.linalg.norm(steps, axis=1, keepdims=True)).cumsum(0),
        "element": element,
        "aromatic": (element == 6) & (rng.random(atoms) < 0.5),
        "charge": np.where(element == 7, 1, np.where(element == 8, -1, 0)),
    }


def pocket(atoms: int, ligand_positions: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Residues of up to four atoms, strewn around the ligand; the last residue is of no standard kind."""
    directions = rng.normal(size=(atoms, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    number = np.arange(atoms) // 4
    residue = rng.integers(0, 20, number[-1] + 1)[number]
    residue[number == number[-1]] = 20
    names = np.array([*layout.RESIDUES, "MSE"], "S5")
    return {
        "positions": ligand_positions[rng.integers(0, len(ligand_positions), atoms)]
        + directions * rng.uniform(*SHELL, (atoms, 1)),
        "element": np.array([7, 6, 6, 8])[np.arange(atoms) % 4],
        "backbone": np.arange(atoms) % 8 < 4,
        "residue": residue,
        "residue_name": names[residue],
        "residue_number": 1 + number,
        "insertion_code": np.full(atoms, b""),
        "chain": np.full(atoms, b"A"),
        "atom_name": np.array([b"N", b"CA", b"C", b"O"])[np.arange(atoms) % 4],
    }


def write_complexes(
    path: Path,
    complexes: int = 8,
    ligand: tuple[int, int] = (8, 20),
    pocket: tuple[int, int] = (20, 40),
    seed: int = 0,
) -> Path:
    """A file of complexes whose numbers of atoms lie within `ligand` and `pocket`. Returns `path`."""
    rng = np.random.default_rng([seed, 5])
    sizes = {"ligand": rng.integers(ligand[0], ligand[1] + 1, complexes)}
    sizes["pocket"] = rng.integers(pocket[0], pocket[1] + 1, complexes)
    pairs = [_complex(int(n), int(m), rng) for n, m in zip(sizes["ligand"], sizes["pocket"], strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for part, columns in layout.COLUMNS.items():
            for name, (kind, _) in columns.items():
                file[f"{part}/{name}"] = np.concatenate([pair[part][name] for pair in pairs]).astype(kind)
            file[f"{part}/offsets"] = np.concatenate([[0], np.cumsum(sizes[part])])
        file["ligand/sizes"] = np.bincount(sizes["ligand"])
        file["ligand/smiles"] = np.array(["C" * n for n in sizes["ligand"]], h5py.string_dtype())
        file["centre"] = 20 * rng.normal(size=(complexes, 3))
        names = [f"complex{seed}_{i:04d}" for i in range(complexes)]
        file["identifier"] = np.array(names, h5py.string_dtype())
        file.attrs.update(layout=layout.LAYOUT, version=layout.VERSION, radius=10.0, hydrogens=False)
    return path


def _complex(n: int, m: int, rng: np.random.Generator) -> dict[str, dict[str, np.ndarray]]:
    inner = ligand(n, rng)
    outer = pocket(m, inner["positions"], rng)
    centre = outer["positions"].mean(0)
    for part in (inner, outer):
        part["positions"] = part["positions"] - centre
    return {"ligand": inner, "pocket": outer}
