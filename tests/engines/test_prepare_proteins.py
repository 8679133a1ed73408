"""gdyn prepare proteins: files, folders and archives in, one whole HDF5 file or none out, whatever the inputs hold."""

import gzip
import io
import logging
import re
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
import pytest

from gdyn.engines.monodecoder import layout, sources
from gdyn.engines.monodecoder import prepare as module
from gdyn.engines.monodecoder.chains import read_chains
from gdyn.engines.monodecoder.features import features
from gdyn.engines.monodecoder.prepare import Preparation, prepare, skipped_list
from gdyn.errors import MissingFile, UserError
from gdyn.ranks import ALONE
from launch.prepare import main
from tests import harness
from tests.backbones import mmcif, pdb, wandering

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def text(residues=12, seed=0, write=pdb, **options):
    return write((LETTERS * 9)[:residues], wandering(residues, seed), **options)


def folder_of(path, count=5, **options):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (path / f"p{i}.pdb").write_text(text(10 + i, seed=i, **options))
    return path


def tar(path, members):
    mode = "w" + {".gz": ":gz", ".tgz": ":gz", ".xz": ":xz"}.get(path.suffix, "")
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def contents(path):
    """Every data set and attribute of a file by its name."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.update({name: item[()].tobytes() if item.dtype != object else list(item[()])})
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
        return found | dict(file.attrs)


def skipped(output):
    return [line.split("\t") for line in skipped_list(output).read_text().splitlines()[1:]]


def run(inputs, output, **options):
    inputs = inputs if isinstance(inputs, list) else [inputs]
    return prepare(Preparation(inputs, output, **options), ALONE)


# --- what is written


def test_the_file_has_the_layout_and_an_index(tmp_path):
    output = tmp_path / "new" / "out.h5"
    found = run(folder_of(tmp_path / "in"), output)
    assert found == {"structures": 5, "residues": 60, "skipped": 0, "incomplete": 0}
    with h5py.File(output) as file:
        assert set(file) == {"structs", "index"}
        assert file.attrs["layout"] == layout.LAYOUT and file.attrs["version"] == layout.VERSION
        assert file.attrs["amino_acids"] == layout.AMINO_ACIDS
        assert file["index/identifier"].asstr()[:].tolist() == [f"p{i}" for i in range(5)]
        assert file["index/residues"][:].tolist() == [10, 11, 12, 13, 14] and file["index/residues"].dtype == np.int32
        node = file["structs/p3/node"]
        wanted = "res AA coords R_true t_true bondangles plddt positions fourier1dr fourier1di fourier2dr fourier2di ss"
        assert set(node) == {*wanted.split(), "godnode", "godnode4decoder"}
        assert node["positions/x"].shape == (13, 256) and (node["godnode/x"][:] == np.ones((1, 5))).all()
        links = "backbone backbonerev contactPoints hbond window windowrev".split()
        assert set(file["structs/p3/edge"]) == {f"res_{link}_res" for link in links}
    assert not skipped_list(output).exists()
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.h5"]


def test_a_structure_in_the_file_is_what_its_chain_gives(tmp_path):
    run(folder_of(tmp_path / "in"), tmp_path / "out.h5")
    (chain,) = read_chains("p2.pdb", (tmp_path / "in/p2.pdb").read_bytes())
    expected = features(chain.letters, chain.backbone, np.ones(12), np.zeros((20, 0)))
    with h5py.File(tmp_path / "out.h5") as file:
        for name, values in expected.items():
            np.testing.assert_array_equal(file[f"structs/p2/{name}"][:], values)
            assert file[f"structs/p2/{name}"].dtype == values.dtype


def test_structures_of_one_length_share_their_positions(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / f"in/p{i}.pdb").write_text(text(12, seed=i))
    run(tmp_path / "in", tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        one, other = (file[f"structs/p{i}/node/positions/x"] for i in (0, 2))
        assert one == other and one.shape == (12, 256)
        np.testing.assert_allclose(one[:, 0], np.sin(np.arange(12)), atol=1e-6)
        np.testing.assert_allclose(one[:, 3], np.cos(np.arange(12) * 10 ** (-2 / 256)), atol=1e-6)


def test_files_folders_and_archives_give_the_same(tmp_path):
    packed = {f"deep/p{i}.cif.gz": gzip.compress(text(10 + i, i, mmcif).encode()) for i in range(5)}
    (tmp_path / "in/deep").mkdir(parents=True)
    for name, content in packed.items():
        (tmp_path / "in" / name).write_bytes(content)
    made = []
    for number, given in enumerate(
        [
            [tmp_path / "in"],
            sorted((tmp_path / "in/deep").iterdir()),
            *([tar(tmp_path / f"in{suffix}", packed)] for suffix in (".tar", ".tar.gz", ".tgz", ".tar.xz")),
            [tar(tmp_path / "in/all.tar", {"deep/._p0.cif": b"mac", "README": b"read me"} | packed)][:1],
        ]
    ):
        run(given, tmp_path / f"{number}.h5")
        made.append(contents(tmp_path / f"{number}.h5"))
    assert all(other == made[0] for other in made)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_result(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(sources, "PIECE", 2)
    monkeypatch.setattr(module, "PIECE", 2)
    given = folder_of(tmp_path / "in")
    run(given, tmp_path / "expected.h5")
    run(given, tmp_path / "out.h5", workers=workers)
    assert contents(tmp_path / "out.h5") == contents(tmp_path / "expected.h5")


def test_frames_and_properties_widen_the_features(tmp_path):
    rows = ["description," + ",".join(LETTERS), "weight," + ",".join(map(str, range(20))), "holes,NA" + "," * 19]
    (tmp_path / "properties.csv").write_text("\n".join(rows))
    run(folder_of(tmp_path / "in"), tmp_path / "out.h5", frames=True, properties=tmp_path / "properties.csv")
    with h5py.File(tmp_path / "out.h5") as file:
        res = file["structs/p0/node/res/x"][:]
        assert res.shape == (10, 6 + 2 + 20 + 12)
        np.testing.assert_array_equal(res[:, 6], np.arange(10))
        assert not res[:, 7].any()
        np.testing.assert_array_equal(res[:, -12:-3], file["structs/p0/node/R_true/x"][:].reshape(10, 9))


def test_without_frames_nothing_the_encoder_reads_turns_with_the_molecule(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.pdb").write_text(pdb(LETTERS, wandering(20)))
    (tmp_path / "in/b.pdb").write_text(pdb(LETTERS, wandering(20)[..., [2, 0, 1]] + 7))
    run(tmp_path / "in", tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        np.testing.assert_allclose(*(file[f"structs/{name}/node/res/x"][:] for name in "ab"), atol=1e-2)


def test_the_summary_says_what_b_factors_were_taken_for(tmp_path, caplog):
    caplog.set_level(logging.INFO, "gdyn")
    folder_of(tmp_path / "in", 2, header="EXPDTA    X-RAY DIFFRACTION")
    (tmp_path / "in/AF-Q1-F1-model_v4.pdb").write_text(text(20, b=np.linspace(40, 90, 20)))
    run(tmp_path / "in", tmp_path / "out.h5")
    assert "no pLDDT (an experiment, says the file) in 2, pLDDT (a prediction, says the file) in 1" in caplog.text
    with h5py.File(tmp_path / "out.h5") as file:
        np.testing.assert_allclose(
            file["structs/AF-Q1-F1-model_v4/node/plddt/x"][:, 0], np.linspace(0.4, 0.9, 20), atol=1e-4
        )
        assert (file["structs/p0/node/plddt/x"][:] == 1).all()


# --- what is not usable

NOWHERE = np.full((12, 4, 3), np.nan)
ONE_ATOM = NOWHERE.copy()
ONE_ATOM[:, 1] = wandering(12)[:, 1]
SCATTERED = np.arange(12)[:, None, None] * 50.0 + wandering(12)
UNUSABLE = {
    "empty": ("bad.pdb", b"", "it is empty"),
    "garbage": ("bad.pdb", bytes(range(256)) * 9, "protein|read"),
    "not mmCIF": ("bad.cif", text().encode(), "cannot be read"),
    "gzip cut short": ("bad.pdb.gz", gzip.compress(text().encode())[:-30], "cannot be unpacked"),
    "CA only": ("bad.pdb", pdb("A" * 12, ONE_ATOM).encode(), "0 residues with N, CA and C"),
    "one residue": ("bad.pdb", text(1).encode(), "1 residues with N, CA and C, less than --min_residues 3"),
    "two residues": ("bad.pdb", text(2).encode(), "2 residues"),
    "too long": ("bad.pdb", text(41).encode(), "41 residues, more than --max_residues 40"),
    "all NaN": ("bad.cif", mmcif("A" * 12, NOWHERE).encode(), "0 residues"),
    "all in one place": ("bad.pdb", pdb("A" * 12, np.zeros((12, 4, 3))).encode(), "0 residues"),
    "scattered": ("bad.pdb", pdb("A" * 12, SCATTERED).encode(), "12 pieces; it is no chain"),
    "no protein": ("bad.pdb", b"HEADER    DNA\nEND\n", "no protein chain"),
    "archive cut short": ("bad.tar.gz", b"", "the archive is broken behind 0 members"),
    "archive that is none": ("bad.tar", b"hello" * 300, "the archive is broken behind 0 members"),
    "the same name": ("p1.cif", text(write=mmcif).encode(), "p1.cif has the same identifier"),
}


@pytest.mark.parametrize(("name", "content", "said"), UNUSABLE.values(), ids=UNUSABLE)
def test_what_cannot_be_used_is_listed_and_the_rest_is_written(tmp_path, name, content, said):
    given = folder_of(tmp_path / "in", 3)
    (given / name).write_bytes(content)
    found = run(given, tmp_path / "out.h5", max_residues=40)
    assert (found["structures"], found["skipped"]) == (3, 1)
    ((source, _, reason),) = skipped(tmp_path / "out.h5")
    assert re.search(said, reason) and source.endswith("p1.pdb" if name == "p1.cif" else name)


def test_an_archive_cut_short_gives_what_was_before_the_cut(tmp_path):
    noise = np.random.default_rng(0).bytes(100_000)  # does not compress: the cut is behind the first member
    whole = tar(tmp_path / "in.tar.gz", {"a.pdb": text().encode(), "noise": noise, "b.pdb": text(9).encode()})
    whole.write_bytes(whole.read_bytes()[:-2000])
    assert run(whole, tmp_path / "out.h5")["structures"] == 1
    ((source, _, reason),) = skipped(tmp_path / "out.h5")
    assert source == str(whole) and "the archive is broken behind" in reason


def test_a_chain_may_be_skipped_and_its_neighbour_kept(tmp_path):
    (tmp_path / "two.pdb").write_text(text(12)[:-4] + text(2, chain="B"))
    assert run(tmp_path / "two.pdb", tmp_path / "out.h5")["structures"] == 1
    assert [row[1] for row in skipped(tmp_path / "out.h5")] == ["two_B"]
    with h5py.File(tmp_path / "out.h5") as file:
        assert list(file["structs"]) == ["two_A"]


def test_identifiers_that_meet_only_after_reading_are_listed_too(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.pdb").write_text(text(12)[:-4] + text(12, chain="B"))
    (tmp_path / "in/x_B.pdb").write_text(text(9))
    found = run(tmp_path / "in", tmp_path / "out.h5")
    assert (found["structures"], found["skipped"]) == (2, 1)
    assert skipped(tmp_path / "out.h5")[0][1:] == ["x_B", f"{tmp_path / 'in/x.pdb'} has the same identifier"]


def test_plddt_asked_for_where_there_is_none_skips_the_chain(tmp_path):
    given = folder_of(tmp_path / "in", 2)
    (given / "good.pdb").write_text(text(12, b=np.linspace(30, 90, 12)))
    run(given, tmp_path / "out.h5", plddt="yes")
    assert {row[2] for row in skipped(tmp_path / "out.h5")} == {"its B-factors, 20 to 20, cannot be pLDDT"}


REFUSED = {
    "no such file": ([Path("nowhere.pdb")], {}, MissingFile, "nowhere.pdb does not exist"),
    "another kind of file": (["notes.txt"], {}, UserError, "notes.txt is neither a structure file nor an archive"),
    "empty folder": (["empty"], {}, UserError, "empty holds no .pdb"),
    "nothing usable": (["bad.pdb"], {}, UserError, "no structure can be used.*1 x it is empty"),
    "limits crossed": (["good.pdb"], {"min_residues": 9, "max_residues": 8}, UserError, "min_residues 9"),
    "limit too low": (["good.pdb"], {"min_residues": 2}, UserError, "at least 3"),
    "no properties": (["good.pdb"], {"properties": Path("p.csv")}, MissingFile, "p.csv is not a file"),
    "properties of DNA": (
        ["good.pdb"],
        {"properties": "dna.csv"},
        UserError,
        "dna.csv has no column .* for D, E",
    ),
    "properties that are words": (["good.pdb"], {"properties": "words.csv"}, UserError, 'column C is "big"'),
}


@pytest.mark.parametrize(("inputs", "options", "error", "said"), REFUSED.values(), ids=REFUSED)
def test_what_a_user_can_mend_is_said_and_nothing_is_written(tmp_path, inputs, options, error, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "bad.pdb").write_text("")
    (tmp_path / "good.pdb").write_text(text())
    (tmp_path / "dna.csv").write_text("A,C,G,T\n1,2,3,4\n")
    (tmp_path / "words.csv").write_text(",".join(LETTERS) + "\n1,big" + ",1" * 18 + "\n")
    options = {name: tmp_path / value if isinstance(value, str) else value for name, value in options.items()}
    before = set(tmp_path.iterdir())
    with pytest.raises(error, match=said):
        run([tmp_path / name for name in inputs], tmp_path / "out.h5", **options)
    assert set(tmp_path.iterdir()) == before


def test_an_output_is_replaced_only_when_asked(tmp_path):
    given = folder_of(tmp_path / "in", 2)
    (tmp_path / "out.h5").write_text("precious")
    with pytest.raises(UserError, match="out.h5 exists; .*--overwrite"):
        run(given, tmp_path / "out.h5")
    assert (tmp_path / "out.h5").read_text() == "precious"
    run(given, tmp_path / "out.h5", overwrite=True)
    assert len(contents(tmp_path / "out.h5")) > 3


def test_a_missing_package_is_named_with_its_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydssp", None)
    with pytest.raises(UserError, match=r'needs the Python package pydssp\S*: pip install "gdyn\[prepare\]"'):
        run(folder_of(tmp_path / "in", 1), tmp_path / "out.h5")


# --- interruptions


@pytest.fixture
def small_pieces(monkeypatch):
    for where in (sources, module):
        monkeypatch.setattr(where, "PIECE", 2)


def interrupt(monkeypatch, after):
    """The chain after so many is not made: the user presses Ctrl-C."""
    made = []

    def counted(*args):
        made.append(args[0])
        if len(made) > after:
            raise KeyboardInterrupt
        return features(*args)

    monkeypatch.setattr(module, "features", counted)
    return made


def test_a_stopped_run_goes_on_and_gives_the_same_file(tmp_path, small_pieces, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "gdyn")
    given = folder_of(tmp_path / "in", 7)
    (given / "p2a.pdb").write_text("")
    run(given, tmp_path / "expected.h5")
    with monkeypatch.context() as patched:
        interrupt(patched, after=4)
        with pytest.raises(KeyboardInterrupt):
            run(given, tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()
    assert "the same command goes on from there" in caplog.text
    made = interrupt(monkeypatch, after=99)
    run(given, tmp_path / "out.h5")
    assert len(made) == 4  # p0 to p2 were done, p3 lost its piece
    assert "going on with 2 parts" in caplog.text
    assert contents(tmp_path / "out.h5") == contents(tmp_path / "expected.h5")
    assert skipped(tmp_path / "out.h5") == skipped(tmp_path / "expected.h5")
    assert not (tmp_path / ".out.h5.partial").exists()


@pytest.mark.parametrize("change", ["option", "input", "properties"])
def test_a_changed_run_starts_anew_and_says_so(tmp_path, small_pieces, monkeypatch, caplog, change):
    caplog.set_level(logging.INFO, "gdyn")
    given = folder_of(tmp_path / "in", 6)
    with monkeypatch.context() as patched:
        interrupt(patched, after=4)
        with pytest.raises(KeyboardInterrupt):
            run(given, tmp_path / "out.h5")
    options = {}
    if change == "option":
        options["frames"] = True
    elif change == "input":
        (given / "p5.pdb").write_text(text(30))
    else:
        (tmp_path / "p.csv").write_text(",".join(LETTERS) + "\n" + ",".join("1" * 20) + "\n")
        options["properties"] = tmp_path / "p.csv"
    run(given, tmp_path / "out.h5", **options)
    told = {"option": "frames", "input": "inputs", "properties": "properties"}[change]
    assert f"starting anew: other {told} than" in caplog.text
    run(given, tmp_path / "expected.h5", **options)
    assert contents(tmp_path / "out.h5") == contents(tmp_path / "expected.h5")


# --- the program


def test_the_program_writes_the_file_and_mistakes_are_exit_code_2(tmp_path, capsys):
    given = folder_of(tmp_path / "in", 2)
    words = ["proteins", str(given), str(given / "p0.pdb"), "--output", str(tmp_path / "out.h5")]
    assert main([*words, "--min_residues", "4"]) == 0
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--plddt", "perhaps"]) == 2
    assert main(["proteins", str(tmp_path / "nowhere"), "--output", str(tmp_path / "new.h5")]) == 2
    assert not (tmp_path / "new.h5").exists()
    (row,) = skipped(tmp_path / "out.h5")
    assert row[0] == row[2].split(" has")[0]  # the same file, given twice


def share(here, given, output):
    for where in (sources, module):
        where.PIECE = 2
    return prepare(Preparation([given], output), here)


def test_two_ranks_share_the_work(tmp_path, run_ranks):
    given = folder_of(tmp_path / "in", 7)
    run(given, tmp_path / "expected.h5")
    first, second = run_ranks(2, share, given, tmp_path / "out.h5")
    assert first["structures"] == 7 and second == {}
    assert contents(tmp_path / "out.h5") == contents(tmp_path / "expected.h5")


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("mpi4py") is None or not Path(sys.executable).with_name("mpiexec").exists(),
    reason="pip install mpi4py mpich",
)
def test_mpiexec_shares_the_work(tmp_path):
    given = folder_of(tmp_path / "in", 40)
    run(given, tmp_path / "expected.h5")
    program = ["mpiexec", "-n", "2", sys.executable, harness.REPOSITORY / "launch/prepare.py", "proteins"]
    good = harness.launch([*program, given, "--output", tmp_path / "out.h5"])
    assert good.returncode == 0, good.stderr
    assert good.stderr.count("wrote ") == 1
    assert contents(tmp_path / "out.h5") == contents(tmp_path / "expected.h5")
    bad = harness.launch([*program, given, "--output", tmp_path / "out.h5"])
    assert bad.returncode == 2 and bad.stderr.count("--overwrite") == 1
