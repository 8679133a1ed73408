"""Structure files -> protein chains, read with gemmi.

Legend: L residues; the backbone atoms are N, CA, C, O, in this order.
"""

from __future__ import annotations

import gzip
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

from gdyn.engines.monodecoder.layout import AMINO_ACIDS, CONTACT_DISTANCE
from gdyn.extras import optional

if TYPE_CHECKING:
    import gemmi

BACKBONE = ("N", "CA", "C", "O")
UNKNOWN = "X"
"""The letter of an amino acid that is none of the twenty and has no parent among them."""

FORCE_FIELD_NAMES = {"H": "HID HIE HIP HSD HSE HSP", "C": "CYX CYM", "D": "ASH", "E": "GLH", "K": "LYN"}
"""Protonation states as Amber and CHARMM call them; gemmi's table knows the PDB's names."""

BONDS = (0.5, 2.5)
"""Å. What the bonds N-CA and CA-C may be; a residue beyond has no backbone, but a fault of the file."""
PEPTIDE_BOND = 2.5
"""Å. The longest C-N that DSSP takes for a bond (Kabsch and Sander 1983)."""
IDEAL_BONDS = 0.0015
"""Å. The standard deviation of the bonds N-CA and CA-C within each kind of amino acid, below which a program placed
them: networks that move rigid backbones leave 0.0004 (rounding), crystals and relaxed models 0.003 and more."""

Origin = Literal["experiment", "prediction", "unknown"]
Rule = Literal["auto", "yes", "no"]
AminoAcid = tuple[str, "dict[str, gemmi.Atom]"]
"""Letter, and the backbone atoms that there are, by name."""


class Unusable(ValueError):
    """Why a file, or a chain in it, cannot be used, as one sentence."""


@dataclass(frozen=True)
class Chain:
    """One protein chain: the residues that have N, CA and C."""

    identifier: str
    letters: str
    """L one-letter codes, X where the amino acid is unknown."""
    backbone: np.ndarray
    """(L, 4, 3) float64, Å; NaN for an O that the file lacks."""
    b_factors: np.ndarray
    """(L,) float64, those of CA as the file has them."""
    origin: Origin = "unknown"
    """What the file and its name say."""
    incomplete: int = 0
    """Residues left out, as they lack N, CA or C."""


def read_chains(name: str, data: bytes) -> list[Chain]:
    """The protein chains of the first model, with identifier `name` without its suffixes, and _<chain> behind it if
    there are several. `name` ends in .pdb, .ent or .cif, and perhaps .gz.

    Of alternative locations the one of highest occupancy counts, of equal ones the first. Waters, ligands and nucleic
    acids are no residues; what is an amino acid by its backbone only has the letter X.

    Raises: Unusable.
    """
    stem, mmcif, packed = split_name(name)
    structure, metrics = _parse(_unpack(data) if packed else data, mmcif)
    origin = _origin(stem, structure, metrics)
    parts = {part.name: _amino_acids(part) for part in (structure[0] if len(structure) else ())}
    proteins = {name: residues for name, residues in parts.items() if residues}
    if not proteins:
        raise Unusable("it has no protein chain")
    names = [f"{stem}_{name}" for name in proteins] if len(proteins) > 1 else [stem]
    return [
        _chain(re.sub(r"[\s/>]+", "_", name), residues, origin)
        for name, residues in zip(names, proteins.values(), strict=True)
    ]


def split_name(name: str) -> tuple[str, bool, bool]:
    """(stem, whether mmCIF, whether gzipped) of a structure file's name. Raises: Unusable if it is none."""
    match = re.fullmatch(r"(.+)\.(pdb|ent|cif)(\.gz)?", name, re.IGNORECASE)
    if not match:
        raise Unusable("its name does not end in .pdb, .ent or .cif, perhaps with .gz")
    return match[1], match[2].lower() == "cif", bool(match[3])


def confidence(chain: Chain, rule: Rule = "auto") -> tuple[np.ndarray, str]:
    """((L,) float64 pLDDT within 0..1, in words how that was decided); 1 where B-factors are no pLDDT.

    A file whose largest value is 1 or less has the scale 0..1, others 0..100. rule: whether B-factors are pLDDT;
    "auto" believes the file, and where it says nothing, `looks_predicted`.

    Raises: Unusable if rule is "yes" and they cannot be.
    """
    none = np.ones(len(chain.letters))
    possible = _possible(chain.b_factors)
    if rule == "no":
        return none, "no pLDDT (--plddt no)"
    if rule == "yes" and not possible:
        raise Unusable(f"its B-factors, {chain.b_factors.min():g} to {chain.b_factors.max():g}, cannot be pLDDT")
    if rule == "auto" and chain.origin == "experiment":
        return none, "no pLDDT (an experiment, says the file)"
    if not possible or (rule == "auto" and chain.origin == "unknown" and not looks_predicted(chain)):
        return none, "no pLDDT (by the numbers)"
    said = "--plddt yes" if rule == "yes" else "a prediction, says the file"
    decision = "by the numbers" if rule == "auto" and chain.origin == "unknown" else said
    scale = 1.0 if chain.b_factors.max() <= 1 else 100.0
    return chain.b_factors / scale, f"pLDDT ({decision})"


def looks_predicted(chain: Chain) -> bool:
    """Whether the B-factors are a network's confidence, from numbers alone: bonds are as ideal as a program makes
    them, or B rises with the number of neighbours. Confidence is highest in the core, where atoms move least and a
    crystal's B is lowest."""
    if not _possible(chain.b_factors):
        return False
    n, ca, c = (chain.backbone[:, i] for i in range(3))
    bonds = np.linalg.norm([n - ca, c - ca], axis=-1)
    kinds = np.array(list(chain.letters))
    for kind in set(chain.letters):
        bonds[:, kinds == kind] -= bonds[:, kinds == kind].mean(axis=1, keepdims=True)
    freedom = 2 * (len(kinds) - len(set(chain.letters)))
    if freedom > 0 and np.sqrt((bonds**2).sum() / freedom) < IDEAL_BONDS:
        return True
    neighbours = (np.linalg.norm(ca[:, None] - ca, axis=-1) < CONTACT_DISTANCE).sum(axis=1)
    centered = neighbours - neighbours.mean()
    return bool(centered @ chain.b_factors > 0)


def _possible(b_factors: np.ndarray) -> bool:
    """Within 0..100 and not all the same."""
    low, high = b_factors.min(), b_factors.max()
    return bool(0 <= low < high <= 100)


def _unpack(data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise Unusable(f"it cannot be unpacked: {error}") from None


def _parse(data: bytes, mmcif: bool) -> tuple[gemmi.Structure, list[str]]:
    """The structure and, from ModelCIF, the names of its measures of confidence. Raises: Unusable."""
    gemmi = optional("gemmi")
    if not data.strip():
        raise Unusable("it is empty")
    try:
        block = gemmi.cif.read_string(data)[0] if mmcif else None
        structure = gemmi.make_structure_from_block(block) if block else gemmi.read_pdb_string(data)
    except (ValueError, RuntimeError, IndexError) as error:
        raise Unusable(f"it cannot be read: {' '.join(str(error).split()) or 'no data block'}") from None
    structure.merge_chain_parts()
    structure.setup_entities()
    return structure, list(block.find_values("_ma_qa_metric.name")) if block else []


def _origin(stem: str, structure: gemmi.Structure, metrics: list[str]) -> Origin:
    """The method outweighs the title: crystals of designed proteins name AlphaFold, too."""
    info = dict(structure.info.items())
    method, title = info.get("_exptl.method", ""), info.get("_struct.title", "")
    if any("plddt" in metric.lower() for metric in metrics):
        return "prediction"
    if method and "MODEL" not in method.upper():
        return "experiment"
    programs = "alphafold|esmfold|colabfold|openfold|omegafold|rosettafold"
    named = re.search(programs, f"{title} {stem}", re.IGNORECASE) or re.match(r"AF-\w+-F\d", stem)
    return "prediction" if named else "unknown"


def _amino_acids(part: gemmi.Chain) -> list[AminoAcid]:
    """Those of the polymer, even if atoms are missing. Where several kinds share a place, that of most occupancy.

    gemmi ends a polymer at some HETATM records; so all ATOM records count, and what is bonded to a neighbour.
    """
    found: list[tuple[AminoAcid, bool]] = []
    for _, group in groupby(part, key=lambda residue: str(residue.seqid)):
        candidates = []
        for residue in group:
            letter, atoms = _letter(residue.name), _backbone(residue)
            if letter and (letter != UNKNOWN or _whole(atoms)):
                certain = residue.het_flag == "A" or residue.entity_type.name == "Polymer"
                candidates.append(((letter, atoms), certain))
        if candidates:
            found.append(max(candidates, key=lambda candidate: sum(atom.occ for atom in candidate[0][1].values())))
    residues = [residue for residue, _ in found]
    bonds = [False, *(_bonded(first, second) for first, second in pairwise(residues)), False]
    return [residue for i, (residue, certain) in enumerate(found) if certain or bonds[i] or bonds[i + 1]]


def _bonded(first: AminoAcid, second: AminoAcid) -> bool:
    c, n = first[1].get("C"), second[1].get("N")
    return c is not None and n is not None and bool((c.pos - n.pos).length() < PEPTIDE_BOND)


def _chain(identifier: str, residues: list[AminoAcid], origin: Origin) -> Chain:
    whole = [(letter, atoms) for letter, atoms in residues if _whole(atoms)]
    nowhere = [np.nan] * 3
    backbone = [[atoms[name].pos.tolist() if name in atoms else nowhere for name in BACKBONE] for _, atoms in whole]
    return Chain(
        identifier,
        "".join(letter for letter, _ in whole),
        np.array(backbone, dtype=float).reshape(-1, 4, 3),
        np.array([atoms["CA"].b_iso for _, atoms in whole], dtype=float),
        origin,
        len(residues) - len(whole),
    )


@lru_cache
def _letter(name: str) -> str:
    """The amino acid's letter or its parent's, X if there is none, "" for what the PDB knows as something else."""
    for letter, names in FORCE_FIELD_NAMES.items():
        if name in names.split():
            return letter
    known = optional("gemmi").find_tabulated_residue(name)
    if known.found() and not known.is_amino_acid():
        return ""
    letter = known.one_letter_code.upper()
    return letter if letter in set(AMINO_ACIDS) else UNKNOWN


def _backbone(residue: gemmi.Residue) -> dict[str, gemmi.Atom]:
    """Of each backbone atom that there is, the location of the highest occupancy."""
    atoms: dict[str, gemmi.Atom] = {}
    for atom in residue:
        name = atom.name
        if name in BACKBONE and (name not in atoms or atom.occ > atoms[name].occ):
            atoms[name] = atom
    return atoms


def _whole(atoms: dict[str, gemmi.Atom]) -> bool:
    """Whether N, CA and C are there, where they can be: finite, at distances of bonds, not on a line."""
    if not {"N", "CA", "C"} <= atoms.keys():
        return False
    n, ca, c = (atoms[name].pos for name in ("N", "CA", "C"))
    bonds = (n - ca).length(), (c - ca).length()
    return all(BONDS[0] < bond < BONDS[1] for bond in bonds) and (n - ca).cross(c - ca).length() > 0.1
