"""Sampled atoms become molecules whose quality is known: against RDKit, EDM's published tables, and real ligands."""

import csv
import io
import itertools
import re
import sys
import tarfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rdkit import Chem, DataStructs
from rdkit.Chem import QED, AllChem

from gdyn.engines.diffusion import molecules as sampled
from gdyn.engines.diffusion.quality import sanitised
from gdyn.engines.diffusion.sample_page import PICTURES
from gdyn.engines.diffusion.stability import stable_atoms
from gdyn.errors import MissingFile, UserError

EXAMPLE = Path(__file__).parents[2] / "examples" / "ligands_in_pockets"
FAR = "ATOM      1  CA  ALA A   1      99.000  99.000  99.000  1.00  0.00           C\n"
"""A pocket that nothing touches."""


@lru_cache
def complexes(split: str) -> dict[str, tuple[Any, str]]:
    """Name -> (RDKit molecule as drawn by its authors, text of the pocket)."""
    with tarfile.open(EXAMPLE / f"{split}.tar.xz") as archive:
        texts = {Path(m.name).name: archive.extractfile(m).read().decode() for m in archive if m.isfile()}  # type: ignore[union-attr]
    names = sorted(name.removesuffix("_ligand.sdf") for name in texts if name.endswith("_ligand.sdf"))
    return {n: (Chem.MolFromMolBlock(texts[f"{n}_ligand.sdf"]), texts[f"{n}_pocket10.pdb"]) for n in names}


def rebuilt(molecule: Any, noise: float = 0.0, seed: int = 0) -> Any:
    """From elements, positions and charges alone."""
    x = molecule.GetConformer().GetPositions()
    numbers = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()])
    charges = np.array([atom.GetFormalCharge() for atom in molecule.GetAtoms()])
    return sampled.build(numbers, x + noise * np.random.default_rng(seed).normal(size=x.shape), charges)


def in_space(smiles: str, hydrogens: bool = False, seed: int = 1) -> Any:
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert AllChem.EmbedMolecule(molecule, randomSeed=seed) == 0
    AllChem.MMFFOptimizeMolecule(molecule)
    return molecule if hydrogens else Chem.RemoveHs(molecule)


def flat(molecule: Any) -> str:
    return Chem.MolToSmiles(Chem.RemoveHs(molecule, sanitize=False), isomericSmiles=False)


def pairs(molecule: Any) -> set[frozenset[int]]:
    return {frozenset((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx())) for bond in molecule.GetBonds()}


def rows_of(*molecules: Any, smiles: set[str] = frozenset(), pocket: str = FAR, checks: str = "dock_fast") -> Any:  # type: ignore[assignment]
    return sampled.table({"p": molecules}, {"p": pocket}, set(smiles), checks=checks)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_real_ligands_come_back_from_their_atoms(split):
    """Measured: all connected and valid, 98 % of the SMILES, 99.8 % of the bonds; without it, Open Babel has 63 %."""
    same = right = bonds = 0
    for molecule, _ in complexes(split).values():
        found = rebuilt(molecule)
        assert pairs(found) == pairs(molecule)
        found = sanitised(found)
        assert found is not None
        same += flat(found) == flat(molecule)
        kinds = {frozenset((b.GetBeginAtomIdx(), b.GetEndAtomIdx())): b.GetBondType() for b in found.GetBonds()}
        for bond in molecule.GetBonds():
            right += kinds[frozenset((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()))] == bond.GetBondType()
            bonds += 1
    assert same >= 0.95 * len(complexes(split))
    assert right >= 0.99 * bonds


def test_bonds_survive_coordinates_that_are_a_little_wrong():
    found = [(rebuilt(m, noise=0.03, seed=i), m) for i, (m, _) in enumerate(complexes("validation").values())]
    assert np.mean([pairs(a) == pairs(b) for a, b in found]) > 0.95
    assert np.mean([sanitised(a) is not None for a, _ in found]) > 0.95
    assert np.mean([sanitised(a) is not None and flat(sanitised(a)) == flat(b) for a, b in found]) > 0.75


@pytest.mark.parametrize(
    "smiles",
    [
        *("CC#CC", "CC#N", "CC(=O)NC", "C[N+](=O)[O-]", "CS(=O)(=O)NC", "CS(C)=O", "CC(=O)[O-]", "COP(=O)(O)OC"),
        *(
            "c1ccncc1",
            "c1cc[nH]c1",
            "Cn1ccnc1",
            "c1ccsc1",
            "c1ccc2ccccc2c1",
            "C1CCCCC1",
            "C=CC=C",
            "CC=C=CC",
            "CC#CC#N",
        ),
        *("C[n+]1ccccc1", "OB(O)c1ccccc1", "FC(F)(F)c1ccc(Br)cc1I", "NC(=[NH2+])c1ccccc1", "C1CC1", "O=C1C=CC(=O)C=C1"),
    ],
)
def test_functional_groups_are_recognised_with_and_without_hydrogens(smiles):
    for hydrogens in (False, True):
        found = sanitised(rebuilt(in_space(smiles, hydrogens)))
        assert found is not None
        assert flat(found) == flat(Chem.MolFromSmiles(smiles))


def test_a_molecule_does_not_depend_on_its_place_or_the_order_of_its_atoms():
    molecule = in_space("CC(=O)Nc1ccc(O)cc1C#N")
    order = np.random.default_rng(3).permutation(molecule.GetNumAtoms()).tolist()
    turned = Chem.RenumberAtoms(molecule, order)
    turn = np.linalg.qr(np.random.default_rng(4).normal(size=(3, 3)))[0]
    turned.GetConformer().SetPositions(turned.GetConformer().GetPositions() @ turn + 30)
    assert flat(sanitised(rebuilt(turned))) == flat(sanitised(rebuilt(molecule))) == flat(molecule)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:posebusters")
@pytest.mark.parametrize(
    ("numbers", "positions"),
    [
        ([], np.zeros((0, 3))),
        ([6], np.zeros((1, 3))),
        ([6, 7, 8], np.zeros((3, 3))),
        ([6, 7], np.full((2, 3), np.nan)),
        ([6, 7], np.array([[0.0, 0, 0], [1e30, 0, np.inf]])),
        ([6, 8], np.array([[0.0, 0, 0], [1e6, 0, 0]])),
        ([0, 0, 6], np.array([[0.0, 0, 0], [9, 0, 0], [50, 0, 0]])),
    ],
)
def test_nothing_that_is_sampled_makes_building_or_judging_fail(tmp_path, numbers, positions):
    molecule = sampled.build(np.array(numbers), positions, None)
    assert (molecule.GetNumAtoms(), molecule.GetNumBonds()) == (len(numbers), 0)
    groups = {"p": [molecule]}
    rows = sampled.table(groups, {"p": FAR}, set(), checks="dock_fast")
    assert rows[0]["atoms"] == len(numbers) and rows[0]["pb_pass"] is not True
    sampled.write_csv(tmp_path / "a.csv", rows)
    sampled.write_sdf(tmp_path / "a.sdf", groups, rows)
    sampled.write_report(tmp_path, rows, sampled.summary(rows, groups), groups, {})


def test_no_charge_is_neutral():
    x = in_space("CCO").GetConformer().GetPositions()
    assert flat(sanitised(sampled.build(np.array([6, 6, 8]), x, None))) == "CCO"


def test_an_unknown_element_is_a_dummy_and_invalid():
    x = in_space("CCO").GetConformer().GetPositions()
    molecule = sampled.build(np.array([6, 6, 0]), x, np.zeros(3, int))
    assert [atom.GetSymbol() for atom in molecule.GetAtoms()] == ["C", "C", "*"]
    (row,) = rows_of(molecule)
    assert (row["valid"], row["smiles"], row["novel"], row["qed"], row["pb_pass"]) == (False, "", None, None, False)


def test_an_atom_with_too_many_bonds_is_invalid():
    molecule = Chem.RWMol(rebuilt(in_space("CC(C)(C)C")))
    molecule.GetAtomWithIdx(1).SetAtomicNum(7)
    (row,) = rows_of(molecule.GetMol())
    assert not row["valid"] and row["connected"] and row["smiles"] == ""


def test_validity_is_of_the_largest_fragment():
    whole = in_space("CCCO")
    x = np.vstack([whole.GetConformer().GetPositions(), [[50, 0, 0]]])
    (row,) = rows_of(sampled.build(np.array([6, 6, 6, 8, 6]), x, None))
    assert (row["valid"], row["connected"], row["fragments"], row["smiles"]) == (True, False, 2, "CCCO")
    assert row["pb_all_atoms_connected"] is False and row["pb_pass"] is False


def test_qed_is_rdkits_of_the_true_molecule():
    for molecule, _ in itertools.islice(complexes("validation").values(), 5):
        (row,) = rows_of(rebuilt(molecule))
        assert row["smiles"] == flat(molecule)
        assert row["qed"] == pytest.approx(QED.qed(molecule), abs=1e-9)


def test_uniqueness_novelty_and_diversity_of_a_set_counted_by_hand():
    smiles = ["CCO", "CCO", "CCN", "c1ccccc1", "C[C@H](N)C(=O)O"]
    broken = sampled.build(np.array([0, 0]), np.array([[0.0, 0, 0], [9, 0, 0]]), None)
    groups = {"a": [rebuilt(in_space(text)) for text in smiles], "b": [broken], "c": []}
    rows = sampled.table(
        groups, {"a": FAR, "b": FAR}, {"OCC", "C[C@@H](N)C(=O)O", "not a molecule"}, checks="dock_fast"
    )
    assert [row["number"] for row in rows] == [1, 2, 3, 4, 5, 1]
    assert [row["novel"] for row in rows] == [False, False, True, True, False, None]
    found = sampled.summary(rows, groups)
    assert (found["all"]["number"], found["all"]["valid"], found["a"]["valid"]) == (6, 5 / 6, 1.0)
    assert found["a"]["uniqueness"] == found["all"]["uniqueness"] == 4 / 5
    assert found["a"]["novelty"] == 2 / 4
    prints = [AllChem.GetMorganFingerprintAsBitVect(Chem.MolFromSmiles(row["smiles"]), 2, 1024) for row in rows[:5]]
    pairwise = [DataStructs.TanimotoSimilarity(a, b) for a, b in itertools.combinations(prints, 2)]
    assert found["a"]["diversity"] == pytest.approx(1 - np.mean(pairwise))
    assert found["all"]["diversity"] == found["a"]["diversity"]
    assert found["a"]["qed"] == pytest.approx(np.mean([QED.qed(Chem.MolFromSmiles(text)) for text in smiles]))
    assert found["b"]["uniqueness"] is found["b"]["novelty"] is found["b"]["qed"] is found["b"]["diversity"] is None
    assert {value for name, value in found["c"].items() if name not in ("number", "pb_checked")} == {None}


def exactly(numbers: str, positions: Any) -> Any:
    return sampled.build(np.array([Chem.Atom(s).GetAtomicNum() for s in numbers.split()]), np.array(positions), None)


def water(length: float = 0.96) -> Any:
    half = np.radians(104.5 / 2)
    return exactly("O H H", [[0, 0, 0], *([s * length * np.sin(half), length * np.cos(half), 0] for s in (-1, 1))])


def methane(length: float = 1.09) -> Any:
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3)
    return exactly("C H H H H", [[0, 0, 0], *(length * corners)])


def benzene(length: float, hydrogens: bool = True) -> Any:
    ring = np.array([[np.cos(a), np.sin(a), 0] for a in np.arange(6) * np.pi / 3])
    if not hydrogens:
        return exactly("C " * 6, length * ring)
    return exactly("C " * 6 + "H " * 6, np.vstack([length * ring, (length + 1.09) * ring]))


def test_stability_is_edms_where_there_are_hydrogens():
    assert stable_atoms(water()).all()
    assert stable_atoms(methane()).all()
    # O-H is 96 pm, the margin 10 pm: at 1.07 Å there is no bond
    assert stable_atoms(water(1.055)).all() and not stable_atoms(water(1.07)).any()
    # C=C is 134 pm, its margin 5 pm, and no bond of 1.40 Å is double: each carbon has three single ones
    assert stable_atoms(benzene(1.40)).tolist() == [False] * 6 + [True] * 6
    # and at 1.38 Å both of its ring bonds are double: 2 + 2 + 1 = 5
    assert stable_atoms(benzene(1.38)).tolist() == [False] * 6 + [True] * 6
    assert stable_atoms(exactly("C C H H", [[0, 0, 0], [1.2, 0, 0], [-1.09, 0, 0], [2.29, 0, 0]])).all()  # ethyne


def test_stability_without_hydrogens_is_a_valence_that_is_not_exceeded():
    assert stable_atoms(benzene(1.40, hydrogens=False)).all()
    assert stable_atoms(exactly("C", [[0, 0, 0]])).all()
    assert not stable_atoms(exactly("C C", [[0, 0, 0], [9, 0, 0]])).any()
    assert not stable_atoms(exactly("*", [[0, 0, 0]])).any()
    assert stable_atoms(exactly("F C F", [[-1.35, 0, 0], [0, 0, 0], [1.35, 0, 0]])).all()
    assert stable_atoms(exactly("C F C", [[-1.35, 0, 0], [0, 0, 0], [1.35, 0, 0]])).tolist() == [True, False, True]


def test_clashes_are_counted_as_by_brute_force():
    molecule, pocket = complexes("test")["mcs_docking-hne-0"]
    x = molecule.GetConformer().GetPositions()
    numbers = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()])
    moved = sampled.build(numbers, x + np.array([3.0, 0, 0]), None)
    radius = Chem.GetPeriodicTable().GetRvdw
    atoms = [line for line in pocket.splitlines() if line.startswith("ATOM")]
    expected = 0
    for line, (number, position) in itertools.product(atoms, zip(numbers, x + np.array([3.0, 0, 0]), strict=True)):
        distance = np.linalg.norm(position - [float(line[i : i + 8]) for i in (30, 38, 46)])
        expected += distance < 0.75 * (radius(int(number)) + radius(line[76:78].strip().capitalize()))
    assert expected > 0
    assert rows_of(moved, pocket=pocket)[0]["clashes"] == expected
    assert rows_of(rebuilt(molecule), pocket=pocket)[0]["clashes"] == 0


def test_posebusters_passes_ligands_in_their_place_and_fails_those_out_of_it(tmp_path):
    groups, pockets = {}, {}
    for name, (molecule, pocket) in itertools.islice(complexes("validation").items(), 0, 40, 10):
        x = molecule.GetConformer().GetPositions()
        numbers = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()])
        charges = np.array([atom.GetFormalCharge() for atom in molecule.GetAtoms()])
        inside = x + np.array([4.0, 0, 0])
        groups[name] = [sampled.build(numbers, place, charges) for place in (x, inside, 3 * x)]
        pockets[name] = tmp_path / f"{name}.pdb"
        pockets[name].write_text(pocket)
    rows = sampled.table(groups, pockets, set(), checks="dock_fast")
    assert [row["pb_pass"] for row in rows[::3]].count(True) >= 3
    for row in rows[1::3]:
        assert row["clashes"] > 0 and row["pb_minimum_distance_to_protein"] is False and row["pb_pass"] is False
    for row in rows[2::3]:
        assert row["fragments"] > 1 and row["pb_pass"] is False
    found = sampled.summary(rows, groups)["all"]
    assert (found["pb_checked"], found["pb_pass"]) == (12, sum(row["pb_pass"] for row in rows) / 12)
    assert found["pb_all_atoms_connected"] == 8 / 12 and found["clash_free"] == 8 / 12


@pytest.mark.slow
def test_workers_find_the_same_and_the_energy_check_belongs_to_dock():
    name = "fragments-frag_p38-4"
    molecule, pocket = complexes("train")[name]
    groups = {name: [rebuilt(molecule), rebuilt(molecule, noise=0.4)]}
    alone = sampled.table(groups, {name: pocket}, set())
    assert "pb_internal_energy" in alone[0] and alone[0]["pb_pass"] is True and alone[1]["pb_pass"] is False
    assert sampled.table(groups, {name: pocket}, set(), workers=2) == alone


def test_a_molecule_on_which_posebusters_fails_does_not_end_the_run(tmp_path):
    groups = {"p": [rebuilt(in_space("CCO")), sampled.build(np.array([]), np.zeros((0, 3)), None)]}
    rows = sampled.table(groups, {"p": FAR}, set(), checks="dock_fast")
    assert rows[0]["pb_pass"] is not None and rows[1]["pb_pass"] is None and rows[1]["pb_bond_lengths"] is None
    found = sampled.summary(rows, groups)
    assert (found["p"]["number"], found["p"]["pb_checked"]) == (2, 1)
    text = sampled.write_report(tmp_path, rows, found, groups, {}).read_text()
    assert "PoseBusters could not check 1 of 2 molecules" in text


def test_judging_says_nothing_on_the_terminal(capfd):
    rows_of(
        sampled.build(np.array([0, 6, 6]), np.array([[0, 0, 0], [1.5, 0, 0], [2.2, 1.3, 0]]), None),
        sampled.build(np.array([8, 6, 6]), np.array([[0, 0, 0], [1.4, 0, 0], [2.2, 1.3, 0]]), np.array([1, -1, 3])),
    )
    assert capfd.readouterr() == ("", "")


def test_csv_and_sdf_hold_what_the_table_says(tmp_path):
    groups = {
        "first": [rebuilt(in_space("CC(=O)[O-]"))],
        "a, b": [rebuilt(in_space("c1cc[nH]c1")), rebuilt(in_space("CO"))],
    }
    rows = sampled.table(groups, dict.fromkeys(groups, FAR), {"CO"}, checks="dock_fast")
    sampled.write_csv(tmp_path / "samples.csv", rows)
    with (tmp_path / "samples.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [(r["pocket"], r["number"], r["smiles"], r["novel"]) for r in read] == [
        *(("first", "1", "CC(=O)[O-]", "1"), ("a, b", "1", "c1cc[nH]c1", "1"), ("a, b", "2", "CO", "0")),
    ]
    assert [float(line["qed"]) for line in read] == [row["qed"] for row in rows]
    sampled.write_sdf(tmp_path / "samples.sdf", groups, rows)
    supplier = Chem.SDMolSupplier(str(tmp_path / "samples.sdf"))
    for molecule, original, row in zip(supplier, itertools.chain(*groups.values()), rows, strict=True):
        assert molecule.GetProp("_Name") == f"{row['pocket']} {row['number']}"
        assert flat(molecule) == row["smiles"] == molecule.GetProp("smiles")
        before = original.GetConformer().GetPositions()
        np.testing.assert_allclose(molecule.GetConformer().GetPositions(), before, atol=1e-4)
        assert float(molecule.GetProp("qed")) == row["qed"]


def test_an_invalid_molecule_is_written_too(tmp_path):
    molecule = sampled.build(np.array([0, 6]), np.array([[0, 0, 0], [30.0, 0, 0]]), None)
    groups = {"p": [molecule]}
    sampled.write_sdf(tmp_path / "a.sdf", groups, rows_of(molecule))
    (read,) = Chem.SDMolSupplier(str(tmp_path / "a.sdf"), sanitize=False)
    assert [atom.GetAtomicNum() for atom in read.GetAtoms()] == [0, 6]


def test_no_molecules_give_an_empty_table_and_a_page(tmp_path):
    for groups in ({}, {"p": []}):
        assert sampled.table(groups, {}, set()) == []
        found = sampled.summary([], groups)
        assert found["all"]["number"] == 0 and found["all"]["valid"] is None
        sampled.write_csv(tmp_path / "a.csv", [])
        assert "No molecules" in sampled.write_report(tmp_path, [], found, groups, {}).read_text()


def test_the_page_shows_the_molecules_and_escapes_names(tmp_path):
    many = [rebuilt(in_space("C" * n + "O")) for n in range(1, PICTURES + 4)]
    odd = sampled.build(np.array([0, 6]), np.array([[0, 0, 0], [30.0, 0, 0]]), None)
    groups = {"<script>alert(1)</script>": many, "b & c": [odd]}
    rows = sampled.table(groups, dict.fromkeys(groups, FAR), set(), checks="dock_fast")
    found = sampled.summary(rows, groups)
    path = sampled.write_report(tmp_path / "new", rows, found, groups, {"guidance": 2.5, "run": "<b>"})
    text = path.read_text()
    assert path == tmp_path / "new" / "samples.html"
    assert "<script" not in text and "&lt;script&gt;" in text and text.count("<b>") == 4  # of the tiles
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == PICTURES + 1
    for drawing in drawings:
        ElementTree.parse(io.StringIO(drawing))
    assert "3 more are not shown" in text and "1: invalid" in text and "2.5" in text
    assert 'src="data:image/png;base64,' in text and not re.findall(r'(?:src|href)="(?!data:)', text)
    best = sorted((row["qed"] for row in rows[:-1]), reverse=True)[:PICTURES]
    assert [float(q) for q in re.findall(r"QED (0\.\d\d)", text)] == [float(f"{q:.2f}") for q in best]


@pytest.mark.parametrize(
    ("pocket", "words"),
    [
        (Path("missing.pdb"), "missing.pdb, the pocket of p, cannot be read"),
        ("just one line", "just one line, the pocket of p, cannot be read"),
        ("no atoms\nin here\n", "pocket p has no atoms"),
    ],
)
def test_a_pocket_that_cannot_be_read_is_named(pocket, words):
    with pytest.raises((MissingFile, UserError), match=words):
        sampled.table({"p": [rebuilt(in_space("CCO"))]}, {"p": pocket}, set())


@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("networkx", lambda: sampled.build(np.array([6, 6]), np.array([[0, 0, 0], [1.5, 0, 0]]), None)),
        ("posebusters", lambda: sampled.table({}, {}, set())),
        ("rdkit.Chem", lambda: sampled.summary([], {})),
    ],
)
def test_a_missing_package_is_named_with_its_cure(monkeypatch, module: str, use: Callable[[], Any]):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf'{module}.*pip install "gdyn\[sample\]"'):
        use()
