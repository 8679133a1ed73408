"""Protein structures on disk: that batches are what was written, foldtree2's lag is undone, and bad files are named."""

import fcntl
import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from gdyn.engines.monodecoder import layout
from gdyn.engines.monodecoder.structures import Structures, undo_lag
from gdyn.errors import MissingFile, UserError
from gdyn.loader import Loader
from gdyn.ranks import ALONE
from gdyn.splits import stable_key
from tests.proteins import structure, write_proteins

CONTACTS = "edge/res_contactPoints_res/edge_index"
NODES = {"features": "res", "amino_acids": "AA", "angles": "bondangles", "coordinates": "coords", "secondary": "ss"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_proteins(tmp_path / "proteins.h5", structures=6)


def on_disk(path: Path, name: str) -> list[np.ndarray]:
    """One dataset of every structure."""
    with h5py.File(path, "r", locking=False) as file:
        return [file[f"structs/{identifier}/{name}"][()] for identifier in sorted(file["structs"])]


def replace(path: Path, name: str, values: np.ndarray | None, identifier: str = "protein0_0002") -> None:
    """Another dataset in its place; None: nothing."""
    with h5py.File(path, "a") as file:
        group = file[f"structs/{identifier}"]
        if name in group:
            del group[name]
        if values is not None:
            group[name] = values


def change(path: Path, name: str, index: object, value: float) -> None:
    with h5py.File(path, "a") as file:
        file[f"structs/protein0_0002/{name}"][index] = value


def foreign(path: Path, features: int = 857, lagging: bool = False) -> Path:
    """A file as foldtree2 writes it: no index, empty groups at the root, wide `res`, doubled distances, more groups
    than are needed. Returns `path`."""
    rng = np.random.default_rng(5)
    with h5py.File(path, "w") as file:
        for i, length in enumerate((30, 3, 25)):
            arrays = structure(length, rng)
            one_hot = lag(arrays["node/AA/x"]) if lagging else arrays["node/AA/x"]
            properties = one_hot @ rng.normal(size=(20, 566)).astype(np.float32)
            rest = rng.normal(size=(length, 268)).astype(np.float32)
            wide = np.concatenate([arrays["node/bondangles/x"], properties, one_hot, rest], 1)
            assert wide.shape == (length, 857)
            contacts = arrays["edge/res_contactPoints_res/edge_index"]
            arrays |= {"node/AA/x": one_hot, "node/res/x": wide[:, 857 - features :]}
            arrays |= {
                "node/godnode/x": np.ones((1, 5), np.float32),
                "edge/res_prody_hbond_res/edge_index": contacts[:, :4],
            }
            arrays["edge/res_informs_godnode/edge_index"] = np.stack([np.arange(length), np.zeros(length, int)])
            arrays["edge/res_contactPoints_res/edge_attr"] *= 2
            file.create_group(f"AF_{i}")
            for name, values in arrays.items():
                file[f"structs/AF_{i}/{name}"] = values
    return path


def lag(rows: np.ndarray) -> np.ndarray:
    """foldtree2's records of these residues: each but the first and the last carries the one before."""
    last = len(rows) - 1
    return np.stack([rows[j if j in (0, last) else j - 1] for j in range(last + 1)])


def test_a_batch_is_what_was_written(path) -> None:
    structures, wanted = Structures([path]), [4, 0, 5]
    batch = structures[np.array(wanted)]
    for name, kind in NODES.items():
        expected = np.concatenate([on_disk(path, f"node/{kind}/x")[i] for i in wanted])
        np.testing.assert_array_equal(batch[name].numpy(), expected)
        assert batch[name].dtype == torch.float32
    np.testing.assert_array_equal(
        batch["plddt"].numpy(), np.concatenate([on_disk(path, "node/plddt/x")[i][:, 0] for i in wanted])
    )
    for name, kind, axis in (("spectra", "fourier1d", 80), ("spectrum_2d", "fourier2d", 1300)):
        magnitudes, phases = (
            np.concatenate([on_disk(path, f"node/{kind}{part}/x")[i] for i in wanted]) for part in "ri"
        )
        found = batch[name][:, :axis].numpy() + 1j * batch[name][:, axis:].numpy()
        np.testing.assert_allclose(found, np.log1p(magnitudes) * np.exp(1j * phases), rtol=1e-4, atol=1e-4)
    assert batch["spectrum_2d"].shape == (3, 2600)
    assert batch["lengths"].tolist() == [len(on_disk(path, "node/AA/x")[i]) for i in wanted]
    assert "foldx" not in batch and [name for name in batch if name.startswith("edges_")] == ["edges_contactPoints"]


def test_edges_name_rows_of_the_batch(path) -> None:
    batch = Structures([path], edges=("backbone",))[np.array([3, 1, 2])]
    for link in ("contactPoints", "backbone"):
        expected, start = [], 0
        for i in (3, 1, 2):
            expected.append(on_disk(path, f"edge/res_{link}_res/edge_index")[i] + start)
            start += len(on_disk(path, "node/AA/x")[i])
        np.testing.assert_array_equal(batch[f"edges_{link}"].numpy(), np.concatenate(expected, axis=1))
        assert batch[f"edges_{link}"].dtype == torch.int64
    first, second = batch["edges_contactPoints"]
    distances = (batch["coordinates"][first] - batch["coordinates"][second]).norm(dim=1)
    assert bool((distances < layout.CONTACT_DISTANCE).all())


def test_sizes_and_identifiers_do_not_depend_on_an_index(tmp_path) -> None:
    one, other = (Structures([write_proteins(tmp_path / f"{i}.h5", index=i)]) for i in (True, False))
    assert one.identifiers == other.identifiers == [f"protein0_{i:04d}" for i in range(8)]
    assert one.sizes.tolist() == other.sizes.tolist() and one.sizes.dtype == np.int64
    assert len(one) == len(other) == 8 and one.feature_width == 26
    for name, tensor in one[np.arange(8)].items():
        assert torch.equal(tensor, other[np.arange(8)][name])


def test_files_of_foldtree2_are_read_as_they_are(tmp_path) -> None:
    structures = Structures([foreign(tmp_path / "foreign.h5")], edges=("prody_hbond",))
    assert structures.identifiers == ["AF_0", "AF_1", "AF_2"] and structures.sizes.tolist() == [30, 3, 25]
    batch = structures[np.arange(3)]
    assert structures.feature_width == batch["features"].shape[1] == 857
    assert batch["edges_prody_hbond"].shape[1] == 4 + min(4, on_disk(tmp_path / "foreign.h5", CONTACTS)[1].shape[1]) + 4


def test_files_are_pooled_in_order(tmp_path) -> None:
    paths = [write_proteins(tmp_path / f"{seed}.h5", structures=3 + seed, seed=seed) for seed in range(3)]
    pool, apart = Structures(paths), [Structures([path]) for path in paths]
    assert pool.identifiers == [name for one in apart for name in one.identifiers]
    assert pool.sizes.tolist() == [size for one in apart for size in one.sizes]
    batch, parts = (
        pool[np.array([2, 3, 11])],
        [apart[0][np.array([2])], apart[1][np.array([0])], apart[2][np.array([4])]],
    )
    for name in NODES:
        assert torch.equal(batch[name], torch.cat([part[name] for part in parts]))
    other = foreign(tmp_path / "wide.h5")
    with pytest.raises(UserError, match=r"wide\.h5 has 857 features per residue, .*0\.h5 has 26"):
        Structures([*paths, other])


def test_indices_beyond_the_end_are_refused(path) -> None:
    structures = Structures([path])
    for indices in ([6], [0, 99], [-7]):
        with pytest.raises(IndexError):
            structures[np.array(indices)]
    assert torch.equal(structures[np.array([-1])]["features"], structures[np.array([5])]["features"])


# foldtree2's lag


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_the_lag_is_undone_but_for_the_residue_that_nobody_carries(length) -> None:
    rows = 1 + np.arange(2 * length).reshape(length, 2)
    mended = undo_lag(lag(rows))
    unknown = {length - 2} if length > 2 else set()
    for residue in range(length):
        assert mended[residue].tolist() == ([0, 0] if residue in unknown else rows[residue].tolist())


@pytest.mark.filterwarnings("ignore:.*none of the 280 columns")
@pytest.mark.parametrize("features", [857, 700, 280])
def test_compat_mends_labels_and_what_the_encoder_reads_of_them(tmp_path, features) -> None:
    """857: properties and one-hot; other widths: the one-hot, which is found."""
    right = Structures([foreign(tmp_path / "right.h5", features)])
    mended = Structures([foreign(tmp_path / "lagging.h5", features, lagging=True)], compat=True)
    one_hot = slice(features - 288, features - 268)
    columns = slice(3, 589) if features == 857 else one_hot if features > 288 else slice(0)
    lagging = Structures([tmp_path / "lagging.h5"])
    for i, length in enumerate((30, 3, 25)):
        one, other, raw = (s[np.array([i])] for s in (right, mended, lagging))
        known = torch.arange(length) != length - 2
        assert torch.equal(one["amino_acids"][known], other["amino_acids"][known])
        assert not other["amino_acids"][~known].any()
        untouched = torch.ones(features, dtype=torch.bool)
        untouched[columns] = False
        assert torch.equal(other["features"][:, untouched], raw["features"][:, untouched])
        torch.testing.assert_close(other["features"][known][:, columns], one["features"][known][:, columns])
        assert not other["features"][~known][:, columns].any()


def test_compat_says_when_it_cannot_find_the_amino_acids_among_the_features(tmp_path) -> None:
    with pytest.warns(UserWarning, match="none of the 100 columns"):
        structures = Structures([foreign(tmp_path / "a.h5", 100, lagging=True)], compat=True)
    assert torch.equal(
        structures[np.array([0])]["features"], Structures([tmp_path / "a.h5"])[np.array([0])]["features"]
    )


def test_compat_is_refused_for_files_that_are_right(path) -> None:
    with pytest.raises(UserError, match=r"proteins\.h5 was not written by foldtree2"):
        Structures([path], compat=True)


# What may be missing


def test_no_contacts_are_no_mistake(path) -> None:
    for name, empty in (("protein0_0002", np.zeros((2, 0), np.int64)), ("protein0_0003", np.zeros(0, np.float32))):
        replace(path, CONTACTS, empty, name)
    assert Structures([path])[np.array([2, 3])]["edges_contactPoints"].shape == (2, 0)
    mixed = Structures([path])[np.array([2, 0])]["edges_contactPoints"]
    assert int(mixed.min()) >= Structures([path]).sizes[2]


def test_missing_energies_are_not_numbers(path) -> None:
    energies = np.arange(23, dtype=np.float32)
    replace(path, "node/Foldx/x", energies)
    foldx = Structures([path], foldx=True)[np.array([1, 2])]["foldx"]
    assert foldx.shape == (2, 23) and bool(foldx[0].isnan().all()) and foldx[1].tolist() == energies.tolist()


def test_what_is_not_asked_for_is_not_read(path) -> None:
    for part in "ri":
        replace(path, f"node/fourier2d{part}/x", None)
    assert "spectrum_2d" not in Structures([path], spectrum_2d=False)[np.array([2])]


# Bad files


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(MissingFile, match=r"none\.h5 is not a file"):
        Structures([tmp_path / "none.h5"])
    with pytest.raises(UserError, match="no file of structures"):
        Structures([])


def test_what_is_no_hdf5_is_named(tmp_path, path) -> None:
    (tmp_path / "text.h5").write_text("structs")
    (tmp_path / "half.h5").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for name in ("text.h5", "half.h5"):
        with pytest.raises(UserError, match=f"{name} cannot be opened as HDF5"):
            Structures([tmp_path / name])


def write_index(file: h5py.File, identifiers: list[str], residues: list[int]) -> None:
    del file["index"]
    file["index/identifier"], file["index/residues"] = identifiers, residues


WHOLE: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "no structs": (lambda file: file.move("structs", "molecules"), "no group /structs, but index, molecules"),
    "nothing": (lambda file: write_index(file, [], []), "index is damaged|holds no structures"),
    "empty": (
        lambda file: [file.pop(name) for name in ("index", "structs")] + [file.create_group("structs")],
        "holds no",
    ),
    "half an index": (lambda file: file.pop("index/residues"), "/index is damaged"),
    "short index": (lambda file: write_index(file, ["a", "b"], [3]), r"2 identifiers and residues of shape \(1,\)"),
    "no residues": (lambda file: write_index(file, ["protein0_0001"], [0]), "protein0_0001 has no residues"),
    "unknown": (lambda file: write_index(file, ["nobody"], [9]), "no group /structs/nobody, which its index"),
    "order": (lambda file: file.attrs.update(amino_acids="ARND"), "orders the amino acids as ARND, expected ACDEF"),
    "version": (lambda file: file.attrs.update(version=2), "has version 2 of the layout foldtree2-aligned, expected 1"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_file_that_cannot_be_used_is_refused_at_once(path, case) -> None:
    spoil, said = WHOLE[case]
    with h5py.File(path, "a") as file:
        spoil(file)
    with pytest.raises(UserError, match=said) as failure:
        Structures([path])
    assert "proteins.h5" in str(failure.value)


ONE: dict[str, tuple[Callable[[Path, int], object], str]] = {
    "missing": (lambda p, n: replace(p, "node/ss/x", None), "node/ss/x is missing"),
    "missing link": (lambda p, n: replace(p, CONTACTS, None), "res_contactPoints_res/edge_index is missing"),
    "width": (
        lambda p, n: replace(p, "node/AA/x", np.ones((n, 21), "f4")),
        r"AA/x is \(N, 21\) of float32; .*\(N, 20\)",
    ),
    "length": (
        lambda p, n: replace(p, "node/AA/x", np.ones((9, 20), "f4")),
        r"AA/x is \(9, 20\) of float32; .*\(N, 20\)",
    ),
    "features": (lambda p, n: replace(p, "node/res/x", np.ones((n, 24), "f4")), r"res/x is \(N, 24\) .*\(N, 26\)"),
    "type": (lambda p, n: replace(p, "node/ss/x", np.ones((n, 3), "i4")), "int32; expected .* floating-point numbers"),
    "edge type": (lambda p, n: replace(p, CONTACTS, np.ones((2, 4))), r"float64; expected \(2, E\) integers"),
    "edge shape": (lambda p, n: replace(p, CONTACTS, np.ones((4, 2), int)), r"\(4, 2\) of int64; expected \(2, E\)"),
    "edge": (lambda p, n: change(p, CONTACTS, (1, 0), n), r"is 0\.\.N; expected residues 0\.\.M"),
    "edge below": (lambda p, n: change(p, CONTACTS, (0, 0), -1), r"is -1\.\.M; expected residues 0\.\.M"),
    "nan": (lambda p, n: change(p, "node/coords/x", (7, 1), np.nan), "coords/x is not finite in row 7"),
    "infinite": (lambda p, n: change(p, "node/fourier1dr/x", (3, 1), np.inf), "fourier1dr/x is not finite in row 3"),
    "magnitude": (lambda p, n: change(p, "node/fourier1dr/x", (3, 1), -2.0), "is -2 in places; expected magnitudes"),
    "percent": (
        lambda p, n: change(p, "node/plddt/x", (0, 0), 87.5),
        r"87\.5; expected 0\.\.1: divide confidences by 100",
    ),
    "negative": (lambda p, n: change(p, "node/plddt/x", (0, 0), -0.5), r"plddt/x is -0\.5\.\."),
}


@pytest.mark.parametrize("case", ONE)
def test_a_bad_structure_is_named_when_it_is_first_read(path, case) -> None:
    n = int(Structures([path]).sizes[2])
    spoil, said = ONE[case]
    spoil(path, n)
    structures = Structures([path])
    structures[np.array([0, 1, 3, 4, 5])]
    said = said.replace("N", str(n)).replace("M", str(n - 1)) if case != "nan" else said
    with pytest.raises(UserError, match=rf"proteins\.h5: structure protein0_0002: .*{said}"):
        structures[np.array([0, 2])]


def test_large_numbers_are_numbers(path) -> None:
    change(path, "node/coords/x", (slice(0, 3), 0), 2e38)  # their sum is infinite
    assert float(Structures([path])[np.array([2])]["coordinates"].max()) == pytest.approx(2e38)


# Processes and memory


def test_it_travels_without_files_and_structures(path) -> None:
    structures = Structures([path])
    before = structures[np.arange(6)]
    data = pickle.dumps(structures)
    assert len(data) < 3000
    for name, tensor in pickle.loads(data)[np.arange(6)].items():
        assert torch.equal(tensor, before[name])


def test_worker_processes_give_the_same_batches(path) -> None:
    structures = Structures([path])
    structures[np.array([0])]
    here, there = ([b for w in Loader(structures, 2, 1, ALONE, workers=n).windows(0) for b in w] for n in (0, 1))
    assert len(here) == 3
    for one, other in zip(here, there, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_files_are_read_beside_a_lock(path) -> None:
    """As parallel file systems leave behind."""
    with path.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            h5py.File(path, "r", locking=True)
        Structures([path])[np.array([0])]


def test_what_was_read_last_is_kept_within_a_bound(path, monkeypatch) -> None:
    reads: list[str] = []
    whole = Structures([path])
    sizes = [sum(t.nbytes for t in whole[np.array([i])].values()) for i in range(6)]
    structures = Structures([path], cache_bytes=sizes[0] + sizes[1])
    record = structures._record
    monkeypatch.setattr(structures, "_record", lambda i: reads.append(i) or record(i))
    for i in (0, 1, 0, 1, 0):
        structures[np.array([i])]
    assert reads == [0, 1]
    for i in range(6):
        structures[np.array([i])]
    assert sum(a.nbytes for kept in structures._cache.values() for a in kept.values()) <= structures.cache_bytes
    reads.clear()
    structures[np.array([0])]
    assert reads == [0]
    nothing = Structures([path], cache_bytes=0)
    assert torch.equal(nothing[np.array([1])]["features"], whole[np.array([1])]["features"])


def test_batches_are_copies(path) -> None:
    structures = Structures([path])
    for tensor in structures[np.array([1])].values():
        tensor.zero_()
    again = structures[np.array([1])]
    assert all(bool(tensor.any()) for tensor in again.values())
    assert int(structures.sizes[1]) == int(again["lengths"][0])


def test_keys_are_a_function_of_the_identifier_alone(path, tmp_path) -> None:
    other = write_proteins(tmp_path / "other.h5", structures=3)
    one, two = Structures([path]), Structures([other, path])
    assert one[np.array([1, 0])]["keys"].tolist() == two[np.array([4, 3])]["keys"].tolist()
    assert one[np.array([1, 0])]["keys"].tolist() == [stable_key("protein0_0001"), stable_key("protein0_0000")]
    assert stable_key("1abc") == 3316496737016294459
    keys = [stable_key(f"protein{i}") for i in range(10_000)]
    assert len(set(keys)) == 10_000 and min(keys) >= 0 and max(keys) < 2**63
