"""Padded batches against plain h5py; damaged files are refused by name."""

import itertools
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from gdyn.engines.diffusion import layout
from gdyn.engines.diffusion.complexes import Complexes
from gdyn.errors import MissingFile, UserError
from gdyn.loader import Loader
from gdyn.ranks import RankContext
from gdyn.splits import stable_key
from tests.complexes import write_complexes


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_complexes(tmp_path_factory.mktemp("complexes") / "train.h5")


def test_a_batch_holds_what_the_file_holds_with_zeros_behind(path):
    batch = Complexes(path)[np.array([5, 2])]
    with h5py.File(path, locking=False) as file:
        for row, index in enumerate([5, 2]):
            for part, columns in (("ligand", ["aromatic"]), ("pocket", ["backbone", "residue"])):
                start, end = file[f"{part}/offsets"][index : index + 2]
                n = end - start
                assert batch[f"{part}_mask"][row].tolist() == [True] * n + [False] * (
                    batch[f"{part}_mask"].shape[1] - n
                )
                for name in ["positions", *columns]:
                    np.testing.assert_array_equal(batch[f"{part}_{name}"][row, :n], file[f"{part}/{name}"][start:end])
                    assert not batch[f"{part}_{name}"][row, n:].any()


def test_a_batch_has_the_types_that_engine_and_networks_expect(path):
    batch = Complexes(path)[np.arange(3)]
    kinds = {name: tensor.dtype for name, tensor in batch.items()}
    classes = [f"ligand_{name}" for name in ("element", "aromatic", "charge")]
    classes += [f"pocket_{name}" for name in ("element", "backbone", "residue")]
    assert kinds == {
        **dict.fromkeys(("ligand_positions", "pocket_positions"), torch.float32),
        **dict.fromkeys(("ligand_mask", "pocket_mask"), torch.bool),
        **dict.fromkeys((*classes, "keys"), torch.int64),
    }


def test_pockets_have_their_mean_at_the_origin_and_ligands_do_not(path):
    batch = Complexes(path)[np.arange(8)]
    assert (batch["pocket_positions"].sum(1) / batch["pocket_mask"].sum(1, keepdim=True)).abs().max() < 1e-5
    assert (batch["ligand_positions"].sum(1) / batch["ligand_mask"].sum(1, keepdim=True)).abs().max() > 0.1


def test_what_has_no_class_of_its_own_is_unknown_and_not_carbon():
    assert layout.element_classes(np.array([1, 6, 53, 0, 34, 118])).tolist() == [0, 1, 9, 10, 10, 10]
    assert layout.charge_classes(np.array([-2, -1, 0, 1, 2], np.int8)).tolist() == [3, 0, 1, 2, 3]
    assert layout.residue_classes(np.array(["ALA", "VAL", "MSE", "HIE", "CYX", "HOH", ""])).tolist() == [
        *(0, 19, 20, layout.RESIDUES.index("HIS"), layout.RESIDUES.index("CYS"), 20, 20)
    ]


def test_a_batch_does_not_depend_on_batch_mates_but_for_its_padding(path):
    data = Complexes(path)
    alone, together = data[np.array([3])], data[np.arange(8)]
    for name, tensor in alone.items():
        row = together[name][3]
        assert torch.equal(row[: tensor.shape[1]] if tensor.ndim > 1 else row, tensor[0])


def test_files_are_pooled_in_their_order(path, tmp_path):
    other = write_complexes(tmp_path / "more.h5", complexes=3, seed=1)
    pooled, first, second = Complexes([path, other]), Complexes(path), Complexes(other)
    assert len(pooled) == 11 and pooled.identifiers == first.identifiers + second.identifiers
    assert pooled.smiles == first.smiles + second.smiles
    np.testing.assert_array_equal(pooled.sizes, np.concatenate([first.sizes, second.sizes]))
    for ours, theirs in ((7, first[np.array([7])]), (8, second[np.array([0])]), (10, second[np.array([2])])):
        assert all(torch.equal(pooled[np.array([ours])][name], tensor) for name, tensor in theirs.items())


def test_sizes_are_those_of_the_file(path):
    data = Complexes(path)
    with h5py.File(path, locking=False) as file:
        ligands, pockets = np.diff(file["ligand/offsets"]), np.diff(file["pocket/offsets"])
        np.testing.assert_array_equal(data.ligand_sizes, file["ligand/sizes"])
    np.testing.assert_array_equal(data.sizes, 20 * ligands + pockets)
    assert data.sizes.dtype == np.int64
    assert data.ligand_sizes.sum() == 8 and data.ligand_sizes[ligands].all()


def test_the_key_of_an_identifier_is_the_same_everywhere_and_no_other_has_it(path):
    assert stable_key("1a2b") == -7837924951490138558 % 2**64 >> 1  # BLAKE2b, by `b2sum -l 64`
    keys = Complexes(path)[np.arange(8)]["keys"]
    assert len(keys.unique()) == 8 and torch.equal(keys, Complexes(path)[np.arange(8)]["keys"])


def test_complexes_of_one_name_in_two_files_have_keys_of_their_own(tmp_path):
    paths = [write_complexes(tmp_path / f"{seed}.h5", seed=seed) for seed in (0, 1)]
    with h5py.File(paths[0]) as one, h5py.File(paths[1], "r+") as other:
        other["identifier"][...] = one["identifier"][...]
    keys = [Complexes(path)[np.arange(8)]["keys"] for path in paths]
    assert len(torch.cat(keys).unique()) == 16


@pytest.mark.parametrize("index", [-1, 8, 100])
def test_an_index_out_of_range_is_refused(path, index):
    with pytest.raises(IndexError, match=f"complex {index} of 8"):
        Complexes(path)[np.array([0, index])]


def test_a_pickled_data_set_is_small_and_reads_the_same(path):
    data = Complexes(path)
    before = data[np.arange(8)]
    travelled = pickle.dumps(data)
    assert len(travelled) < 2000
    assert all(torch.equal(pickle.loads(travelled)[np.arange(8)][name], tensor) for name, tensor in before.items())


def test_a_forked_child_opens_the_file_itself(path):
    data = Complexes(path)
    data[np.arange(2)]
    parent = data._files[0].file
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads, which is what is tested
        child = os.fork()
    if not child:
        os.write(writer, bytes([data._files[0].file is not parent]))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"\x01"


def test_a_file_without_write_permission_and_without_locks_is_read(path, tmp_path):
    copy = Path(shutil.copy(path, tmp_path / "copy.h5"))
    copy.chmod(0o444)
    assert len(Complexes(copy)[np.arange(2)]["keys"]) == 2


@pytest.mark.slow
def test_worker_processes_read_the_same(path):
    here = RankContext()
    batches = [
        list(itertools.chain(*Loader(Complexes(path), 2, 1, here, workers=workers).windows(0))) for workers in (0, 2)
    ]
    assert len(batches[0]) == 4
    for ours, theirs in zip(*batches, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def replace(file: h5py.File, name: str, values: Any) -> None:
    del file[name]
    file[name] = values


def put(file: h5py.File, name: str, place: Any, value: Any) -> None:
    file[name][place] = value


BAD: dict[str, tuple[Callable[[h5py.File], Any], tuple[str, ...]]] = {
    "no_layout": (lambda f: f.attrs.pop("layout"), ("layout None", "gdyn prepare complexes")),
    "other_layout": (lambda f: f.attrs.update(layout="foldtree2"), ("layout 'foldtree2'",)),
    "newer_version": (lambda f: f.attrs.update(version=2), ("version 2", "reads 1")),
    "no_charges": (lambda f: f.pop("ligand/charge"), ("lacks the array ligand/charge",)),
    "no_offsets": (lambda f: f.pop("pocket/offsets"), ("lacks the array pocket/offsets",)),
    "no_identifiers": (lambda f: f.pop("identifier"), ("lacks the array identifier",)),
    "array_is_a_group": (
        lambda f: (f.pop("ligand/charge"), f.create_group("ligand/charge")),
        ("lacks the array ligand/charge",),
    ),
    "flat_positions": (
        lambda f: replace(f, "ligand/positions", np.zeros(30, np.float32)),
        ("ligand/positions is float32 (30,)", "(any, 3)"),
    ),
    "positions_are_integers": (
        lambda f: replace(f, "pocket/positions", np.zeros(f["pocket/positions"].shape, int)),
        ("pocket/positions is int64", "kind f"),
    ),
    "one_element_less": (
        lambda f: replace(f, "ligand/element", f["ligand/element"][:-1]),
        ("ligand/element is uint8",),
    ),
    "offsets_descend": (lambda f: put(f, "ligand/offsets", 2, 0), ("ligand/offsets", "ascend")),
    "offsets_end_early": (lambda f: put(f, "pocket/offsets", -1, 30), ("pocket/offsets", "runs from 0 to 30")),
    "offsets_of_other_data": (
        lambda f: replace(f, "ligand/offsets", f["ligand/offsets"][:-1]),
        ("ligand/offsets is int64 (8,)", "(9)"),
    ),
    "centre_not_finite": (lambda f: put(f, "centre", (3, 1), np.nan), ("centre of complex0_0003", "nan")),
    "identifier_twice": (lambda f: put(f, "identifier", 1, "complex0_0000"), ("identifier", "more than once")),
    "position_not_finite": (
        lambda f: put(f, "ligand/positions", (0, 1), np.nan),
        ("ligand/positions of complex0_0000", "nan"),
    ),
    "position_far_away": (
        lambda f: put(f, "pocket/positions", (0, 1), 1e6),
        ("pocket/positions of complex0_0000", "1000000"),
    ),
    "pocket_off_centre": (
        lambda f: put(f, "pocket/positions", slice(None), f["pocket/positions"][...] + 1),
        ("pocket/positions of complex0_0000", "mean", "origin"),
    ),
    "element_impossible": (lambda f: put(f, "pocket/element", 0, 200), ("pocket/element of complex0_0000", "200")),
    "aromatic_not_a_flag": (lambda f: put(f, "ligand/aromatic", 0, 7), ("ligand/aromatic of complex0_0000", "7")),
    "residue_impossible": (lambda f: put(f, "pocket/residue", 0, 21), ("pocket/residue of complex0_0000", "21", "20")),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_right_is_refused(path, tmp_path, name):
    spoil, said = BAD[name]
    copy = Path(shutil.copy(path, tmp_path / "spoilt.h5"))
    with h5py.File(copy, "r+") as file:
        spoil(file)
    with pytest.raises(UserError) as caught:
        Complexes(copy)[np.arange(8)]
    assert all(words in str(caught.value) for words in (str(copy), *said)), str(caught.value)


def test_a_file_that_is_missing_or_no_hdf5_is_refused(path, tmp_path):
    with pytest.raises(MissingFile, match="nowhere.h5"):
        Complexes(tmp_path / "nowhere.h5")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(UserError, match="text.h5 cannot be read as HDF5"):
        Complexes(tmp_path / "text.h5")
    (tmp_path / "cut.h5").write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="cut.h5 cannot be read as HDF5"):
        Complexes(tmp_path / "cut.h5")
    with pytest.raises(UserError, match="no file"):
        Complexes([])


def test_files_prepared_differently_are_not_pooled(path, tmp_path):
    other = write_complexes(tmp_path / "more.h5", seed=1)
    with h5py.File(other, "r+") as file:
        file.attrs["radius"] = 6.0
    with pytest.raises(UserError, match=r"radius 10\.0.*6\.0"):
        Complexes([path, other])
