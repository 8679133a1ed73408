"""Structure files read: which residues, which atoms, which names, and whether B is a confidence."""

import csv
import gzip
import io
import tarfile
from pathlib import Path

import biotite.structure as struc
import numpy as np
import pytest
from biotite.structure.io.pdb import PDBFile

from gdyn.engines.monodecoder.chains import Chain, Unusable, confidence, looks_predicted, read_chains
from gdyn.engines.monodecoder.features import features, peptide_bonds, torsions
from tests.backbones import HELIX, THREE, atom_line, build, mmcif, pdb, wandering

EXAMPLES = Path(__file__).parents[2] / "examples/proteins"
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
NINE = wandering(9)
GARBAGE = bytes(range(128, 256)) * 30


def chains(text, name="x.pdb"):
    return read_chains(name, text if isinstance(text, bytes) else text.encode())


def only(text, name="x.pdb"):
    (chain,) = chains(text, name)
    return chain


def lines(backbone, names, **options):
    return [
        atom_line(atom, name, number, position, **options)
        for number, (name, atoms) in enumerate(zip(names, backbone, strict=True), 1)
        for atom, position in zip(("N", "CA", "C", "O"), atoms, strict=True)
    ]


# --- residues and atoms


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("write", "suffix"), [(pdb, ".pdb"), (pdb, ".ent"), (pdb, ".PDB"), (mmcif, ".cif")])
def test_letters_and_places_are_those_of_the_file(write, suffix, packed):
    backbone = wandering(20)
    data = write(LETTERS, backbone).encode()
    chain = only(gzip.compress(data) if packed else data, f"AF-1.v2{suffix}{'.gz' if packed else ''}")
    assert (chain.identifier, chain.letters, chain.incomplete) == ("AF-1.v2", LETTERS, 0)
    np.testing.assert_allclose(chain.backbone, backbone, atol=0.0006)
    np.testing.assert_array_equal(chain.b_factors, 20.0)


def test_atoms_may_be_in_any_order():
    text = pdb("AAAAAAAAA", NINE).splitlines()
    shuffled = [line for i in range(0, 36, 4) for line in reversed(text[i : i + 4])]
    np.testing.assert_allclose(only("\n".join([*shuffled, "TER", "END"])).backbone, NINE, atol=0.0006)


@pytest.mark.parametrize(
    ("name", "letter"),
    [("MSE", "M"), ("SEP", "S"), ("HIE", "H"), ("CYX", "C"), ("DAL", "A"), ("SEC", "X"), ("UNK", "X"), ("Q1Q", "X")],
)
def test_residues_that_are_not_standard_are_their_parent_or_unknown(name, letter):
    names = ["ALA"] * 4 + [name] + ["ALA"] * 4
    text = lines(NINE, names)
    text[16:20] = [line.replace("ATOM  ", "HETATM") for line in text[16:20]]
    assert only("\n".join(text)).letters == f"AAAA{letter}AAAA"


@pytest.mark.parametrize("name", ["SEC", "UNK", "MSE", "Q1Q"])
def test_a_chain_does_not_end_at_a_hetatm_record_within(name):
    text = lines(NINE, ["ALA"] * 4 + [name] + ["ALA"] * 4)
    text[16:20] = [line.replace("ATOM  ", "HETATM") for line in text[16:20]]
    for end in ([], ["TER"]):
        assert len(only("\n".join([*text, *end])).letters) == 9


def test_waters_ligands_and_nucleic_acids_are_no_residues():
    text = lines(NINE, ["ALA"] * 9)
    text += ["TER", *lines(NINE[:3] + 30, ["GLU"] * 3, record="HETATM")[:4]]
    text += [atom_line("O", "HOH", 90 + i, [i, 50, 0], record="HETATM") for i in range(5)]
    text += ["TER", *(atom_line(atom, " DA", i, [i, 60, 0], chain="D") for i in range(5) for atom in ("P", "C1'"))]
    chain = only("\n".join(text))
    assert (chain.identifier, chain.letters) == ("x", "A" * 9)


@pytest.mark.parametrize("atom", [0, 1, 2])
def test_a_residue_without_a_whole_backbone_is_left_out_and_counted(atom):
    backbone = NINE.copy()
    backbone[3, atom] = np.nan
    chain = only(pdb("ACDEFGHIK", backbone))
    assert (chain.letters, chain.incomplete) == ("ACDFGHIK", 1)
    np.testing.assert_allclose(chain.backbone, np.delete(NINE, 3, axis=0), atol=0.0006)
    assert peptide_bonds(chain.backbone).tolist() == [True, True, False, True, True, True, True]


@pytest.mark.parametrize("text", ["     nan", "  xx.xxx", "9999.000"])
def test_a_residue_whose_atoms_cannot_be_there_is_left_out(text):
    spoilt = pdb("ACDEFGHIK", NINE + 10).splitlines()
    spoilt[13] = spoilt[13][:30] + text + spoilt[13][38:]
    chain = only("\n".join(spoilt))
    assert (chain.letters, chain.incomplete) == ("ACDFGHIK", 1)


def test_a_missing_oxygen_is_no_missing_residue():
    backbone = NINE.copy()
    backbone[3, 3] = np.nan
    chain = only(pdb("A" * 9, backbone))
    assert len(chain.letters) == 9 and np.isnan(chain.backbone[3, 3]).all()
    made = features(chain.letters, chain.backbone, np.ones(9), np.zeros((20, 0)))
    assert all(np.isfinite(values).all() for values in made.values())


@pytest.mark.parametrize(("occupancies", "chosen"), [((0.3, 0.7), 1), ((0.7, 0.3), 0), ((0.5, 0.5), 0), ((0, 0), 0)])
def test_of_alternative_locations_the_fullest_counts_and_of_equals_the_first(occupancies, chosen):
    text = []
    for number, atoms in enumerate(NINE, 1):
        for atom, position in zip(("N", "CA", "C", "O"), atoms, strict=True):
            for altloc, shift, occupancy in zip("AB", (0.0, 0.4), occupancies, strict=True):
                where = position + [shift, 0, 0]
                text.append(atom_line(atom, "GLY", number, where, altloc=altloc, occupancy=occupancy))
    np.testing.assert_allclose(only("\n".join(text)).backbone, NINE + [0.4 * chosen, 0, 0], atol=0.0006)


def test_of_two_kinds_of_residue_in_one_place_the_fuller_counts():
    text = lines(NINE, ["ALA"] * 9)
    here = NINE[4]
    both = [
        atom_line(atom, name, 5, position, altloc=altloc, occupancy=occupancy)
        for name, altloc, occupancy in (("SER", "A", 0.4), ("THR", "B", 0.6))
        for atom, position in zip(("N", "CA", "C", "O"), here, strict=True)
    ]
    assert only("\n".join([*text[:16], *both, *text[20:]])).letters == "AAAATAAAA"


def test_only_the_first_model_counts():
    models = [f"MODEL        {i}\n{pdb('A' * 9, NINE + i)[:-4]}ENDMDL" for i in (1, 2)]
    np.testing.assert_allclose(only("\n".join([*models, "END"])).backbone, NINE + 1, atol=0.0006)


def test_several_chains_are_several_structures_and_one_alone_has_no_suffix():
    text = "".join(pdb("A" * 9, NINE + 30 * i, chain=name)[:-4] for i, name in enumerate("LH"))
    assert [chain.identifier for chain in chains(text, "1abc.ent.gz".removesuffix(".gz"))] == ["1abc_L", "1abc_H"]
    assert only(pdb("A" * 9, NINE, chain="H"), "my protein.pdb").identifier == "my_protein"


def test_insertion_codes_and_negative_numbers_are_residues_of_their_own():
    text = lines(NINE, ["ALA"] * 9)
    renamed = [line[:22] + "  -1 " + line[27:] if i < 4 else line for i, line in enumerate(text)]
    renamed = [line[:22] + "   4A" + line[27:] if 16 <= i < 20 else line for i, line in enumerate(renamed)]
    assert len(only("\n".join(renamed)).letters) == 9


NAN = np.full_like(NINE, np.nan)
BAD = {
    "empty": ("x.pdb", b"", "it is empty"),
    "white space": ("x.cif", b" \n\n", "it is empty"),
    "no structure": ("x.pdb", b"hello\n", "no protein chain"),
    "binary": ("x.pdb", GARBAGE, "no protein chain|cannot be read"),
    "binary mmCIF": ("x.cif", GARBAGE, "cannot be read"),
    "mmCIF without a block": ("x.cif", b"# nothing\n", "cannot be read: no data block"),
    "mmCIF cut short": ("x.cif", mmcif("A" * 9, NINE).encode()[:-30], "cannot be read: .*loop"),
    "mmCIF of something else": ("x.cif", b"data_x\n_cell.length_a 3\n", "no protein chain"),
    "line cut short": ("x.pdb", pdb("A" * 9, NINE).encode()[:100], "cannot be read: .*too short"),
    "gzip cut short": ("x.pdb.gz", gzip.compress(pdb("A" * 9, NINE).encode())[:-40], "cannot be unpacked"),
    "gzip that is none": ("x.pdb.gz", pdb("A" * 9, NINE).encode(), "cannot be unpacked: Not a gzipped file"),
    "gzip corrupt": ("x.pdb.gz", gzip.compress(pdb("A" * 9, NINE).encode())[:60] + GARBAGE, "cannot be unpacked"),
    "gzip empty": ("x.pdb.gz", b"", "empty"),
    "water": ("x.pdb", "\n".join(atom_line("O", "HOH", i, [i, 0, 0]) for i in range(9)).encode(), "no protein"),
    "nucleic acid": (
        "x.pdb",
        "\n".join(atom_line(a, " DA", i, [i, 0, 0]) for i in range(9) for a in ("P", "C1'")).encode(),
        "no protein chain",
    ),
    "header only": ("x.pdb", b"HEADER    HYDROLASE\nEND\n", "no protein chain"),
}


@pytest.mark.parametrize(("name", "data", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_refused_in_a_sentence(name, data, said):
    with pytest.raises(Unusable, match=said):
        read_chains(name, data)


# --- confidence


def model(residues=60, seed=0):
    """A chain with thermal noise in its bonds, and how crowded each residue is, 0..1."""
    rng = np.random.default_rng(seed)
    backbone = wandering(residues, seed) + rng.normal(0, 0.01, (residues, 4, 3))
    ca = backbone[:, 1]
    crowd = (np.linalg.norm(ca[:, None] - ca, axis=-1) < 8).sum(1)
    return backbone, (crowd - crowd.min()) / np.ptp(crowd)


HEADERS = [
    ("x.pdb", "EXPDTA    X-RAY DIFFRACTION", False),
    ("x.pdb", "TITLE     CRYSTAL OF AN ALPHAFOLD DESIGN\nEXPDTA    X-RAY DIFFRACTION", False),
    ("x.pdb", "EXPDTA    SOLUTION NMR", False),
    ("AF-P12345-F1-model_v4.pdb", "EXPDTA    X-RAY DIFFRACTION", False),
    ("x.pdb", "TITLE     ALPHAFOLD MONOMER V2.0 PREDICTION FOR X", True),
    ("x.pdb", "TITLE     ESMFOLD V1 PREDICTION FOR INPUT", True),
    ("AF-P12345-F1-model_v4.pdb", "", True),
    ("run1_colabfold.pdb", "", True),
    ("x.cif", "_ma_qa_metric.name pLDDT", True),
    ("x.cif", "_exptl.method 'ELECTRON MICROSCOPY'", False),
]


@pytest.mark.parametrize(("name", "header", "predicted"), HEADERS)
def test_the_files_own_words_outweigh_its_numbers(name, header, predicted):
    backbone, crowd = model()
    # numbers that say the opposite
    b = 30 + 40 * (1 - crowd if predicted else crowd)
    text = (mmcif if name.endswith(".cif") else pdb)("A" * 60, backbone, b, header=header)
    plddt, decision = confidence(only(text, name))
    assert "says the file" in decision
    np.testing.assert_allclose(plddt, b / 100 if predicted else 1, atol=1e-4)


def test_without_words_confidence_rises_and_thermal_motion_falls_with_the_crowd():
    backbone, crowd = model()
    assert confidence(only(pdb("A" * 60, backbone, 30 + 60 * crowd)))[1] == "pLDDT (by the numbers)"
    assert confidence(only(pdb("A" * 60, backbone, 30 - 20 * crowd)))[1] == "no pLDDT (by the numbers)"


def test_bonds_that_no_experiment_sees_are_a_programs():
    _, crowd = model()
    chain = only(pdb("A" * 60, wandering(60), 60 - 30 * crowd))
    assert looks_predicted(chain)


@pytest.mark.parametrize("b", [0.0, 1.0, 50.0])
def test_a_constant_column_is_no_confidence(b):
    backbone, _ = model()
    chain = only(pdb("A" * 60, backbone, b, header="TITLE     ALPHAFOLD"))
    np.testing.assert_array_equal(confidence(chain)[0], 1)
    with pytest.raises(Unusable, match="cannot be pLDDT"):
        confidence(chain, "yes")


def test_a_scale_of_0_to_1_is_recognised():
    backbone, crowd = model()
    b = 0.3 + 0.6 * crowd
    np.testing.assert_allclose(confidence(only(pdb("A" * 60, backbone, b)))[0], b, atol=0.006)


def test_the_user_has_the_last_word():
    backbone, crowd = model()
    chain = only(pdb("A" * 60, backbone, 60 - 30 * crowd, header="EXPDTA    X-RAY DIFFRACTION"))
    np.testing.assert_allclose(confidence(chain, "yes")[0], chain.b_factors / 100)
    np.testing.assert_array_equal(confidence(chain, "no")[0], 1)


# --- real chains


def real(split="test"):
    with tarfile.open(EXAMPLES / f"{split}.tar.xz") as archive:
        for member in archive:
            if member.isfile():
                yield member.name, archive.extractfile(member).read()


@pytest.mark.slow
def test_real_chains_are_recognised_without_their_names():
    kinds = {
        row["identifier"]: row["kind"] for row in csv.DictReader((EXAMPLES / "manifest.tsv").open(), delimiter="\t")
    }
    wrong = []
    for split in ("train", "validation", "test"):
        for name, data in real(split):
            (chain,) = read_chains("x.pdb", data)
            if confidence(chain)[1].startswith("pLDDT") != (kinds[Path(name).stem] != "experiment"):
                wrong.append(name)
    assert wrong == []


def test_real_chains_have_the_torsions_and_most_of_the_elements_that_biotite_finds():
    alike = total = 0
    for name, data in real():
        (chain,) = read_chains(Path(name).name, data)
        atoms = PDBFile.read(io.StringIO(data.decode())).get_structure(model=1)
        assert [THREE[letter] for letter in chain.letters] == list(atoms.res_name[atoms.atom_name == "CA"])
        joined = peptide_bonds(chain.backbone)
        theirs = np.stack(struc.dihedral_backbone(atoms), axis=1)
        ours = torsions(chain.backbone, joined)
        both = (ours != 0) & np.isfinite(theirs)
        assert both.sum() > 2.9 * joined.sum()
        np.testing.assert_allclose(np.exp(1j * ours[both]), np.exp(1j * theirs[both]), atol=1e-3)
        classes = features(chain.letters, chain.backbone, np.ones(len(chain.letters)), np.zeros((20, 0)))["node/ss/x"]
        # P-SEA: from CA alone, by other criteria (Labesse et al. 1997)
        elements = struc.annotate_sse(atoms)
        alike += (np.array(["c", "a", "b"])[classes.argmax(1)] == elements).sum()
        total += len(elements)
    assert alike / total > 0.75


def test_the_elements_of_ubiquitin_are_those_of_its_entry():
    (data,) = [data for split in ("train", "validation", "test") for name, data in real(split) if "1UBI" in name]
    (chain,) = read_chains("1UBI.pdb", data)
    classes = features(chain.letters, chain.backbone, np.ones(76), np.zeros((20, 0)))["node/ss/x"].argmax(1)
    # Vijay-Kumar et al. 1987, residues from 1
    assert (classes[23:33] == 1).all()
    for first, last in ((2, 6), (12, 16), (41, 44), (67, 71)):
        assert (classes[first - 1 : last] == 2).all(), (first, last)
    assert (classes[[8, 9, 35, 36, 75]] == 0).all()


def test_an_ideal_helix_survives_the_file():
    (chain,) = chains(pdb("A" * 15, build([HELIX] * 15)))
    angles = torsions(chain.backbone, np.ones(14, bool))
    np.testing.assert_allclose(np.rad2deg(angles[1:-1, :2]), np.broadcast_to(HELIX, (13, 2)), atol=0.2)
    assert isinstance(chain, Chain)
