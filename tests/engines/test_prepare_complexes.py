"""Pairs of files in, one file of complexes out: against RDKit, brute force and the lines of a PDB file."""

import csv
import gzip
import io
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gemmi
import h5py
import lmdb
import numpy as np
import pytest
import torch
from rdkit import Chem, rdBase
from rdkit.Chem import AllChem

from gdyn.engines.diffusion import layout
from gdyn.engines.diffusion.complexes import Complex, Complexes, write_pocket_pdb
from gdyn.engines.diffusion.crossdocked import unpickle
from gdyn.engines.diffusion.prepare import Preparation, prepare
from gdyn.engines.diffusion.sources import File, read_ligand, read_protein
from gdyn.errors import MissingFile, UserError
from launch.prepare import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "ligands_in_pockets"


def pdb_line(
    name: str,
    residue: str = "ALA",
    number: int = 1,
    at: tuple[float, float, float] = (0.0, 0.0, 0.0),
    record: str = "ATOM",
    chain: str = "A",
    altloc: str = " ",
    occupancy: float = 1.0,
    code: str = " ",
    element: str = "",
) -> str:
    return (
        f"{record:6}{1:5d} {name if len(name) == 4 else ' ' + name:4}{altloc}{residue:>3} {chain}{number:4d}{code}   "
        f"{at[0]:8.3f}{at[1]:8.3f}{at[2]:8.3f}{occupancy:6.2f}{0:6.2f}          {element or name[0]:>2}\n"
    )


def atoms_of(lines: list[str]) -> list[tuple[Any, ...]]:
    """(name, residue, chain, number with code, x, y, z, element) of each ATOM line."""
    return [
        (
            *(line[12:16].strip(), line[17:20].strip(), line[21], line[22:27].strip()),
            *(float(line[i : i + 8]) for i in (30, 38, 46)),
            line[76:78].strip(),
        )
        for line in lines
        if line.startswith("ATOM")
    ]


def write_ligand(path: Path, smiles: str = "C[NH+](C)Cc1ccncc1", at: tuple[float, ...] = (0, 0, 0)) -> Path:
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(molecule, randomSeed=7)
    positions = molecule.GetConformer().GetPositions()
    for i, position in enumerate(positions - positions.mean(0) + at):
        molecule.GetConformer().SetAtomPosition(i, position.tolist())
    path.write_text(Chem.MolToMolBlock(molecule) + "$$$$\n")
    return path


def write_pair(folder: Path, name: str = "a", seed: int = 0) -> Path:
    """A ligand at the origin in the middle of residues 4 to 25 Å away. Returns the folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_ligand(folder / f"{name}_ligand.sdf")
    lines = []
    for number in range(60):
        direction = rng.normal(size=3)
        place = direction / np.linalg.norm(direction) * rng.uniform(6.5, 25)
        residue = layout.RESIDUES[number % 20]
        for atom in ("N", "CA", "C", "O", "CB"):
            lines.append(pdb_line(atom, residue, number + 1, tuple(place + rng.normal(size=3) * 0.8)))
    (folder / f"{name}_protein.pdb").write_text("".join(lines) + "END\n")
    return folder


def run(tmp_path: Path, *inputs: Path, **options: Any) -> Complexes:
    output = tmp_path / "out.h5"
    prepare(Preparation(list(inputs), output, **options))
    return Complexes(output)


def skipped(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "out.h5.skipped.tsv"
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["identifier"]: row["reason"] for row in csv.DictReader(file, delimiter="\t")}


def same(ours: Complex, theirs: Complex) -> bool:
    return (ours.identifier, ours.smiles) == (theirs.identifier, theirs.smiles) and all(
        np.array_equal(getattr(ours, part)[name], getattr(theirs, part)[name])
        for part, columns in layout.COLUMNS.items()
        for name in columns
    )


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """The validation archive of the example, unpacked."""
    folder = tmp_path_factory.mktemp("example")
    with tarfile.open(EXAMPLE / "validation.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "validation"


@pytest.fixture(scope="module")
def prepared(example, tmp_path_factory) -> Complexes:
    return run(tmp_path_factory.mktemp("prepared"), example, radius=6.0)


# --- the numbers


def test_ligands_are_what_rdkit_reads(example, prepared):
    for index in range(0, len(prepared), 5):
        entry = prepared.complex(index)
        molecule = next(iter(Chem.SDMolSupplier(str(example / f"{entry.identifier}_ligand.sdf"))))
        positions = molecule.GetConformer().GetPositions()
        np.testing.assert_allclose(entry.ligand["positions"] + entry.centre, positions, atol=1e-3)
        for name, value in (
            ("element", Chem.Atom.GetAtomicNum),
            ("aromatic", Chem.Atom.GetIsAromatic),
            ("charge", Chem.Atom.GetFormalCharge),
        ):
            assert entry.ligand[name].tolist() == [value(atom) for atom in molecule.GetAtoms()]
        assert entry.smiles == Chem.MolToSmiles(molecule)


def test_pockets_are_the_protein_atoms_within_the_radius_of_any_ligand_atom(example, prepared):
    for index in range(0, len(prepared), 5):
        entry = prepared.complex(index)
        ligand = next(iter(Chem.SDMolSupplier(str(example / f"{entry.identifier}_ligand.sdf"))))
        atoms = atoms_of((example / f"{entry.identifier}_pocket10.pdb").read_text().splitlines())
        inside = [
            atom
            for atom in atoms
            if min(np.linalg.norm(np.array(atom[4:7]) - p) for p in ligand.GetConformer().GetPositions()) <= 6.0
        ]
        assert 0 < len(inside) < len(atoms)
        np.testing.assert_allclose(entry.pocket["positions"] + entry.centre, [a[4:7] for a in inside], atol=1e-3)
        assert entry.pocket["atom_name"].astype(str).tolist() == [a[0] for a in inside]
        assert entry.pocket["residue"].tolist() == [layout.RESIDUES.index(a[1]) for a in inside]
        assert entry.pocket["residue_number"].tolist() == [int(a[3]) for a in inside]
        assert entry.pocket["backbone"].tolist() == [a[0] in ("N", "CA", "C", "O") for a in inside]
        assert [gemmi.Element(int(z)).name.upper() for z in entry.pocket["element"]] == [a[7].upper() for a in inside]


def test_the_pocket_is_centred_and_the_centre_is_kept(prepared):
    for index in range(0, len(prepared), 5):
        entry = prepared.complex(index)
        assert np.abs(entry.pocket["positions"].mean(0, dtype=float)).max() < 1e-4
        assert np.abs(entry.ligand["positions"].mean(0)).max() > 0.01


def test_a_written_pocket_is_the_input_within_the_radius(example, prepared, tmp_path):
    entry = prepared.complex(3)
    write_pocket_pdb(entry, tmp_path / "pocket.pdb")
    written = atoms_of((tmp_path / "pocket.pdb").read_text().splitlines())
    of_input = {a[:4] + a[7:]: a[4:7] for a in atoms_of((example / f"{entry.identifier}_pocket10.pdb").open())}
    assert len(written) == len(entry.pocket["element"])
    for atom in written:
        np.testing.assert_allclose(atom[4:7], of_input[atom[:4] + atom[7:]], atol=1.01e-3)


def test_moving_the_complex_changes_neither_features_nor_distances(example, tmp_path):
    identifier = "diffsbdd-5NDU"
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    turn[:, 0] *= np.linalg.det(turn)
    shift = np.array([30.0, -12.0, 5.0])
    still, moved = tmp_path / "still", tmp_path / "moved"
    for folder in (still, moved):
        folder.mkdir()
        for kind in ("pocket10.pdb", "ligand.sdf"):
            name = f"{identifier}_{kind}"
            (folder / name).write_text((example / name).read_text())
    structure = gemmi.read_structure(str(moved / f"{identifier}_pocket10.pdb"))
    for site in structure[0].all():
        site.atom.pos = gemmi.Position(*(turn @ site.atom.pos.tolist() + shift))
    structure.write_pdb(str(moved / f"{identifier}_pocket10.pdb"))
    molecule = Chem.MolFromMolFile(str(moved / f"{identifier}_ligand.sdf"))
    conformer = molecule.GetConformer()
    for i, position in enumerate(conformer.GetPositions()):
        conformer.SetAtomPosition(i, (turn @ position + shift).tolist())
    (moved / f"{identifier}_ligand.sdf").write_text(Chem.MolToMolBlock(molecule))
    # A radius with no atom near the edge: files are rounded to 0.001 Å.
    first, second = (run(folder, folder, radius=6.03).complex(0) for folder in (still, moved))
    for part, columns in layout.COLUMNS.items():
        ours, theirs = getattr(first, part), getattr(second, part)
        for name in columns.keys() - {"positions"}:
            np.testing.assert_array_equal(ours[name], theirs[name])
    ours, theirs = (np.concatenate([entry.ligand["positions"], entry.pocket["positions"]]) for entry in (first, second))
    np.testing.assert_allclose(ours @ turn.T, theirs, atol=3e-3)
    np.testing.assert_allclose(second.centre, turn @ first.centre + shift, atol=2e-3)


def test_hydrogens_are_kept_on_demand(tmp_path):
    folder = write_pair(tmp_path / "pairs")
    heavy, all_atoms = run(tmp_path / "1", folder), run(tmp_path / "2", folder, hydrogens=True)
    assert (heavy.complex(0).ligand["element"] != 1).all()
    with_hydrogens = all_atoms.complex(0).ligand["element"]
    assert (with_hydrogens == 1).sum() == 13 and (with_hydrogens != 1).sum() == len(heavy.complex(0).ligand["element"])
    assert heavy.smiles == all_atoms.smiles == [Chem.CanonSmiles("C[NH+](C)Cc1ccncc1")]
    assert 1 in heavy.complex(0).ligand["charge"] and 2 in heavy[np.array([0])]["ligand_charge"]


# --- proteins as they are


def protein(*lines: str) -> dict[str, list[Any]]:
    found = read_protein(File("x_protein.pdb", "".join([*lines, "END\n"]).encode()))
    return {name: column.astype(str).tolist() for name, column in found.columns.items()} | {
        "x": found.positions[:, 0].tolist()
    }


BACKBONE = [pdb_line(name, "GLY", 1, (i, 0, 0)) for i, name in enumerate(("N", "CA", "C", "O"))]


def test_waters_ions_ligands_nucleic_acids_and_hydrogens_are_not_taken():
    found = protein(
        *BACKBONE,
        pdb_line("HA2", "GLY", 1, element="H"),
        pdb_line("D", "GLY", 1, element="D"),
        pdb_line("P", "DA", 2, chain="B"),
        pdb_line("C1", "LIG", 301, record="HETATM"),
        pdb_line("ZN", "ZN", 302, record="HETATM", element="ZN"),
        *(pdb_line(name, "GLU", 303, record="HETATM") for name in ("N", "CA", "C", "O", "OXT")),
        pdb_line("O", "HOH", 401, record="HETATM"),
    )
    assert found["atom_name"] == ["N", "CA", "C", "O"]


def test_a_modified_residue_within_the_chain_is_taken_as_unknown():
    modified = [pdb_line(name, "MSE", 2, record="HETATM") for name in ("N", "CA", "C", "O")]
    modified.append(pdb_line("SE", "MSE", 2, record="HETATM", element="SE"))
    last = [pdb_line(name, "HIE", 3) for name in ("N", "CA", "C", "O")]
    found = protein(*BACKBONE, *modified, *last)
    assert found["residue_name"] == ["GLY"] * 4 + ["MSE"] * 5 + ["HIE"] * 4
    assert found["residue"] == ["7"] * 4 + ["20"] * 5 + [str(layout.RESIDUES.index("HIS"))] * 4
    assert found["element"][8] == "34" and found["backbone"][8] == "0"


@pytest.mark.parametrize("of_a, taken", [(0.3, "B"), (0.7, "A"), (0.5, "A")])
def test_the_conformation_with_the_highest_occupancy_is_taken(of_a, taken):
    found = protein(
        *BACKBONE,
        *(
            pdb_line(name, "GLY", 1, ({"A": 10.0, "B": 20.0}[letter], 0, 0), altloc=letter, occupancy=occupancy)
            for name in ("CB", "CG")
            for letter, occupancy in (("A", of_a), ("B", 1 - of_a))
        ),
    )
    assert found["x"][4:] == [{"A": 10.0, "B": 20.0}[taken]] * 2


def test_of_two_residues_in_one_place_the_more_occupied_is_taken():
    lines = [
        pdb_line(name, residue, 2, altloc=letter, occupancy=occupancy)
        for letter, residue, occupancy in (("A", "SER", 0.4), ("B", "THR", 0.6))
        for name in ("N", "CA", "C", "O")
    ]
    assert protein(*BACKBONE, *lines)["residue_name"] == ["GLY"] * 4 + ["THR"] * 4


def test_only_the_first_model_is_taken():
    text = "MODEL        1\n" + "".join(BACKBONE) + "ENDMDL\nMODEL        2\n" + "".join(BACKBONE) + "ENDMDL\n"
    assert len(read_protein(File("x.pdb", text.encode())).positions) == 4


def test_chains_and_insertion_codes_survive_the_round_trip(tmp_path):
    folder = write_pair(tmp_path / "pairs")
    lines = [
        pdb_line(name, "GLY", 52, (5 + i, j, k), code=code, chain=chain)
        for k, chain in enumerate("AB")
        for j, code in enumerate(" A")
        for i, name in enumerate(("N", "CA", "C", "O"))
    ]
    (folder / "a_protein.pdb").write_text("".join(lines))
    write_pocket_pdb(run(tmp_path, folder).complex(0), tmp_path / "pocket.pdb")
    written = atoms_of((tmp_path / "pocket.pdb").open())
    assert [atom[:4] + atom[7:] for atom in written] == [atom[:4] + atom[7:] for atom in atoms_of(lines)]
    np.testing.assert_allclose([a[4:7] for a in written], [a[4:7] for a in atoms_of(lines)], atol=1.01e-3)


# --- inputs of all kinds


def test_folders_archives_tables_and_compressed_files_give_the_same(tmp_path):
    folder = write_pair(tmp_path / "pairs" / "deep")
    expected = run(tmp_path / "plain", folder.parent).complex(0)
    (folder / "table.csv").write_text("pocket,ligand\na_protein.pdb,a_ligand.sdf\n")
    (folder / "table.tsv").write_text("a_protein.pdb\ta_ligand.sdf\n")
    for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz")):
        with tarfile.open(tmp_path / f"pairs{suffix}", mode) as archive:
            archive.add(folder, "deep")
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    (zipped / "a_ligand.sdf.gz").write_bytes(gzip.compress((folder / "a_ligand.sdf").read_bytes()))
    document = gemmi.read_structure(str(folder / "a_protein.pdb"))
    document.setup_entities()
    cif = document.make_mmcif_document().as_string()
    (zipped / "a_pocket10.cif.gz").write_bytes(gzip.compress(cif.encode()))
    sources = [folder / "table.csv", folder / "table.tsv", *tmp_path.glob("pairs.tar*"), zipped]
    assert len(sources) == 6
    for number, source in enumerate(sources):
        assert same(run(tmp_path / str(number), source).complex(0), expected), source


def test_a_mol2_file_is_read_and_must_have_its_hydrogens():
    atoms = ["C1 0.0 0.0 0.1 C.3", "O1 1.4 0.0 0.0 O.3", "H1 1.7 0.9 0.0 H", "H2 -0.4 1 0 H", "H3 -0.4 -1 0 H"]
    atoms, bonds = [*atoms, "H4 -0.4 0 1 H"], ["1 2 1", "2 3 1", "1 4 1", "1 5 1", "1 6 1"]
    ligand = read_ligand(File("a_ligand.mol2", mol2(atoms, bonds)))
    assert ligand.smiles == "CO" and ligand.columns["element"].tolist() == [6, 8]
    np.testing.assert_allclose(ligand.positions, [[0, 0, 0.1], [1.4, 0, 0]])
    with pytest.raises(UserError, match=r"a_ligand\.mol2 lacks hydrogens"):
        read_ligand(File("a_ligand.mol2", mol2(atoms[:2], bonds[:1])))


def mol2(atoms: list[str], bonds: list[str]) -> bytes:
    lines = ["@<TRIPOS>MOLECULE", "methanol", f"{len(atoms)} {len(bonds)} 0 0 0", "SMALL", "NO_CHARGES", ""]
    lines += ["@<TRIPOS>ATOM", *(f"{i + 1} {atom} 1 LIG 0" for i, atom in enumerate(atoms))]
    return "\n".join([*lines, "@<TRIPOS>BOND", *(f"{i + 1} {bond}" for i, bond in enumerate(bonds)), ""]).encode()


def test_of_several_files_the_most_complete_is_taken_and_of_several_molecules_the_first(tmp_path):
    folder = write_pair(tmp_path / "pairs")
    expected = run(tmp_path / "1", folder).complex(0)
    (folder / "a_pocket10.pdb").write_text("".join(BACKBONE))
    (folder / "a_ligand.mol2").write_text("not read")
    text = (folder / "a_ligand.sdf").read_text()
    (folder / "a_ligand.sdf").write_text(text + write_ligand(tmp_path / "other.sdf", "CCO").read_text())
    assert same(run(tmp_path / "2", folder).complex(0), expected)


def test_complexes_of_one_name_in_two_folders_are_told_apart(tmp_path):
    for name in ("x", "y"):
        write_pair(tmp_path / "pairs" / name, "complex")
    assert run(tmp_path, tmp_path / "pairs").identifiers == ["x/complex", "y/complex"]
    again = run(tmp_path / "again", tmp_path / "pairs" / "x", tmp_path / "pairs" / "y")
    assert again.identifiers == ["complex"]
    assert "an earlier complex" in skipped(tmp_path / "again")["complex"]


@pytest.mark.slow
def test_the_number_of_workers_changes_no_byte(example, tmp_path):
    run(tmp_path / "1", example)
    run(tmp_path / "2", example, workers=2)
    assert (tmp_path / "1" / "out.h5").read_bytes() == (tmp_path / "2" / "out.h5").read_bytes()


# --- what is wrong with a pair


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def truncate_gzip(folder: Path) -> None:
    (folder / "a_ligand.sdf.gz").write_bytes(gzip.compress((folder / "a_ligand.sdf").read_bytes())[:-20])
    (folder / "a_ligand.sdf").unlink()


def mol_block(*atoms: str, bonds: tuple[tuple[int, int, int], ...] = (), z: float = 1.0) -> bytes:
    lines = ["", "  test", "", f"{len(atoms):3d}{len(bonds):3d}  0  0  0  0  0  0  0  0999 V2000"]
    lines += [f"{1.2 * i:10.4f}{0:10.4f}{z * (i + 1):10.4f} {a:<3} 0  0" for i, a in enumerate(atoms)]
    lines += [f"{i:3d}{j:3d}{order:3d}  0" for i, j, order in bonds]
    return "\n".join([*lines, "M  END", "$$$$", ""]).encode()


TEXAS_CARBON = mol_block("C", *"FFFFF", bonds=tuple((1, i, 1) for i in range(2, 7)))
BAD: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no_ligand": (lambda f: (f / "a_ligand.sdf").unlink(), ("a_protein.pdb has no ligand file beside it",)),
    "no_protein": (lambda f: (f / "a_protein.pdb").unlink(), ("a_ligand.sdf has no pocket or protein file",)),
    "ligand_empty": (edit("a_ligand.sdf", lambda b: b""), ("a_ligand.sdf is empty",)),
    "ligand_blank": (edit("a_ligand.sdf", lambda b: b"\n \n"), ("a_ligand.sdf is empty",)),
    "ligand_garbage": (edit("a_ligand.sdf", lambda b: b"<html>not found</html>\n"), ("no molecule that RDKit",)),
    "ligand_binary": (edit("a_ligand.sdf", lambda b: b"\x00\xff" * 300), ("a_ligand.sdf is not a text file",)),
    "ligand_cut_short": (edit("a_ligand.sdf", lambda b: b[:400]), ("no molecule that RDKit can read",)),
    "ligand_gzip_cut_short": (truncate_gzip, ("a_ligand.sdf.gz is no sound gzip file",)),
    "ligand_of_five_bonds": (edit("a_ligand.sdf", lambda b: TEXAS_CARBON), ("cannot sanitise", "valence", "C, 5")),
    "ligand_not_kekulized": (
        edit("a_ligand.sdf", lambda b: mol_block(*"CCCCC", bonds=tuple((i, i % 5 + 1, 4) for i in range(1, 6)))),
        ("cannot sanitise", "kekulize"),
    ),
    "ligand_drawn_flat": (
        edit("a_ligand.sdf", lambda b: mol_block("C", "O", bonds=((1, 2, 1),), z=0.0)),
        ("drawing in two dimensions",),
    ),
    "ligand_of_hydrogens": (
        edit("a_ligand.sdf", lambda b: mol_block("H", "H", bonds=((1, 2, 1),))),
        ("no heavy atom",),
    ),
    "ligand_without_atoms": (edit("a_ligand.sdf", lambda b: mol_block()), ("no heavy atom",)),
    "ligand_far_away": (
        lambda f: write_ligand(f / "a_ligand.sdf", at=(300, 0, 0)),
        ("no protein atom is within 10 Å", "one frame"),
    ),
    "protein_empty": (edit("a_protein.pdb", lambda b: b""), ("a_protein.pdb is empty",)),
    "protein_garbage": (edit("a_protein.pdb", lambda b: b"hello\nworld\n"), ("no atom of an amino acid",)),
    "protein_cut_short": (edit("a_protein.pdb", lambda b: b[:-60]), ("cannot be read by gemmi", "line 300")),
    "protein_of_waters": (
        edit("a_protein.pdb", lambda b: pdb_line("O", "HOH", record="HETATM").encode()),
        ("no atom of an amino acid",),
    ),
    "protein_without_coordinates": (
        edit("a_protein.pdb", lambda b: b[:30] + b"     nan" * 3 + b[54:]),
        ("a_protein.pdb", "not finite"),
    ),
    "protein_contains_the_ligand": (
        lambda f: contain(f),
        ("contains the ligand", "CA of GLY 7 in chain Z", "0.00 Å"),
    ),
    "protein_is_a_page": (
        lambda f: (f / "a_protein.pdb").rename(f / "a_protein.cif") and edit("a_protein.cif", lambda b: b"<html>")(f),
        ("a_protein.cif cannot be read by gemmi",),
    ),
}


def contain(folder: Path) -> None:
    ligand = Chem.MolFromMolFile(str(folder / "a_ligand.sdf")).GetConformer().GetPositions()
    lines = [
        pdb_line(name, "GLY", 7, tuple(at), chain="Z")
        for name, at in zip(("N", "CA", "C"), (ligand[0] + 9, ligand[0], ligand[0] + 8), strict=True)
    ]
    with (folder / "a_protein.pdb").open("w") as file:
        file.writelines(lines)


@pytest.mark.parametrize("name", BAD)
def test_a_pair_that_cannot_be_used_is_left_out_with_its_reason(tmp_path, name, capfd):
    spoil, said = BAD[name]
    folder = write_pair(write_pair(tmp_path / "pairs"), "b")
    spoil(folder)
    assert run(tmp_path, folder).identifiers == ["b"]
    reasons = skipped(tmp_path)
    assert list(reasons) == ["a"]
    assert all(words.lower() in reasons["a"].lower() for words in said), reasons["a"]
    assert "RDKit ERROR" not in capfd.readouterr().err


def test_rdkit_is_as_talkative_as_before(tmp_path, capfd):
    run(tmp_path, write_pair(tmp_path / "pairs"))
    rdBase.LogToCppStreams()
    Chem.MolFromSmiles("C1CC")
    assert "unclosed ring" in capfd.readouterr().err


def test_a_damaged_archive_gives_what_is_before_the_damage(tmp_path):
    folder = tmp_path / "pairs"
    for name in "abcdef":
        write_pair(folder, name, seed=ord(name))
    with tarfile.open(tmp_path / "pairs.tar", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    whole = (tmp_path / "pairs.tar").read_bytes()
    (tmp_path / "pairs.tar").write_bytes(whole[: len(whole) * 2 // 3])
    found = run(tmp_path, tmp_path / "pairs.tar").identifiers
    assert found == list("abcdef")[: len(found)] and 2 <= len(found) < 6
    assert any("damaged" in reason for reason in skipped(tmp_path).values())


# --- the command


def command(*words: Any) -> int:
    return main(["complexes", *map(str, words)])


def test_what_the_user_gets_wrong_is_said_in_one_sentence(tmp_path, capsys):
    folder, output = write_pair(tmp_path / "pairs"), tmp_path / "out.h5"
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "three.csv").write_text("a,b,c\n")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.tar").write_bytes(b"no archive")
    (tmp_path / "text.mdb").write_text("hello")
    lonely = tmp_path / "lonely.csv"
    lonely.write_text("nowhere.pdb,nothing_ligand.sdf\n")
    pickles = ["--lmdb", tmp_path / "text.mdb"]
    for words, said in (
        ([tmp_path / "nowhere"], ("nowhere does not exist",)),
        ([tmp_path / "empty"], ("nothing usable", "_ligand.sdf")),
        ([tmp_path / "note.txt"], ("note.txt is not a source", ".tar.xz")),
        ([tmp_path / "three.csv"], ("three.csv", "two columns")),
        ([tmp_path / "binary.csv"], ("binary.csv is not a table of text",)),
        ([tmp_path / "broken.tar"], ("nothing usable", "damaged")),
        ([lonely], ("nothing usable", "nowhere.pdb cannot be read")),
        ([], ("no input given",)),
        ([folder, "--radius", -1], ("radius",)),
        ([folder, "--workers", 0], ("workers",)),
        ([folder, "--unsafe_unpickle"], ("for --lmdb",)),
        ([folder, *pickles], ("both name the input",)),
        (pickles, ("can contain code", "--unsafe_unpickle")),
        ([*pickles, "--unsafe_unpickle"], ("text.mdb cannot be read as an LMDB",)),
        (["--lmdb", tmp_path / "no.mdb", "--unsafe_unpickle"], ("no.mdb does not exist",)),
    ):
        assert command(*words, "--output", output) == 2, words
        error = capsys.readouterr().err
        assert all(part in error for part in said) and "Traceback" not in error, error
        assert not output.exists()
    assert command(folder, "--output", tmp_path / "empty") == 2
    assert "is a folder" in capsys.readouterr().err
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_file_is_replaced_only_on_demand_and_its_list_of_skipped_with_it(tmp_path, capsys):
    folder, output = write_pair(write_pair(tmp_path / "pairs"), "b"), tmp_path / "out.h5"
    (folder / "a_ligand.sdf").write_text("")
    assert command(folder, "--output", output) == 0
    assert list(skipped(tmp_path)) == ["a"]
    before = output.read_bytes()
    assert command(folder, "--output", output) == 2
    assert "add --overwrite" in capsys.readouterr().err and output.read_bytes() == before
    write_ligand(folder / "a_ligand.sdf")
    assert command(folder, "--output", output, "--overwrite") == 0
    assert Complexes(output).identifiers == ["a", "b"] and skipped(tmp_path) == {}
    for path in folder.iterdir():
        path.write_text("")
    assert command(folder, "--output", output, "--overwrite") == 2
    assert Complexes(output).identifiers == ["a", "b"] and skipped(tmp_path) == {}


def test_a_pocket_file_smaller_than_the_radius_is_reported(tmp_path, caplog):
    folder = write_pair(tmp_path / "pairs")
    (folder / "a_protein.pdb").rename(folder / "a_pocket10.pdb")
    run(tmp_path / "1", folder, radius=10.0)
    assert "were cut at" not in caplog.text
    run(tmp_path / "2", folder, radius=12.0)
    assert "1 pocket files were cut at 10 Å, less than the radius of 12 Å" in caplog.text


def test_the_file_says_how_it_was_made(tmp_path):
    run(tmp_path, write_pair(tmp_path / "pairs"), radius=7.5)
    with h5py.File(tmp_path / "out.h5", locking=False) as file:
        assert file.attrs["radius"] == 7.5 and not file.attrs["hydrogens"]
        assert '"inputs": ["pairs"]' in file.attrs["provenance"] and "rdkit" in file.attrs["provenance"]


# --- an LMDB of pickles


def entry(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """As TargetDiff makes them, of a pyridine and three residues."""
    molecule = Chem.MolFromSmiles("c1ccncc1C")
    rng = np.random.default_rng(seed)
    bonds = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx(), 4 if b.GetIsAromatic() else 1) for b in molecule.GetBonds()]
    bonds = np.array([*bonds, *((j, i, kind) for i, j, kind in bonds)])
    return {
        "ligand_pos": torch.from_numpy(rng.normal(size=(7, 3)).astype(np.float32)),
        "ligand_element": torch.tensor([atom.GetAtomicNum() for atom in molecule.GetAtoms()]),
        "ligand_bond_index": torch.from_numpy(bonds[:, :2].T.copy()),
        "ligand_bond_type": torch.from_numpy(bonds[:, 2].copy()),
        "ligand_smiles": "c1ccncc1C",
        "ligand_filename": f"pocket/ligand_{seed}.sdf",
        "protein_pos": torch.from_numpy((rng.normal(size=(13, 3)) + 5).astype(np.float32)),
        "protein_element": torch.tensor([7, 6, 6, 8] * 3 + [6]),
        "protein_is_backbone": torch.tensor([True] * 12 + [False]),
        "protein_atom_to_aa_type": torch.tensor([5] * 8 + [18] * 5),
        "protein_atom_name": ["N", "CA", "C", "O"] * 3 + ["CB"],
        **changes,
    }


def write_lmdb(path: Path, *entries: bytes) -> Path:
    with lmdb.open(str(path), map_size=1 << 24, subdir=False) as database, database.begin(write=True) as transaction:
        for number, value in enumerate(entries):
            transaction.put(str(number).encode(), value)
    return path


def from_lmdb(tmp_path: Path, *entries: bytes, **options: Any) -> Complexes:
    path = write_lmdb(tmp_path / "data.lmdb", *entries)
    return run(tmp_path, lmdb=path, unsafe_unpickle=True, **options)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("arrays", ["torch", "numpy"])
def test_an_lmdb_of_pickles_is_converted(tmp_path, arrays, protocol, caplog):
    raw = entry()
    if arrays == "numpy":
        raw = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in raw.items()}
    found = from_lmdb(tmp_path, pickle.dumps(raw, protocol)).complex(0)
    assert found.identifier == "pocket/ligand_0" and found.smiles == Chem.CanonSmiles("c1ccncc1C")
    np.testing.assert_allclose(found.ligand["positions"] + found.centre, raw["ligand_pos"], atol=1e-5)
    assert found.ligand["element"].tolist() == [6, 6, 6, 7, 6, 6, 6]
    assert found.ligand["aromatic"].tolist() == [1, 1, 1, 1, 1, 1, 0]
    np.testing.assert_allclose(found.pocket["positions"] + found.centre, raw["protein_pos"], atol=1e-5)
    # numbered by one-letter code there (F = 4, G = 5, W = 18), by name here
    assert found.pocket["residue_name"].astype(str).tolist() == ["GLY"] * 8 + ["TRP"] * 5
    assert found.pocket["residue"].tolist() == [7] * 8 + [17] * 5
    assert found.pocket["residue_number"].tolist() == [1] * 4 + [2] * 4 + [3] * 5
    assert "taken as zero" in caplog.text and not found.ligand["charge"].any()


def test_a_split_file_chooses_positions_among_the_sorted_keys(tmp_path):
    torch.save({"train": [2, 0], "test": [11]}, tmp_path / "split.pt")
    values = [pickle.dumps(entry(seed)) for seed in range(12)]
    options = {"split": tmp_path / "split.pt"}
    # keys are text: 0, 1, 10, 11, 2, ..., 9
    assert from_lmdb(tmp_path, *values, **options).identifiers == ["pocket/ligand_10", "pocket/ligand_0"]
    (tmp_path / "data.lmdb").unlink()
    options |= {"part": "test", "overwrite": True}
    assert from_lmdb(tmp_path, *values, **options).identifiers == ["pocket/ligand_9"]
    with pytest.raises(UserError, match='no part "valid"; it has train, test'):
        from_lmdb(tmp_path, *values, **options | {"part": "valid"})
    torch.save({"test": [12]}, tmp_path / "split.pt")
    with pytest.raises(UserError, match="position 12, but the LMDB has 12"):
        from_lmdb(tmp_path, *values, **options)
    with pytest.raises(MissingFile, match=r"none\.pt"):
        from_lmdb(tmp_path, *values, **options | {"split": tmp_path / "none.pt"})


class Evil:
    """A pickle that makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class EvilStorage:
    """The same, hidden where a tensor keeps its numbers."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        buffer = io.BytesIO()
        torch.save(Evil(self.path), buffer, _use_new_zipfile_serialization=False)
        return torch.storage._load_from_bytes, (buffer.getvalue(),)


@pytest.mark.parametrize("kind", [Evil, EvilStorage])
def test_code_in_a_pickle_is_not_run(tmp_path, kind):
    target = tmp_path / "it_ran"
    trap = pickle.dumps(entry(ligand_filename="x") | {"extra": kind(target)})
    pickle.loads(trap)
    assert target.exists(), "the trap works"
    target.unlink()
    found = from_lmdb(tmp_path, trap, pickle.dumps(entry()))
    assert found.identifiers == ["pocket/ligand_0"] and not target.exists()
    assert list(skipped(tmp_path)) == ["0"]


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "builtins.getattr", "numpy.load", "torch.load"])
def test_a_pickle_may_name_no_function_that_is_not_listed(name):
    module, _, function = name.rpartition(".")
    with pytest.raises(UserError, match=f"asks for {name}.*was not run"):
        unpickle(f"c{module}\n{function}\n.".encode())


def test_entries_that_are_damaged_or_lack_something_are_left_out(tmp_path):
    raw = entry()
    lacking = {name: value for name, value in raw.items() if name != "protein_pos"}
    values = {
        "cannot be unpickled": pickle.dumps(raw)[:-200],
        "holds a list": pickle.dumps([1, 2]),
        "lacks protein_pos": pickle.dumps(lacking),
        "protein_atom_to_aa_type holds": pickle.dumps(entry(protein_atom_to_aa_type=torch.full((13,), 20))),
        "ligand_bond_index holds": pickle.dumps(entry(ligand_bond_index=raw["ligand_bond_index"] + 5)),
        "whole numbers (7,)": pickle.dumps(entry(ligand_element=torch.ones(6, dtype=torch.int64))),
        "not finite": pickle.dumps(entry(ligand_pos=torch.full((7, 3), torch.nan))),
        "one frame": pickle.dumps(entry(ligand_pos=raw["ligand_pos"] + 100)),
        "12 names for 13": pickle.dumps(entry(protein_atom_name=["C"] * 12)),
        "ligand_pos is": pickle.dumps(entry(ligand_pos=torch.zeros(7))),
    }
    found = from_lmdb(tmp_path, *values.values(), pickle.dumps(raw))
    assert len(found) == 1
    reasons = skipped(tmp_path)
    for number, said in enumerate(values):
        assert said in reasons[str(number)], reasons[str(number)]


# --- the example


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_example_prepares_as_its_manifest_says(tmp_path, split):
    found = run(tmp_path, EXAMPLE / f"{split}.tar.xz", radius=6.0)
    rows = [row for row in manifest() if row["split"] == split]
    assert found.identifiers == sorted(row["id"] for row in rows) and skipped(tmp_path) == {}
    sizes = {row["id"]: int(row["n_lig"]) for row in rows}
    assert [len(found.complex(i).ligand["element"]) for i in range(len(found))] == [sizes[i] for i in found.identifiers]


def test_no_receptor_cluster_of_the_example_is_in_two_splits_and_it_fits_in_git():
    clusters: dict[str, set[str]] = {}
    for row in manifest():
        clusters.setdefault(row["cluster"], set()).add(row["split"])
    assert len(clusters) == 34 and all(len(splits) == 1 for splits in clusters.values())
    assert sum(path.stat().st_size for path in EXAMPLE.glob("*.tar.xz")) < 1.5e6


def manifest() -> list[dict[str, str]]:
    with (EXAMPLE / "manifest.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_without_rdkit_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    folder = write_pair(tmp_path / "pairs")
    monkeypatch.setitem(sys.modules, "rdkit.Chem", None)
    assert command(folder, "--output", tmp_path / "out.h5") == 2
    assert 'pip install "gdyn[prepare]"' in capsys.readouterr().err
