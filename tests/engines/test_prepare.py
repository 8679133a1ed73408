"""Neighbour graphs and local polarisation against brute force, closed forms and ASE; files in, all or nothing out."""

import json
import re
import warnings
from pathlib import Path

import ase.io
import MDAnalysis as mda
import numpy as np
import pytest
from ase.neighborlist import neighbor_list
from MDAnalysis.lib.mdamath import triclinic_box

from gdyn.engines.vamp import neighbours
from gdyn.engines.vamp.neighbours import KNearest, Perovskite
from gdyn.engines.vamp.prepare import Preparation, check, prepare
from gdyn.engines.vamp.sources import SYMBOLS, Frame
from gdyn.errors import UserError
from launch.prepare import main

EXAMPLES = Path(__file__).parents[2] / "examples"
TRICLINIC = np.array([[3.6, 0.0, 0.0], [1.3, 3.1, 0.0], [-0.7, 0.9, 3.9]])
BATIO3 = Perovskite(a={"Ba": 2.75}, b={"Ti": 7.16}, o={"O": -3.3033})


def frame(positions, cell=None, periodic=None):
    periodic = np.full(3, cell is not None) if periodic is None else np.array(periodic)
    return Frame(0, np.asarray(positions, float), cell, periodic)


def brute_force(positions, cell, periodic, k, images=4):
    """k nearest by listing every image: indices and distances (N, k) by (float32 distance, index), in NumPy alone."""
    ranges = [np.arange(-images, images + 1) if axis else np.zeros(1) for axis in periodic]
    shifts = np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, 3) @ cell
    n = len(positions)
    distance = np.linalg.norm(positions[None, :, None] + shifts - positions[:, None, None], axis=-1).reshape(n, -1)
    distance = np.where(distance < 1e-9, np.inf, distance).astype(np.float32)
    index = np.tile(np.repeat(np.arange(n), len(shifts)), (n, 1))
    order = np.lexsort((index, distance), axis=-1)[:, :k]
    return np.take_along_axis(index, order, 1), np.take_along_axis(distance, order, 1)


def perovskite(cells, a=4.0, displacement=(0.0, 0.0, 0.0)):
    """cells³ unit cells of cubic BaTiO3 with every Ti displaced, Å: positions, atomic numbers, cell."""
    corners = np.stack(np.meshgrid(*[np.arange(cells)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    basis = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    positions = a * (corners + basis)
    positions[:, 1] += displacement
    return positions.reshape(-1, 3), np.tile([56, 22, 8, 8, 8], cells**3).astype(np.int32), cells * a * np.eye(3)


def write_npz(path, positions, types=None, **more):
    types = np.full(positions.shape[1], 6, np.int32) if types is None else types
    np.savez(path, traj_coords=positions, atom_types=types, **({"target_index": np.array([0])} | more))
    return path


def read(directory):
    return {path.stem: np.load(path) for path in directory.glob("*.npy")}


# --- neighbours


@pytest.mark.parametrize("atoms, k", [(1, 14), (5, 12), (9, 30)])
def test_triclinic_cells_smaller_than_the_shell_give_every_image(atoms, k):
    rng = np.random.default_rng(atoms)
    positions = (rng.random((atoms, 3)) + rng.integers(-2, 3, (atoms, 3))) @ TRICLINIC  # not wrapped into the cell
    indices, distances = KNearest(k, 20.0).find([frame(positions, TRICLINIC)])
    # brute force looks for images around the cell
    wrapped = (np.linalg.solve(TRICLINIC.T, positions.T).T % 1) @ TRICLINIC
    expected_indices, expected = brute_force(wrapped, TRICLINIC, [True] * 3, k)
    np.testing.assert_allclose(distances[0], expected, rtol=1e-5)
    if atoms > 1:  # a lone atom's images all have its index
        clear = np.diff(expected, axis=1) > 1e-4
        same = indices[0] == expected_indices
        assert same[:, 1:-1][clear[:, :-1] & clear[:, 1:]].all()


def test_a_slab_matches_the_ase_neighbour_list():
    rng = np.random.default_rng(1)
    slab = ase.Atoms("C20", positions=rng.random((20, 3)) * 5, cell=TRICLINIC * 1.5, pbc=[True, True, False])
    indices, distances = KNearest(10, 20.0).find([frame(slab.positions, np.array(slab.cell), slab.pbc)])
    i, j, d = neighbor_list("ijd", slab, 7.0)
    for atom in range(20):
        order = np.argsort(d[i == atom])[:10]
        np.testing.assert_allclose(distances[0, atom], d[i == atom][order], rtol=1e-5)
        np.testing.assert_array_equal(indices[0, atom], j[i == atom][order])


def test_open_systems_give_the_same_by_all_pairs_and_by_list(monkeypatch):
    frames = [frame(positions) for positions in np.random.default_rng(2).random((3, 30, 3)) * 9]
    all_pairs = KNearest(11, 20.0).find(frames)
    monkeypatch.setattr(neighbours, "ALL_PAIRS_ATOMS", 0)
    by_list = KNearest(11, 20.0).find(frames)
    np.testing.assert_array_equal(all_pairs[0], by_list[0])
    np.testing.assert_allclose(all_pairs[1], by_list[1], rtol=1e-6)


def test_equal_distances_are_ordered_by_index():
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3) * 0.7
    indices, distances = KNearest(6, 20.0).find([frame(grid, 2.1 * np.eye(3))])
    assert np.ptp(distances) == 0
    assert (np.diff(indices[0], axis=1) > 0).all()


@pytest.mark.parametrize("cell", [None, 200 * np.eye(3)])
def test_the_cutoff_grows_to_the_limit_and_no_further(cell):
    positions = [[0, 0, 0], [9.5, 0, 0], [19.5, 0, 0]]
    _, distances = KNearest(2, 20.0).find([frame(positions, cell)])
    np.testing.assert_allclose(distances[0], [[9.5, 19.5], [9.5, 10], [10, 19.5]])
    with pytest.raises(UserError, match="frame 0: atom 0 of the graph has 1 neighbours within 19 Å, 2 are wanted"):
        KNearest(2, 19.0).find([frame(positions, cell)])


# --- polarisation


@pytest.mark.parametrize("cells", [1, 2, 3])
def test_polarisation_of_displaced_titanium_is_charge_times_displacement_over_volume(cells):
    shift = np.array([0.02, -0.05, 0.1])
    positions, numbers, cell = perovskite(cells, displacement=shift)
    polarisation = BATIO3.polarisation(frame(positions, cell), numbers)
    expected = 7.16 * shift / 64 * 16.02176634  # e/Å² in C/m²: 1.602176634e-19 C / 1e-20 m²
    np.testing.assert_allclose(polarisation[numbers == 22], np.tile(expected, (cells**3, 1)), rtol=1e-4)
    assert not polarisation[numbers != 22].any()


def test_polarisation_turns_with_the_crystal_and_ignores_a_shift_of_it():
    positions, numbers, cell = perovskite(2, displacement=(0, 0.03, 0.1))
    positions = positions + np.random.default_rng(3).normal(0, 0.05, positions.shape)
    rotation, _ = np.linalg.qr(np.random.default_rng(4).normal(size=(3, 3)))
    before = BATIO3.polarisation(frame(positions, cell), numbers)
    after = BATIO3.polarisation(frame(positions @ rotation + 7.7, cell @ rotation), numbers)
    np.testing.assert_allclose(after, before @ rotation, atol=1e-5)


def test_a_vacancy_takes_only_its_own_term_away():
    positions, numbers, cell = perovskite(2)
    polarisation = BATIO3.polarisation(frame(np.delete(positions, 2, 0), cell), np.delete(numbers, 2))
    # the oxygen below Ti of cell 0 (index 1) and above Ti of cell (0, 0, 1): half its charge at 2 Å, V = 64 Å³
    expected = 0.5 * 3.3033 * 2.0 / 64 * 16.02176634
    np.testing.assert_allclose(polarisation[[1, 5]], [[0, 0, -expected], [0, 0, expected]], atol=1e-4)


def test_charged_formula_units_are_refused():
    _, numbers, _ = perovskite(1)
    with pytest.raises(UserError, match="neutral"):
        Perovskite({"Ba": 2.0}, {"Ti": 4.0}, {"O": -1.0}).check(numbers)


# --- files


def test_mdanalysis_round_trip(tmp_path):
    positions, numbers, cell = perovskite(2, displacement=(0, 0, 0.1))
    cell = cell @ (np.eye(3) + [[0, 0, 0], [0.2, 0, 0], [0.1, 0, 0]])  # MDAnalysis wants a lower triangle
    rng = np.random.default_rng(5)
    moving = positions @ np.linalg.inv(8 * np.eye(3)) @ cell + rng.normal(0, 0.1, (7, 40, 3))
    universe = mda.Universe.empty(40, trajectory=True)
    for attribute in ("names", "types", "elements"):
        universe.add_TopologyAttr(attribute, [SYMBOLS[number] for number in numbers])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the PDB writer misses attributes
        with mda.Writer(str(tmp_path / "run.xtc"), 40) as writer:
            for time, universe.atoms.positions in enumerate(moving):
                universe.dimensions = triclinic_box(*cell)
                universe.trajectory.ts.time = 2.0 * time
                writer.write(universe)
        universe.atoms.write(str(tmp_path / "top.pdb"))
    found = prepare(
        Preparation(
            [tmp_path / "top.pdb", tmp_path / "run.xtc"],
            tmp_path / "out",
            neighbours=18,
            ferro=BATIO3,
            start=1,
            stride=2,
            select="element Ti",
            atoms="not element Ba",
        )
    )
    assert (found["frames"], found["frame_time"], found["time_unit"]) == (3, 4.0, "ps")
    arrays = read(tmp_path / "out")
    kept = numbers != 56
    np.testing.assert_array_equal(arrays["atom_types"], numbers[kept])
    np.testing.assert_array_equal(arrays["target_index"], np.flatnonzero(numbers[kept] == 22))
    for row, positions in zip(range(3), moving[1::2], strict=True):
        _, expected = brute_force(positions[kept], cell, [True] * 3, 18, images=2)
        np.testing.assert_allclose(arrays["nbr_dists"][row], expected, atol=0.02)  # .xtc rounds to 0.01 Å
        np.testing.assert_allclose(
            arrays["atom_directions"][row], BATIO3.polarisation(frame(positions, cell), numbers)[kept], atol=0.05
        )


def test_extended_xyz_and_npz_of_the_same_frames_agree(tmp_path):
    rng = np.random.default_rng(6)
    positions = np.round(rng.random((5, 8, 3)) * 4, 3)
    lattices = np.stack([TRICLINIC * (1 + 0.01 * step) for step in range(5)])
    types = np.array([3, 16] * 4, np.int32)
    images = [ase.Atoms(types, p, cell=c, pbc=True) for p, c in zip(positions, lattices, strict=True)]
    ase.io.write(tmp_path / "run.extxyz", images)
    write_npz(tmp_path / "float.npz", positions, types, lattices=lattices)
    compact = {"traj_coords_mA": np.rint(positions * 1000).astype(np.int16), "lattices": lattices}
    np.savez_compressed(tmp_path / "compact.npz", atom_types=types, frame_time=0.5, time_unit="ps", **compact)
    for name in ("run.extxyz", "float.npz", "compact.npz"):
        command = ["trajectories", str(tmp_path / name), "--output", str(tmp_path / Path(name).stem), "--stride", "2"]
        assert main([*command, "--select", "element Li", "--start", "1"]) == 0
    expected = read(tmp_path / "run")
    np.testing.assert_array_equal(expected["target_index"], [0, 2, 4, 6])
    assert expected["nbr_dists"].shape == (2, 8, 12)
    for name in ("float", "compact"):
        for key, array in read(tmp_path / name).items():
            np.testing.assert_allclose(array, expected[key], rtol=1e-5)
    provenance = json.loads((tmp_path / "compact" / "prepare.json").read_text())
    assert (provenance["frame_time"], provenance["time_unit"]) == (1.0, "ps")
    assert provenance["source"][0]["file"] == "compact.npz"


def test_directions_in_the_file_are_kept(tmp_path):
    rng = np.random.default_rng(7)
    directions = rng.integers(-1500, 1500, (4, 6, 3)).astype(np.int16)
    source = write_npz(tmp_path / "a.npz", rng.random((4, 6, 3)), atom_directions_milli=directions)
    prepare(Preparation([source], tmp_path / "out", atoms="index 1 to 5", target_index=[3]))
    np.testing.assert_allclose(read(tmp_path / "out")["atom_directions"], directions[:, 1:] * 1e-3, rtol=1e-6)
    assert read(tmp_path / "out")["target_index"] == [2]  # counted among the atoms of the graph
    assert check(tmp_path / "out", ferro=True) == "✓ Data valid: 5 atoms, 1 targets, 4 frames"


@pytest.mark.slow  # every worker imports the package anew
def test_the_number_of_workers_does_not_matter(tmp_path):
    source = write_npz(tmp_path / "a.npz", np.random.default_rng(8).random((50, 7, 3)) * 5, lattices=TRICLINIC)
    for workers in (1, 2):
        prepare(Preparation([source], tmp_path / str(workers), workers=workers))
    alone = read(tmp_path / "1")
    for key, array in read(tmp_path / "2").items():
        np.testing.assert_array_equal(array, alone[key])


def test_a_failure_in_the_last_frame_leaves_nothing_and_an_old_directory_untouched(tmp_path):
    positions = np.random.default_rng(9).random((20, 5, 3))
    good = write_npz(tmp_path / "good.npz", positions)
    positions[-1, 3, 1] = np.nan
    bad = write_npz(tmp_path / "bad.npz", positions)
    prepare(Preparation([good], tmp_path / "out"))
    before = read(tmp_path / "out")
    listing = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=r"frame 19: atom 3 of the input is at .*nan"):
        prepare(Preparation([bad], tmp_path / "out", overwrite=True))
    with pytest.raises(UserError, match="exists; choose another --output or add --overwrite"):
        prepare(Preparation([good], tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == listing
    np.testing.assert_array_equal(read(tmp_path / "out")["nbr_dists"], before["nbr_dists"])
    prepare(Preparation([good], tmp_path / "out", overwrite=True, stop=4))
    assert len(read(tmp_path / "out")["nbr_dists"]) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == listing


def test_overwrite_spares_folders_that_prepare_did_not_make(tmp_path):
    source = write_npz(tmp_path / "a.npz", np.zeros((2, 2, 3)))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").touch()
    with pytest.raises(UserError, match=r"has no prepare.json"):
        prepare(Preparation([source], tmp_path / "thesis", overwrite=True))
    assert (tmp_path / "thesis" / "chapter1").exists()


RANDOM = np.random.default_rng(10).random((4, 5, 3))


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({}, ["--stop", "3", "--start", "3"], "frames 3:3:1 are none of the 4"),
        ({}, ["--select", "element Xe"], "names no atom; there are 5 C"),
        ({}, ["--select", "element ("], "does not work on this trajectory"),
        ({}, ["--target_index", "[5]"], "target atom 5 is not among the 5 atoms"),
        ({}, ["--target_index", "nowhere.npy"], "neither a .npy file"),
        ({}, ["--target_index", "[0]", "--select", "all"], "keep one"),
        ({}, ["--neighbours", "5"], "5 neighbours wanted, but 5 atoms with open boundaries have 4 each"),
        ({}, ["--ferro.a.Ba", "2", "--ferro.b.Ti", "4", "--ferro.o.O=-2"], "--ferro.a: the trajectory has no Ba atom"),
        ({"traj_coords": RANDOM[:0]}, [], "none of the 0"),
        ({"traj_coords": RANDOM[0]}, [], r"traj_coords of .* is \(5, 3\)"),
        ({"traj_coords": RANDOM[:, :3]}, [], r"is \(4, 3, 3\); \(frames, 5, 3\) expected"),
        ({"traj_coords": RANDOM.astype(object)}, [], "traj_coords of .*object"),
        ({"atom_types": np.array(["C"] * 5)}, [], "a row of atomic numbers expected"),
        ({"atom_types": np.array([6, 6, 6, 6, 100])}, [], "atom types are 6..100; the model knows 0..99"),
        ({"lattices": np.zeros((3, 3))}, [], "has no volume"),
        ({"lattices": np.tile(TRICLINIC, (3, 1, 1))}, [], "lattices of .* has 3 frames, traj_coords 4"),
        ({"atom_directions": np.full((4, 5, 3), np.nan)}, [], "frame 0: a direction is missing or not finite"),
        ({"target_index": np.array([0.5])}, [], "a row of at least one atom index expected"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(tmp_path, capsys, change, options, message):
    arrays = {"traj_coords": RANDOM, "atom_types": np.full(5, 6), "target_index": np.array([0])}
    np.savez(tmp_path / "a.npz", **(arrays | change))
    assert main(["trajectories", str(tmp_path / "a.npz"), "--output", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("name", ["a.npz", "a.extxyz", "a.pdb"])
def test_files_that_are_something_else_are_refused(tmp_path, capsys, name):
    command = ["trajectories", str(tmp_path / name), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / name).write_bytes(b"\x00\x01 nonsense")
    assert main(command) == 2
    assert "cannot read" in capsys.readouterr().err.replace("cannot be read", "cannot read")


def test_a_truncated_archive_is_refused(tmp_path, capsys):
    source = write_npz(tmp_path / "a.npz", np.random.default_rng(11).random((400, 5, 3)))
    source.write_bytes(source.read_bytes()[:-300])
    assert main(["trajectories", str(source), "--output", str(tmp_path / "out")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_atoms_that_change_during_a_trajectory_are_refused(tmp_path):
    ase.io.write(tmp_path / "a.extxyz", [ase.Atoms("CO", RANDOM[0, :2]), ase.Atoms("OC", RANDOM[0, :2] * 2)])
    with pytest.raises(UserError, match="a trajectory keeps its atoms") as caught:
        prepare(Preparation([tmp_path / "a.extxyz"], tmp_path / "out", target_index=[0]))
    assert "frame 1" in str(caught.value)


# --- the bundled examples


@pytest.mark.parametrize(
    "name, frames, shape, farthest",
    [
        ("alanine_dipeptide/trajectory_1.npz", 67932, (100, 10, 9), 8.0),
        ("alanine_dipeptide/trajectory_2.npz", 38178, (100, 10, 9), 8.0),
        ("li_diffusion/trajectory_1.npz", 10000, (100, 36, 12), 6.0),
        ("li_diffusion/trajectory_2.npz", 10000, (100, 36, 12), 6.0),
    ],
)
def test_the_examples_prepare(tmp_path, name, frames, shape, farthest):
    job = Preparation([EXAMPLES / name], tmp_path / "out", start=frames - 100)
    found = prepare(job)
    arrays = read(tmp_path / "out")
    assert arrays["nbr_lists"].shape == arrays["nbr_dists"].shape == shape
    assert found["time_unit"] == "ps" and found["farthest_neighbour"] < farthest
    assert check(tmp_path / "out").startswith("✓ Data valid")


@pytest.mark.parametrize("name", ["alanine_dipeptide", "li_diffusion"])
def test_example_data_fits_in_git(name):
    assert sum(path.stat().st_size for path in (EXAMPLES / name).glob("*.npz")) < 6e6
