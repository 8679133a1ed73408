"""How good sampled molecules are, by the definitions of the field, each with its source.

Legend: n atoms of a molecule, m of its pocket.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from gdyn.engines.diffusion.stability import stable_atoms
from gdyn.errors import MissingFile, UserError
from gdyn.extras import optional

CLASH = 0.75
"""Of the sum of two van der Waals radii: what is closer clashes (PoseBusters' limit)."""
FINGERPRINT = {"radius": 2, "fpSize": 1024}
"""Morgan fingerprints of the diversity."""

Row = dict[str, Any]


def table(
    molecules: Mapping[str, Sequence[Any]],
    pockets: Mapping[str, str | Path],
    training_smiles: set[str],
    checks: str = "dock",
    workers: int = 1,
) -> list[Row]:
    """One row per molecule, in the order of `molecules` (pocket -> RDKit molecules of `molecules.build`). None: not
    defined for this molecule. pockets: pocket -> PDB file, or its text.

    pocket, number (from 1 in each pocket), atoms
    smiles: of the largest fragment, canonical, without stereochemistry and hydrogens; empty if it is not valid
    fragments, connected: parts without bonds between them; one part
    valid: RDKit can sanitise the largest fragment, and no element is unknown (E. Hoogeboom et al., ICML 2022, EDM)
    novel: valid, and none of `training_smiles`, stereochemistry aside
    qed: drug-likeness of the largest fragment, 0 to 1 (G. R. Bickerton et al., Nat. Chem. 2012, 4, 90)
    stable_atoms, stable: share of stable atoms, and whether all are (EDM, see `stability`)
    clashes: pairs of heavy atoms of ligand and pocket closer than CLASH of the sum of their van der Waals radii
    pb_<check>, pb_pass: PoseBusters' checks of a ligand in a pocket, and whether all hold (M. Buttenschoen et al.,
        Chem. Sci. 2024, 15, 3130); what cannot be checked does not hold. All None where PoseBusters itself failed.

    `checks` "dock" are all of PoseBusters', seconds per molecule, most of them for the internal energy; "dock_fast" are
    the others. They are divided among `workers` processes.

    Raises: MissingFile, UserError for a missing package, a pocket that is no PDB file, or a worker that was killed.
    """
    texts = {name: _pdb_text(name, pockets[name]) for name, group in molecules.items() if group}
    with optional("rdkit.rdBase", "sample").BlockLogs():
        known = {_unadorned(smiles) for smiles in training_smiles}
        rows = [
            _row(name, number, molecule, texts[name], known)
            for name, group in molecules.items()
            for number, molecule in enumerate(group, 1)
        ]
    jobs = [(molecule, texts[name], checks) for name, group in molecules.items() for molecule in group]
    found = _pose_checks(jobs, workers)
    names = list(dict.fromkeys(chain.from_iterable(found)))
    for row, held in zip(rows, found, strict=True):
        row["pb_pass"] = all(value is True for value in held.values()) if held else None
        row.update({f"pb_{name}": held.get(name) for name in names})
    return rows


def summary(rows: Sequence[Row], molecules: Mapping[str, Sequence[Any]]) -> dict[str, Row]:
    """Of "all" molecules and of each pocket's. None: there is nothing to average.

    number; valid, connected, molecule_stability, clash_free: shares of all molecules
    uniqueness: different SMILES, of the valid molecules
    novelty: different SMILES that are novel, of the different SMILES
    qed: mean over the valid molecules
    diversity: 1 - mean Tanimoto similarity of all pairs of valid molecules of a pocket, by Morgan fingerprints of
        radius 2 and 1024 bits (X. Peng et al., ICML 2022, Pocket2Mol); of all molecules, its mean over pockets
    atom_stability: stable atoms, of the atoms of all molecules
    pb_checked: molecules that PoseBusters could check; pb_pass and each pb_<check>: shares of these. A check that
        could not be made, of a bond length in a molecule that is not valid, say, does not hold
    """
    optional("rdkit.Chem", "sample")
    pockets = {name: _summary([row for row in rows if row["pocket"] == name]) for name in molecules}
    return {"all": _summary(rows) | {"diversity": _mean(part["diversity"] for part in pockets.values())}, **pockets}


def largest_fragment(molecule: Any) -> Any:
    """The part with most heavy atoms, as it was built; None if there are no atoms."""
    chem = optional("rdkit.Chem", "sample")
    parts = chem.GetMolFrags(molecule, asMols=True, sanitizeFrags=False)
    return max(parts, key=lambda part: part.GetNumHeavyAtoms(), default=None)


def sanitised(molecule: Any) -> Any:
    """A copy with valences, rings and aromaticity, or None if RDKit finds a mistake or there is an unknown element."""
    chem = optional("rdkit.Chem", "sample")
    if molecule is None or any(atom.GetAtomicNum() == 0 for atom in molecule.GetAtoms()):
        return None
    copy = chem.Mol(molecule)
    try:
        chem.SanitizeMol(copy)
    except (ValueError, RuntimeError):
        return None
    return copy


def _row(pocket: str, number: int, molecule: Any, text: str, known: set[str]) -> Row:
    chem, qed = optional("rdkit.Chem", "sample"), optional("rdkit.Chem.QED", "sample")
    fragments = len(chem.GetMolFrags(molecule))
    dummies = any(atom.GetAtomicNum() == 0 for atom in molecule.GetAtoms())
    valid = None if dummies else sanitised(largest_fragment(molecule))
    smiles = "" if valid is None else _smiles(valid)
    stable = stable_atoms(molecule)
    return {
        "pocket": pocket,
        "number": number,
        "atoms": molecule.GetNumAtoms(),
        "smiles": smiles,
        "fragments": fragments,
        "valid": valid is not None,
        "connected": fragments == 1,
        "novel": None if valid is None else smiles not in known,
        "qed": None if valid is None else float(qed.qed(valid)),
        "stable_atoms": float(stable.mean()) if len(stable) else None,
        "stable": bool(len(stable) and stable.all()),
        "clashes": _clashes(molecule, _pocket(text)),
    }


def _summary(rows: Sequence[Row]) -> Row:
    valid = [row for row in rows if row["valid"]]
    different = {row["smiles"] for row in valid}
    checked = [row for row in rows if row["pb_pass"] is not None]
    checks = dict.fromkeys(name for row in checked for name in row if name.startswith("pb_"))
    atoms = sum(row["atoms"] for row in rows)
    return {
        "number": len(rows),
        "valid": _mean(row["valid"] for row in rows),
        "connected": _mean(row["connected"] for row in rows),
        "uniqueness": len(different) / len(valid) if valid else None,
        "novelty": len({row["smiles"] for row in valid if row["novel"]}) / len(different) if different else None,
        "qed": _mean(row["qed"] for row in valid),
        "diversity": _diversity([row["smiles"] for row in valid]),
        "atom_stability": sum(row["atoms"] * (row["stable_atoms"] or 0) for row in rows) / atoms if atoms else None,
        "molecule_stability": _mean(row["stable"] for row in rows),
        "clash_free": _mean(row["clashes"] == 0 for row in rows),
        "pb_checked": len(checked),
        "pb_pass": None,
        **{name: _mean(row[name] is True for row in checked) for name in checks},
    }


def _mean(values: Any) -> float | None:
    """Over what is known."""
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _diversity(smiles: Sequence[str]) -> float | None:
    """None with fewer than two molecules."""
    if len(smiles) < 2:
        return None
    chem, structs = optional("rdkit.Chem", "sample"), optional("rdkit.DataStructs", "sample")
    maker = optional("rdkit.Chem.rdFingerprintGenerator", "sample").GetMorganGenerator(**FINGERPRINT)
    prints = [maker.GetFingerprint(chem.MolFromSmiles(text)) for text in smiles]
    total = sum(sum(structs.BulkTanimotoSimilarity(prints[i], prints[:i])) for i in range(1, len(prints)))
    return float(1 - total / (len(prints) * (len(prints) - 1) / 2))


def _smiles(molecule: Any) -> str:
    """Of a sanitised molecule, in the form in which molecules are compared."""
    chem = optional("rdkit.Chem", "sample")
    return str(chem.MolToSmiles(chem.RemoveHs(molecule, sanitize=False), isomericSmiles=False))


def _unadorned(smiles: str) -> str:
    """In the same form; as it is where it cannot be read."""
    molecule = optional("rdkit.Chem", "sample").MolFromSmiles(smiles)
    return smiles if molecule is None else _smiles(molecule)


def _clashes(molecule: Any, pocket: Any) -> int:
    if not molecule.GetNumAtoms():
        return 0
    (x_n3, radii_n), (y_m3, radii_m) = _heavy(molecule), _heavy(pocket)
    distances_nm = np.linalg.norm(x_n3[:, None] - y_m3[None], axis=-1)
    return int((distances_nm < CLASH * (radii_n[:, None] + radii_m[None])).sum())


def _heavy(molecule: Any) -> tuple[np.ndarray, np.ndarray]:
    """Positions, Å, and van der Waals radii of all atoms but hydrogens; an unknown element has none."""
    periodic = optional("rdkit.Chem", "sample").GetPeriodicTable()
    numbers = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()])
    radii = np.array([periodic.GetRvdw(int(number)) for number in numbers])
    return molecule.GetConformer().GetPositions()[numbers != 1], radii[numbers != 1]


def _pdb_text(name: str, pocket: str | Path) -> str:
    """Raises: MissingFile, UserError."""
    if isinstance(pocket, str) and "\n" in pocket:
        origin, text = f"pocket {name}", pocket
    else:
        origin = str(pocket)
        try:
            text = Path(pocket).read_text()
        except OSError as error:
            raise MissingFile(f"{origin}, the pocket of {name}, cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise UserError(f"{origin}, the pocket of {name}, is not a text file; a PDB file is expected.") from None
    if not (found := _pocket(text)) or not found.GetNumAtoms():
        raise UserError(f"{origin} has no atoms that RDKit can read; a PDB file is expected.")
    return text


@lru_cache(maxsize=64)
def _pocket(text: str) -> Any:
    """As PoseBusters reads it: no bonds are guessed, nothing is checked."""
    chem = optional("rdkit.Chem", "sample")
    with optional("rdkit.rdBase", "sample").BlockLogs():
        return chem.MolFromPDBBlock(text, sanitize=False, removeHs=False, proximityBonding=False)


def _pose_checks(jobs: Sequence[tuple[Any, str, str]], workers: int) -> list[dict[str, bool | None]]:
    optional("posebusters", "sample")
    if workers == 1 or len(jobs) < 2:
        return [_pose_check(job) for job in jobs]
    # spawn: a fork of a process with torch's threads may hang
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            return list(pool.map(_pose_check, jobs))
        except BrokenProcessPool:
            raise UserError("a worker process was killed, probably for want of memory; use fewer workers.") from None


def _pose_check(job: tuple[Any, str, str]) -> dict[str, bool | None]:
    """Check -> whether it holds, None: it could not be made. Empty if PoseBusters fails."""
    molecule, text, checks = job
    chem = optional("rdkit.Chem", "sample")
    if not molecule.GetNumAtoms():
        return {}
    with _quiet():
        try:
            found = _busters(checks).bust(chem.Mol(molecule), None, _pocket(text))  # a copy, as it sanitises in place
        except Exception:  # it runs most of RDKit; whatever goes wrong there concerns this molecule only
            return {}
    values = found.iloc[0].to_dict()
    return {name: bool(value) if value in (True, False) else None for name, value in _known(values).items()}


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """pandas' NA, which has no truth value, as None."""
    missing = optional("pandas", "sample").isna
    return {name: None if missing(value) else value for name, value in values.items()}


@lru_cache
def _busters(checks: str) -> Any:
    return optional("posebusters", "sample").PoseBusters(config=checks)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what RDKit and PoseBusters say of single molecules. PoseBusters makes RDKit use Python's logging."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with optional("rdkit.rdBase", "sample").BlockLogs():
            yield
    finally:
        logging.disable(before)
