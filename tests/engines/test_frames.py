"""Trajectories on disk: what is read, that it is what was written, and that every pair of frames is served once."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gdyn.engines.vamp import frames
from gdyn.engines.vamp.frames import NAMES, FramePairs, Trajectory
from gdyn.errors import MissingFile, UserError
from tests.data import write_trajectory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_trajectory(tmp_path / "one", frames=30, targets=2, ferro=True)


def on_disk(folder: Path) -> dict[str, np.ndarray]:
    return {Path(name).stem: np.load(folder / name) for name in NAMES}


def test_frames_are_what_was_written(folder) -> None:
    arrays, trajectory = on_disk(folder), Trajectory(folder, ferro=True)
    assert len(trajectory) == trajectory.n_frames == 30
    wanted = np.array([3, 29, 0])
    batch = trajectory.frames(wanted)
    assert list(batch) == ["nbr_lists", "nbr_dists", "atom_directions"]
    for name, tensor in batch.items():
        np.testing.assert_array_equal(tensor.numpy(), arrays[name][wanted])
    np.testing.assert_array_equal(trajectory.atom_types, arrays["atom_types"])
    np.testing.assert_array_equal(trajectory.target_index, arrays["target_index"])


def test_vanilla_reads_no_directions(folder) -> None:
    (folder / "atom_directions.npy").unlink()
    assert list(Trajectory(folder).frames(np.array([0]))) == ["nbr_lists", "nbr_dists"]
    with pytest.raises(MissingFile, match=r"atom_directions\.npy \(the ferro model needs"):
        Trajectory(folder, ferro=True)


def test_files_in_order_are_the_directory_that_holds_them(folder) -> None:
    files, whole = Trajectory([folder / name for name in NAMES[:4]]), Trajectory(folder)
    for name, tensor in whole.frames(np.arange(30)).items():
        assert torch.equal(tensor, files.frames(np.arange(30))[name])


def test_all_missing_files_are_named_at_once(folder) -> None:
    for name in NAMES[1:3]:
        (folder / name).unlink()
    with pytest.raises(MissingFile, match=r"target_index\.npy.*nbr_lists\.npy"):
        Trajectory(folder)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int16])
def test_any_integer_type_of_indices_will_do(folder, kind) -> None:
    kinds = {"atom_types": kind, "target_index": kind, "nbr_lists": kind, "nbr_dists": np.float64}
    for name, array in on_disk(folder).items():
        np.save(folder / f"{name}.npy", array.astype(kinds.get(name, array.dtype)))
    batch = Trajectory(folder).frames(np.arange(3))
    assert batch["nbr_lists"].dtype == torch.int32
    assert batch["nbr_dists"].dtype == torch.float32


def test_a_single_target_may_be_stored_as_a_number(folder) -> None:
    np.save(folder / "target_index.npy", np.int32(1))
    assert Trajectory(folder).target_index.tolist() == [1]


def test_duplicate_targets_are_allowed_with_a_warning(folder) -> None:
    np.save(folder / "target_index.npy", np.array([1, 0, 1], np.int32))
    with pytest.warns(UserWarning, match="1 targets more than once"):
        Trajectory(folder)


def test_a_pair_is_two_frames_tau_apart(folder) -> None:
    arrays, pairs = on_disk(folder), FramePairs([Trajectory(folder, ferro=True)], tau=7)
    assert len(pairs) == 30 - 7
    batch = pairs[np.array([22, 5])]
    for name in ("nbr_lists", "nbr_dists", "atom_directions"):
        np.testing.assert_array_equal(batch[name].numpy(), arrays[name][[22, 5, 29, 12]])
    assert batch["target_index"].tolist() == [0, 1]
    assert batch["atom_types"].tolist() == arrays["atom_types"].tolist()


def test_pairs_of_several_trajectories_never_span_two_of_them(tmp_path) -> None:
    lengths, tau = (12, 9, 20), 4
    folders = [write_trajectory(tmp_path / str(n), frames=n, seed=n) for n in lengths]
    pairs = FramePairs([Trajectory(folder) for folder in folders], tau)
    expected = []
    for folder, n in zip(folders, lengths, strict=True):
        dists = np.load(folder / "nbr_dists.npy")
        expected += [(dists[t], dists[t + tau]) for t in range(n - tau)]
    assert len(pairs) == len(expected)
    order = np.random.default_rng(0).permutation(len(pairs))
    first, second = pairs[order]["nbr_dists"].chunk(2)
    np.testing.assert_array_equal(first.numpy(), np.stack([expected[i][0] for i in order]))
    np.testing.assert_array_equal(second.numpy(), np.stack([expected[i][1] for i in order]))


def test_trajectories_of_different_systems_are_refused(tmp_path) -> None:
    one = Trajectory(write_trajectory(tmp_path / "one", frames=20))
    for other, difference in (
        ({"atoms": 7}, "atoms or targets"),
        ({"targets": 2}, "atoms or targets"),
        ({"neighbours": 3}, "neighbours"),
    ):
        folder = write_trajectory(tmp_path / str(other), frames=20, **other)
        with pytest.raises(UserError, match=difference):
            FramePairs([one, Trajectory(folder)], tau=2)


def test_more_frames_than_tau_are_needed(folder) -> None:
    assert len(FramePairs([Trajectory(folder)], tau=29)) == 1
    with pytest.raises(UserError, match="has 30 frames, tau is 30"):
        FramePairs([Trajectory(folder)], tau=30)


@pytest.mark.parametrize("tau", [0, -3])
def test_the_lag_is_positive(folder, tau) -> None:
    with pytest.raises(UserError, match=f"tau = {tau}"):
        FramePairs([Trajectory(folder)], tau=tau)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("nbr_dists", np.nan, "frame 25 of .*nbr_dists"),
        ("nbr_dists", -0.5, "frame 25 of .*nbr_dists"),
        ("nbr_dists", np.inf, "frame 25 of .*nbr_dists"),
        ("nbr_lists", 6, "frame 25 of .*nbr_lists.*6 atoms"),
        ("nbr_lists", -1, "frame 25 of .*nbr_lists"),
        ("atom_directions", np.nan, "atom_directions"),
    ],
)
def test_a_bad_frame_is_found_whether_looked_at_first_or_read_later(folder, monkeypatch, name, value, said) -> None:
    array = np.load(folder / f"{name}.npy")
    array[25, 3, 1] = value
    np.save(folder / f"{name}.npy", array)
    with pytest.raises(UserError, match=said):
        Trajectory(folder, ferro=True)
    monkeypatch.setattr(frames, "CHECKED_BYTES", 1)
    trajectory = Trajectory(folder, ferro=True)
    trajectory.frames(np.arange(20))
    with pytest.raises(UserError, match=said):
        trajectory.frames(np.array([4, 25, 11]))


def test_the_files_of_a_list_may_lie_anywhere_and_have_any_name(folder) -> None:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.move(folder / "nbr_dists.npy", elsewhere / "distances.npy")
    paths = [*(folder / name for name in NAMES[:3]), elsewhere / "distances.npy"]
    assert Trajectory(paths).n_frames == 30


def test_frames_are_mapped_from_disk_and_handed_out_as_copies(folder) -> None:
    trajectory = Trajectory(folder)
    assert all(isinstance(array, np.memmap) for array in trajectory.frame_arrays)
    trajectory.frames(np.arange(30))["nbr_dists"].zero_()
    assert trajectory.frames(np.arange(30))["nbr_dists"].any()


def test_nothing_is_unpickled(folder) -> None:
    np.save(folder / "atom_types.npy", np.array([{"evil": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="pickle"):
        Trajectory(folder)
