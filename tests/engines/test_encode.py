"""gdyn encode: strings and table of structures; whole or not at all; letters that do not depend on the batch."""

import csv
import io
import logging
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from biotite.sequence.io.fasta import FastaFile

from gdyn.engines.monodecoder import alphabet, encode
from gdyn.engines.monodecoder.scores import batches
from gdyn.inference import Run
from gdyn.ranks import ALONE
from launch import encode as program
from launch import prepare
from tests.backbones import mmcif, pdb, wandering
from tests.engines.monodecoder_run import CODES
from tests.proteins import write_proteins

LETTERS = "ACDEFGHIKLMNPQRSTVWY" * 3


@pytest.fixture(scope="module")
def run(monodecoder_run) -> Run:
    return monodecoder_run


@pytest.fixture
def launched(run, monkeypatch):
    """gdyn encode with the words of a command line after the run folder; no log that another test has begun."""
    monkeypatch.setattr(logging.getLogger("gdyn"), "handlers", [])
    return lambda *words: program.main([str(run.dir.path), *map(str, words)])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_strings_and_table_say_the_same_in_the_order_of_the_inputs(run, launched, tmp_path, capsys) -> None:
    other = write_proteins(tmp_path / "other.h5", structures=3, seed=5)
    assert launched(other, run.engine.test[0], "--output", tmp_path / "all.fasta") == 0
    strings = dict(FastaFile.read(tmp_path / "all.fasta").items())
    rows = table(tmp_path / "all.tsv")
    assert [row["identifier"] for row in rows] == list(strings)
    assert [name.split("_")[0] for name in strings] == ["protein5"] * 3 + ["protein1"] * 8
    with h5py.File(other) as file:
        for row in rows[:3]:
            amino = file[f"structs/{row['identifier']}/node/AA/x"][()]
            assert row["amino_acids"] == "".join("ACDEFGHIKLMNPQRSTVWY"[i] for i in amino.argmax(1))
            assert int(row["residues"]) == len(amino)
    for row in rows:
        codes = [int(code) for code in row["codes"].split()]
        assert row["sequence"] == strings[row["identifier"]]
        assert row["sequence"] == "".join(alphabet.PRINTABLE[code] for code in codes)
        assert bytes.fromhex(row["hex"]).decode() == row["sequence"]
        assert row["unknown"] == "0"
    assert "11 structures" in capsys.readouterr().out


def strings(run: Run, inputs: list[Path | str], output: Path, **options) -> dict[str, str]:
    """What `encode` writes."""
    encode.encode(run, inputs, output, ALONE, overwrite=True, **options)
    return dict(FastaFile.read(output).items())


def test_letters_do_not_depend_on_the_batch(run, tmp_path) -> None:
    expected = strings(run, run.engine.train, tmp_path / "x.fasta", batch_residues=1)
    assert len(set("".join(expected.values()))) > 1
    for residues in (100, 700, 10**6):
        assert strings(run, run.engine.train, tmp_path / "x.fasta", batch_residues=residues) == expected
    structures = run.engine.structures(run.engine.train)
    rng = np.random.default_rng(0)
    for size in (2, 7, len(structures)):
        mates = rng.permutation(len(structures))[:size]
        batch = structures[mates]
        codes = run.model.encode(batch).split(batch["lengths"].tolist())
        for i, own in zip(mates, codes, strict=True):
            assert alphabet.Alphabet(CODES).encode(own.numpy()) == expected[structures.identifiers[i]]


def test_batches_are_consecutive_and_as_full_as_they_may_be() -> None:
    sizes = np.array([5, 5, 5, 20, 1, 9, 10])
    assert [part.tolist() for part in batches(sizes, 10)] == [[0, 1], [2], [3], [4, 5], [6]]
    assert [part.tolist() for part in batches(sizes, 1)] == [[i] for i in range(7)]
    assert list(batches(np.array([], dtype=np.int64), 10)) == []


def test_foldtree2_files_have_one_byte_per_letter(run, tmp_path) -> None:
    encode.encode(run, run.engine.test, tmp_path / "a.fasta", ALONE)
    encode.encode(run, run.engine.test, tmp_path / "b.fasta", ALONE, "foldtree2")
    plain, raw = ((tmp_path / name).read_bytes().split(b"\n") for name in ("a.fasta", "b.fasta"))
    assert list(map(len, plain)) == list(map(len, raw))
    letters = alphabet.Alphabet(CODES, "foldtree2")
    for one, other in zip(plain[1::2], raw[1::2], strict=True):
        codes = letters.decode(other.decode("latin-1"))
        assert "".join(alphabet.PRINTABLE[code] for code in codes) == one.decode()
    rows = table(tmp_path / "b.tsv")  # in which letters are tabulators
    assert [row["sequence"].encode("latin-1") for row in rows] == raw[1::2]
    assert max(map(len, plain[1::2])) > 20


def test_a_letter_that_is_a_tabulator_survives_the_table(tmp_path) -> None:
    letters = alphabet.Alphabet(CODES, "foldtree2")
    codes = np.arange(CODES)
    assert "\t" in letters.encode(codes)
    encode.write_strings(tmp_path / "x.fasta", tmp_path / "x.tsv", letters, iter([("one", codes, codes)]))
    (row,) = table(tmp_path / "x.tsv")
    np.testing.assert_array_equal(letters.decode(row["sequence"]), codes)
    np.testing.assert_array_equal(letters.decode(bytes.fromhex(row["hex"]).decode("latin-1")), codes)


def test_unknown_amino_acids_are_x_and_counted(run, tmp_path) -> None:
    path = write_proteins(tmp_path / "p.h5", structures=1)
    with h5py.File(path, "r+") as file:
        file["structs/protein0_0000/node/AA/x"][3:5] = 0
    encode.encode(run, [path], tmp_path / "p.fasta", ALONE)
    row = table(tmp_path / "p.tsv")[0]
    assert row["amino_acids"][3:5] == "XX" and row["amino_acids"].count("X") == 2
    assert row["unknown"] == "2"


def protein(path: Path, residues: int = 30, seed: int = 0) -> Path:
    """A structure file, in the format that its suffix says."""
    path.parent.mkdir(exist_ok=True)
    path.write_text((mmcif if path.suffix == ".cif" else pdb)(LETTERS[:residues], wandering(residues, seed)))
    return path


def garbage(path: Path) -> Path:
    path.write_text("no atoms here")
    return path


def test_structure_files_are_converted_in_their_place(run, launched, tmp_path, capsys) -> None:
    inputs = [protein(tmp_path / "a.pdb"), garbage(tmp_path / "bad.pdb"), run.engine.test[0], tmp_path / "folder"]
    for seed, name in enumerate(("c.pdb", "b.cif"), start=1):
        protein(tmp_path / "folder" / name, 20 + seed, seed)
    assert launched(*inputs, "--output", tmp_path / "x.fasta") == 0
    rows = table(tmp_path / "x.tsv")
    known = run.engine.structures(run.engine.test).identifiers
    assert [row["identifier"] for row in rows] == ["a", *known, "b", "c"]
    assert [int(row["residues"]) for row in rows if row["identifier"] not in known] == [30, 22, 21]
    assert rows[0]["amino_acids"] == LETTERS[:30]
    said = capsys.readouterr().out
    assert "11 structures" in said
    assert f"warning: {tmp_path / 'bad.pdb'} is left out: " in said
    assert not list(tmp_path.glob("*.h5*"))


def test_letters_are_the_same_from_files_archives_and_prepared_data(run, tmp_path) -> None:
    files = [protein(tmp_path / f"p{seed}{suffix}", 25 + seed, seed) for seed, suffix in enumerate((".pdb", ".cif"))]
    with tarfile.open(tmp_path / "all.tar.xz", "w:xz") as archive:
        for path in files:
            member = tarfile.TarInfo(path.name)
            member.size = path.stat().st_size
            archive.addfile(member, io.BytesIO(path.read_bytes()))
    assert prepare.main(["proteins", *map(str, files), "--output", str(tmp_path / "all.h5")]) == 0
    expected = strings(run, [tmp_path / "all.h5"], tmp_path / "x.fasta")
    assert list(map(len, expected.values())) == [25, 26]
    assert strings(run, files, tmp_path / "x.fasta") == expected
    assert strings(run, [tmp_path / "all.tar.xz"], tmp_path / "x.fasta") == expected


def moved(run: Run, folder: Path, turn_33: np.ndarray, shift_3: np.ndarray) -> tuple[list[str], list[str]]:
    """Strings of PDB files, and of the same with their atoms turned and shifted."""
    found = []
    for name, motion in (("still", (np.eye(3), np.zeros(3))), ("moved", (turn_33, shift_3))):
        (folder / name).mkdir()
        for seed in range(6):
            # as a PDB file has them
            atoms = wandering(50, seed).round(3) @ motion[0].T + motion[1]
            (folder / name / f"p{seed}.pdb").write_text(pdb(LETTERS[:50], atoms))
        found.append(list(strings(run, [folder / name], folder / f"{name}.fasta").values()))
    return found[0], found[1]


def test_letters_do_not_turn_or_shift_with_the_molecule(run, tmp_path) -> None:
    """By quarter turns, which round no coordinate."""
    still, elsewhere = moved(
        run, tmp_path, np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]]), np.array([5.0, -40.0, 0.125])
    )
    assert len(set("".join(still))) > 1
    assert elsewhere == still


def test_letters_survive_that_a_file_rounds_the_coordinates_of_a_turned_molecule(run, tmp_path) -> None:
    """To 0.001 Å: a residue between two codes may change, no more."""
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    still, elsewhere = moved(run, tmp_path, turn * np.linalg.det(turn), np.array([12.3, 45.6, -78.9]))
    same = np.array(list("".join(still))) == np.array(list("".join(elsewhere)))
    assert same.mean() > 0.97


def test_nothing_readable_is_exit_2(launched, tmp_path, capsys) -> None:
    assert launched(garbage(tmp_path / "bad.pdb"), "--output", tmp_path / "x.fasta") == 2
    assert "no structure can be used" in capsys.readouterr().err
    assert not list(tmp_path.glob("*x.*"))


def test_a_failure_in_the_middle_leaves_nothing(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(type(run.model), "encode", lambda model, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode.encode(run, run.engine.test, tmp_path / "x.fasta", ALONE)
    assert list(tmp_path.iterdir()) == []


def test_files_are_replaced_only_when_asked(launched, run, tmp_path) -> None:
    (tmp_path / "x.tsv").write_text("old")
    words = (run.engine.test[0], "--output", tmp_path / "x.fasta")
    assert launched(*words) == 2
    assert (tmp_path / "x.tsv").read_text() == "old"
    assert launched(*words, "--overwrite") == 0
    assert len(table(tmp_path / "x.tsv")) == 8


def empty(folder: Path) -> Path:
    with h5py.File(folder / "empty.h5", "w") as file:
        file.create_group("structs")
    return folder / "empty.h5"


def narrow(folder: Path) -> Path:
    path = write_proteins(folder / "narrow.h5", structures=2)
    with h5py.File(path, "r+") as file:
        for group in file["structs"].values():
            features = group["node/res/x"][:, :-2]
            del group["node/res/x"]
            group["node/res/x"] = features
    return path


def not_hdf5(folder: Path) -> Path:
    (folder / "text.h5").write_text("nothing")
    return folder / "text.h5"


def foreign_name(folder: Path) -> Path:
    path = write_proteins(folder / "names.h5", structures=1, index=False)
    with h5py.File(path, "r+") as file:
        file.move("structs/protein0_0000", "structs/蛋白")
    return path


def good(folder: Path) -> Path:
    return write_proteins(folder / "good.h5", structures=2)


BAD = {
    "input_missing": (lambda f: [f / "no.h5", "--output", f / "x.fasta"], ("no.h5", "does not exist")),
    "input_empty": (lambda f: [empty(f), "--output", f / "x.fasta"], ("empty.h5", "no structure")),
    "input_no_hdf5": (lambda f: [not_hdf5(f), "--output", f / "x.fasta"], ("text.h5",)),
    "input_twice_as_a_file_and_in_a_folder": (
        lambda f: [protein(f / "in" / "a.pdb"), good(f), f / "in", "--output", f / "x.fasta"],
        ("in/a.pdb and again in", "give each once"),
    ),
    "output_is_an_input": (
        lambda f: [good(f), "--output", f / "good.h5", "--overwrite"],
        ("good.h5 is an input",),
    ),
    "input_twice": (lambda f: [good(f), good(f), "--output", f / "x.fasta"], ("protein0_0000", "again")),
    "features_too_few": (
        lambda f: [narrow(f), "--output", f / "x.fasta"],
        ("narrow.h5", "24 features", "trained on 26", "gdyn prepare"),
    ),
    "output_missing": (lambda f: [good(f)], ("output",)),
    "output_folder_missing": (lambda f: [good(f), "--output", f / "no" / "x.fasta"], ("no", "does not exist")),
    "output_is_a_folder": (lambda f: [good(f), "--output", f], ("is a folder",)),
    "output_is_the_table": (lambda f: [good(f), "--output", f / "x.tsv"], ("x.tsv", ".fasta")),
    "output_exists": (lambda f: [good(f), "--output", empty(f), "--alphabet", "printable"], ("exists", "--overwrite")),
    "alphabet_unknown": (lambda f: [good(f), "--output", f / "x.fasta", "--alphabet", "klingon"], ("klingon",)),
    "batch_of_nothing": (lambda f: [good(f), "--output", f / "x.fasta", "--batch_residues", "0"], ("batch_residues",)),
    "name_not_latin": (
        lambda f: [foreign_name(f), "--output", f / "x.fasta", "--alphabet", "foldtree2"],
        ("蛋白", "--alphabet printable"),
    ),
    "no_input": (lambda f: ["--output", f / "x.fasta"], ("inputs",)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_message_and_exit_2(name, launched, tmp_path, capsys) -> None:
    words, said = BAD[name]
    assert launched(*words(tmp_path)) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and message.count("\n") == 1
    assert all(part in message for part in said), message
    assert not list(tmp_path.glob("*x.fasta*"))


def test_more_codes_than_letters_is_refused_before_any_work(run, launched, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(encode, "codes_of", lambda model: 100)
    assert launched(run.engine.test[0], "--output", tmp_path / "x.fasta") == 2
    assert "100 codes" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_one_message_and_exit_2(tmp_path, capsys) -> None:
    assert program.main([str(tmp_path), "a.h5", "--output", str(tmp_path / "x.fasta")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
