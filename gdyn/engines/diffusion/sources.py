"""Ligand and protein files as arrays, and the pairs of them that a folder, an archive or a table holds.

Files are read by RDKit and gemmi, which are imported when a file needs them. What is wrong with one file is a
UserError; `gdyn prepare` makes it the reason why that pair is left out. Legend: n ligand atoms, M protein atoms.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import lzma
import re
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from gdyn.engines.diffusion.layout import BACKBONE, POCKET, residue_classes
from gdyn.errors import MissingFile, UserError
from gdyn.extras import optional

PROTEIN_NAME = re.compile(r"(?P<id>.+)_(?P<kind>protein|pocket(?P<shell>\d*))\.(pdb|ent|cif|mmcif)(\.gz)?", re.I)
LIGAND_NAME = re.compile(r"(?P<id>.+)_ligand\.(?P<kind>sdf|mol|mol2)(\.gz)?", re.I)
PREFERRED = ("sdf", "mol", "mol2", "protein", "pocket")
"""Where a pair has several files of one part. A whole protein is right for any radius."""
ARCHIVES = (".tar", ".tar.xz", ".txz", ".tar.gz", ".tgz", ".tar.bz2")
TABLES = {".csv": ",", ".tsv": "\t"}
FROM_FILE = ("element", "backbone", "residue_name", "residue_number", "insertion_code", "chain", "atom_name")
"""The POCKET columns that `_row` fills, in its order."""
DAMAGED = (OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error)
"""What reading a damaged or missing file raises."""


class File(NamedTuple):
    """A file that has been read."""

    name: str
    data: bytes


class Pair(NamedTuple):
    """The files of one complex."""

    identifier: str
    protein: File
    ligand: File


class Skipped(NamedTuple):
    """What is left out, and why: one sentence."""

    identifier: str
    reason: str


class Names(NamedTuple):
    """The files of one complex, not yet read: names in an archive, or below a folder."""

    identifier: str
    protein: str
    ligand: str


class Source(NamedTuple):
    """A folder, archive or table, and what was found in it."""

    path: Path
    pairs: list[Names]
    skipped: list[Skipped]


class Ligand(NamedTuple):
    """A molecule in space."""

    positions: np.ndarray
    """(n, 3) float64, Å."""
    columns: dict[str, np.ndarray]
    """The other LIGAND columns of `layout`, (n,)."""
    smiles: str


class Protein(NamedTuple):
    """The heavy atoms of a protein, or of a part of it."""

    positions: np.ndarray
    """(M, 3) float64, Å."""
    columns: dict[str, np.ndarray]
    """The other POCKET columns of `layout`, (M,)."""


def open_source(path: Path) -> Source:
    """Look for pairs in a folder, an archive or a table, without reading their files.

    Raises: MissingFile, UserError if it is none of these or a table has no two columns.
    """
    if not path.exists():
        raise MissingFile(f"{path} does not exist; give a folder, a .tar archive or a table of pairs.")
    if path.is_dir():
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        return Source(path, *_match(names))
    if path.name.lower().endswith(ARCHIVES):
        names, damage = _archive_names(path)
        pairs, skipped = _match(names)
        return Source(path, pairs, skipped + damage)
    if path.suffix.lower() in TABLES:
        return Source(path, _table(path), [])
    kinds = ", ".join([*ARCHIVES, *TABLES])
    raise UserError(f"{path} is not a source of pairs; a folder or one of {kinds} is.")


def read_pairs(source: Source) -> Iterator[Pair | Skipped]:
    """The pairs with their contents; one that cannot be read is left out."""
    if source.path.name.lower().endswith(ARCHIVES):
        return _read_archive(source)
    folder = source.path if source.path.is_dir() else source.path.parent
    return (_read_pair(folder, names) for names in source.pairs)


def read_ligand(file: File, hydrogens: bool = False) -> Ligand:
    """The first molecule of an SDF, MOL or MOL2 file, sanitised by RDKit.

    Raises: UserError if there is none, it cannot be sanitised, or it has no atoms in space.
    """
    chem = optional("rdkit.Chem")
    with optional("rdkit.rdBase").BlockLogs():
        molecule = _molecule(file)
        atoms = [atom for atom in molecule.GetAtoms() if hydrogens or atom.GetAtomicNum() != 1]
        if not atoms:
            raise UserError(f"{file.name} has no heavy atom.")
        if not molecule.GetNumConformers() or not molecule.GetConformer().Is3D():
            raise UserError(f"{file.name} is a drawing in two dimensions; the ligand's pose is needed.")
        chem.AssignStereochemistryFrom3D(molecule)
        smiles = chem.MolToSmiles(chem.RemoveHs(molecule, sanitize=False))
    positions = molecule.GetConformer().GetPositions()[[atom.GetIdx() for atom in atoms]]
    if not np.isfinite(positions).all():
        raise UserError(f"{file.name} has an atom whose position is not finite.")
    columns = {
        "element": np.array([atom.GetAtomicNum() for atom in atoms], np.uint8),
        "aromatic": np.array([atom.GetIsAromatic() for atom in atoms], np.uint8),
        "charge": np.array([atom.GetFormalCharge() for atom in atoms], np.int8),
    }
    return Ligand(positions, columns, smiles)


def read_protein(file: File) -> Protein:
    """The amino-acid residues of the first model of a PDB or mmCIF file, without hydrogens, waters, ions and ligands.

    Where a residue has alternative conformations, the one with the highest mean occupancy is taken, the first letter of
    equals. Raises: UserError if the file cannot be read or holds no protein.
    """
    gemmi = optional("gemmi")
    text = _text(file)
    try:
        if _suffix(file.name) in (".cif", ".mmcif"):
            structure = gemmi.make_structure_from_block(gemmi.cif.read_string(text)[0])
        else:
            structure = gemmi.read_pdb_string(text)
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(f"{file.name} cannot be read by gemmi: {_line(error)}.") from None
    structure.setup_entities()
    chains = list(structure[0]) if len(structure) else []
    rows = [
        (atom.pos.tolist(), _row(chain, residue, atom))
        for chain in chains
        for residue, letter in _conformations(chain)
        for atom in residue
        if atom.altloc in ("\0", letter) and not atom.is_hydrogen()
    ]
    if not rows:
        raise UserError(f"{file.name} holds no atom of an amino acid.")
    positions = np.array([position for position, _ in rows])
    if not np.isfinite(positions).all():
        raise UserError(f"{file.name} has an atom whose position is not finite.")
    values = zip(*(row for _, row in rows), strict=True)
    columns = {name: np.array(row, POCKET[name][0]) for name, row in zip(FROM_FILE, values, strict=True)}
    return Protein(positions, columns | {"residue": residue_classes(columns["residue_name"].astype(str))})


def _match(names: Sequence[str]) -> tuple[list[Names], list[Skipped]]:
    """Pairs in the order of their names. A file is named after its complex; where two folders have complexes of one
    name, the folder becomes part of the identifier."""
    found: dict[str, dict[str, list[tuple[Any, str]]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        path = PurePath(name)
        for part, pattern in (("protein", PROTEIN_NAME), ("ligand", LIGAND_NAME)):
            match = pattern.fullmatch(path.name)
            if match and not path.name.startswith("."):
                place = path.with_name(match["id"]).as_posix()
                found[place][part].append((_preference(match), name))
    times = Counter(PurePath(place).name for place in found)
    pairs, skipped = [], []
    for place, parts in sorted(found.items()):
        identifier = PurePath(place).name if times[PurePath(place).name] == 1 else place
        if len(parts) == 2:
            pairs.append(Names(identifier, min(parts["protein"])[1], min(parts["ligand"])[1]))
        else:
            lacking = "no ligand file" if "protein" in parts else "no pocket or protein file"
            [(_, name), *_] = next(iter(parts.values()))
            skipped.append(Skipped(identifier, f"{name} has {lacking} beside it."))
    return pairs, skipped


def _preference(match: re.Match[str]) -> tuple[int, int]:
    """The smaller, the better."""
    shell = int(match.groupdict().get("shell") or 0)
    return PREFERRED.index(match["kind"].lower().rstrip("0123456789") if shell else match["kind"].lower()), -shell


def _archive_names(path: Path) -> tuple[list[str], list[Skipped]]:
    """Names of the files in an archive, as far as it can be read, and what is to say if that is not to its end."""
    names: list[str] = []
    try:
        with tarfile.open(path) as archive:
            names.extend(member.name for member in archive if member.isfile())
    except DAMAGED as error:
        return names, [Skipped(path.name, f"the archive is damaged after {len(names)} files: {_line(error)}.")]
    return names, []


def _read_archive(source: Source) -> Iterator[Pair | Skipped]:
    """In the order of the archive, read once; the first half of a pair waits in memory for the second."""
    of_file = {name: names for names in source.pairs for name in (names.protein, names.ligand)}
    waiting: dict[str, File] = {}
    done: set[str] = set()
    try:
        with tarfile.open(source.path) as archive:
            for member in archive:
                names = of_file.get(member.name)
                if names is None or not member.isfile() or names.identifier in done:
                    continue
                content = archive.extractfile(member)
                assert content is not None
                waiting[member.name] = File(member.name, content.read())
                if names.protein in waiting and names.ligand in waiting:
                    done.add(names.identifier)
                    yield Pair(names.identifier, waiting.pop(names.protein), waiting.pop(names.ligand))
    except DAMAGED as error:
        for names in source.pairs:
            if names.identifier not in done:
                yield Skipped(names.identifier, f"{source.path} is damaged before its end: {_line(error)}.")


def _read_pair(folder: Path, names: Names) -> Pair | Skipped:
    files = []
    for name in (names.protein, names.ligand):
        try:
            files.append(File(name, (folder / name).read_bytes()))
        except OSError as error:
            return Skipped(names.identifier, f"{folder / name} cannot be read: {error.strerror}.")
    return Pair(names.identifier, *files)


def _table(path: Path) -> list[Names]:
    """Rows of two paths, pocket and ligand, relative to the table; the identifier is the ligand's."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file, delimiter=TABLES[path.suffix.lower()]) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a table of text: {error}.") from None
    if rows and [word.strip().lower() for word in rows[0]] == ["pocket", "ligand"]:
        rows = rows[1:]
    for row in rows:
        if len(row) != 2:
            raise UserError(f"{path} has the row {row}; two columns are expected, the paths of pocket and ligand.")
    found = [(protein.strip(), ligand.strip()) for protein, ligand in rows]
    identifiers = [_identifier(ligand) for _, ligand in found]
    times = Counter(identifiers)
    return [
        Names(identifier if times[identifier] == 1 else ligand, protein, ligand)
        for identifier, (protein, ligand) in zip(identifiers, found, strict=True)
    ]


def _identifier(ligand: str) -> str:
    name = PurePath(ligand).name
    match = LIGAND_NAME.fullmatch(name)
    return match["id"] if match else name.partition(".")[0]


def _molecule(file: File) -> Any:
    """Sanitised, with its hydrogens."""
    chem = optional("rdkit.Chem")
    text = _text(file)
    try:
        if _suffix(file.name) == ".mol2":
            molecule = chem.MolFromMol2Block(text, sanitize=False, removeHs=False)
        else:
            molecule = chem.MolFromMolBlock(text.partition("$$$$")[0], sanitize=False, removeHs=False)
    except RuntimeError as error:
        raise UserError(f"{file.name} cannot be read by RDKit: {_line(error)}.") from None
    if molecule is None:
        raise UserError(f"{file.name} holds no molecule that RDKit can read.")
    try:
        chem.SanitizeMol(molecule)
    except ValueError as error:
        raise UserError(f"RDKit cannot sanitise {file.name}: {_line(error)}.") from None
    if _suffix(file.name) == ".mol2" and any(atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms()):
        raise UserError(f"{file.name} lacks hydrogens; a MOL2 file names them all, an SDF file need not.")
    return molecule


def _conformations(chain: Any) -> Iterator[tuple[Any, str]]:
    """The amino acids of a gemmi chain, each with the letter of the alternative to take."""
    amino_acids = [residue for residue in chain if _is_amino_acid(residue)]
    # The alternatives may be different residues under one number.
    for _, group in itertools.groupby(amino_acids, key=lambda residue: str(residue.seqid)):
        residues = list(group)
        occupancies = defaultdict(list)
        for atom in itertools.chain(*residues):
            if atom.altloc != "\0":
                occupancies[atom.altloc].append(atom.occ)
        letter = max(sorted(occupancies), key=lambda word: np.mean(occupancies[word]), default="\0")
        yield from ((residue, letter) for residue in residues)


def _is_amino_acid(residue: Any) -> bool:
    """Part of a chain; a free amino acid is a ligand."""
    gemmi = optional("gemmi")
    known = gemmi.find_tabulated_residue(residue.name).is_amino_acid()
    in_chain = residue.het_flag == "A" or residue.entity_type == gemmi.EntityType.Polymer
    return in_chain and (known or {"N", "CA", "C"} <= {atom.name for atom in residue})


def _row(chain: Any, residue: Any, atom: Any) -> tuple[Any, ...]:
    """The values of FROM_FILE."""
    number, code = residue.seqid.num, residue.seqid.icode.strip()
    words = (residue.name.encode(), number, code.encode(), chain.name.encode(), atom.name.encode())
    return atom.element.atomic_number, atom.name in BACKBONE, *words


def _text(file: File) -> str:
    """Raises: UserError for an empty, damaged or binary file."""
    data = file.data
    if file.name.lower().endswith(".gz"):
        try:
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read()
        except DAMAGED as error:
            raise UserError(f"{file.name} is no sound gzip file: {_line(error)}.") from None
    if not data.strip():
        raise UserError(f"{file.name} is empty.")
    try:
        return data.decode()
    except UnicodeDecodeError:
        pass
    if b"\0" in data:
        raise UserError(f"{file.name} is not a text file.")
    return data.decode("latin-1")  # an author's name in a remark


def _suffix(name: str) -> str:
    return PurePath(name.lower().removesuffix(".gz")).suffix


def _line(error: Exception) -> str:
    """The first line of a message, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
