"""The geometry of a chain against biotite, SciPy, plain sums, symmetry, and structures whose elements are known."""

import biotite.structure as struc
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation

from gdyn.engines.monodecoder import layout
from gdyn.engines.monodecoder.features import (
    corner_spectrum,
    dihedrals,
    features,
    peptide_bonds,
    row_spectra,
    secondary_structure,
    torsions,
    with_oxygens,
)
from tests.backbones import HELIX, STRAND, build, wandering

NO_PROPERTIES = np.zeros((20, 0))


def arrays(backbone, letters=None, **options):
    letters = letters or (layout.AMINO_ACIDS * len(backbone))[: len(backbone)]
    plddt = np.linspace(0.3, 0.9, len(backbone))
    return features(letters, backbone, plddt, **{"properties": NO_PROPERTIES, **options})


def broken(backbone, at, by=30.0):
    """The chain with residues at, at + 1, ... moved away."""
    return np.concatenate([backbone[:at], backbone[at:] + [by, 0, 0]])


def biotite_chain(backbone):
    chain = struc.AtomArray(3 * len(backbone))
    chain.coord = backbone[:, :3].reshape(-1, 3)
    chain.atom_name = np.tile(["N", "CA", "C"], len(backbone))
    chain.res_id = np.repeat(np.arange(len(backbone)), 3)
    chain.res_name[:] = "ALA"
    return chain


def strands_of_a_sheet(residues=8, gap=4.8):
    """Two strands side by side, antiparallel, as two pieces of one chain with a break between."""
    strand = build([STRAND] * residues)
    axis = strand[-1, 1] - strand[0, 1]
    axis /= np.linalg.norm(axis)
    best = None
    for turn in np.arange(0, 360, 5):
        for slide in np.arange(-4, 4.1, 0.5):
            # about an axis across the sheet the strand comes back the other way
            across = np.cross(axis, [0, 0, 1.0])
            across = Rotation.from_rotvec(np.deg2rad(turn) * axis).apply(across / np.linalg.norm(across))
            normal = np.cross(axis, across)
            other = Rotation.from_rotvec(np.pi * normal).apply((strand - strand.mean((0, 1))).reshape(-1, 3))
            other = other.reshape(strand.shape) + strand.mean((0, 1)) + gap * across + slide * axis
            both = np.concatenate([strand, other])
            if cdist(strand.reshape(-1, 3), other.reshape(-1, 3)).min() < 2.6:
                continue
            oxygen_nitrogen = cdist(strand[:, 3], other[:, 0])
            count = (oxygen_nitrogen < 3.3).sum() + (cdist(other[:, 3], strand[:, 0]) < 3.3).sum()
            if best is None or count > best[0]:
                best = count, both
    return best[1]


# --- angles and frames


def test_torsions_agree_with_biotite():
    backbone = wandering(40)
    ours = torsions(backbone, peptide_bonds(backbone))
    theirs = np.nan_to_num(np.stack(struc.dihedral_backbone(biotite_chain(backbone)), axis=1))
    difference = np.angle(np.exp(1j * (ours - theirs)))
    np.testing.assert_allclose(difference, 0, atol=1e-5)


def test_torsions_are_those_the_chain_was_built_with():
    angles = np.random.default_rng(1).uniform(-170, 170, (12, 2))
    ours = np.rad2deg(torsions(build(angles, omega=175.0), np.ones(11, bool)))
    np.testing.assert_allclose(ours[1:, 0], angles[1:, 0], atol=1e-6)
    np.testing.assert_allclose(ours[:-1, 1], angles[:-1, 1], atol=1e-6)
    np.testing.assert_allclose(ours[:-1, 2], 175.0, atol=1e-6)
    assert ours[0, 0] == ours[-1, 1] == ours[-1, 2] == 0


def test_a_mirror_image_turns_every_angle_round():
    backbone = wandering(20)
    joined = peptide_bonds(backbone)
    np.testing.assert_allclose(torsions(backbone * [-1, 1, 1], joined), -torsions(backbone, joined), atol=1e-12)


def test_dihedral_of_a_right_angle():
    a, b, c, d = np.array([[1.0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 1, 1]])
    # looking along b-c, the far bond is turned anticlockwise
    assert dihedrals(a, b, c, d) == pytest.approx(-np.pi / 2)


def test_frames_are_right_handed_and_see_their_own_atoms_alike():
    backbone = wandering(30)
    frames = arrays(backbone)["node/R_true/x"]
    np.testing.assert_allclose(frames.transpose(0, 2, 1) @ frames, np.broadcast_to(np.eye(3), frames.shape), atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(frames), 1, atol=1e-6)
    n, c = (np.einsum("rij,ri->rj", frames, backbone[:, atom] - backbone[:, 1]) for atom in (0, 2))
    np.testing.assert_allclose(c, np.broadcast_to([1.525, 0, 0], c.shape)[:], atol=0.03)
    np.testing.assert_allclose(n[:, 2], 0, atol=1e-5)
    assert (n[:, 1] > 0).all()


# --- breaks


def test_nothing_crosses_a_break():
    made = arrays(broken(wandering(20), at=8))
    angles, steps = made["node/bondangles/x"], made["node/t_true/x"]
    assert angles[8, 0] == angles[7, 1] == angles[7, 2] == 0
    assert (angles[7, 0], angles[8, 1]) != (0, 0)
    assert not steps[[7, -1]].any() and steps[[6, 8]].all()
    for link in ("backbone", "backbonerev", "window", "windowrev"):
        source, target = made[f"edge/res_{link}_res/edge_index"]
        assert ((source < 8) == (target < 8)).all()


def test_steps_and_backbones_follow_the_chain():
    backbone = wandering(9)
    made = arrays(backbone)
    np.testing.assert_allclose(made["node/t_true/x"][:-1], np.diff(backbone[:, 1], axis=0), rtol=1e-5)
    assert made["edge/res_backbone_res/edge_index"].T.tolist() == [[i, i - 1] for i in range(1, 9)]
    assert made["edge/res_backbonerev_res/edge_index"].T.tolist() == [[i, i + 1] for i in range(8)]
    window = [[i, j] for i in range(9) for j in (i - 2, i - 1) if j >= 0]
    assert made["edge/res_window_res/edge_index"].T.tolist() == window
    assert sorted(made["edge/res_windowrev_res/edge_index"].T.tolist()) == sorted([j, i] for i, j in window)


# --- contacts


def test_contacts_agree_with_all_distances_and_are_listed_both_ways_once():
    backbone = wandering(80)
    made = arrays(backbone)
    index, distance = (made[f"edge/res_contactPoints_res/edge_{what}"] for what in ("index", "attr"))
    distances = cdist(backbone[:, 1], backbone[:, 1])
    expected = {(i, j) for i in range(80) for j in range(80) if i != j and distances[i, j] < layout.CONTACT_DISTANCE}
    assert set(map(tuple, index.T.tolist())) == expected and index.shape[1] == len(expected)
    np.testing.assert_allclose(distance, distances[tuple(index)], rtol=1e-6)


# --- labels


def test_labels_stand_beside_their_own_coordinates():
    backbone = wandering(25)
    letters = "MKVXAWYPGTDEHCQNRSLIFAAAM"
    made = arrays(backbone, letters, properties=np.arange(40.0).reshape(20, 2))
    np.testing.assert_allclose(made["node/coords/x"], backbone[:, 1], rtol=1e-5)
    for i, letter in enumerate(letters):
        expected = np.zeros(20)
        if letter != "X":
            expected[layout.AMINO_ACIDS.index(letter)] = 1
        np.testing.assert_array_equal(made["node/AA/x"][i], expected)
        np.testing.assert_array_equal(made["node/res/x"][i, 8:], expected)
        place = layout.AMINO_ACIDS.find(letter)
        np.testing.assert_array_equal(made["node/res/x"][i, 6:8], [2 * place, 2 * place + 1] if place >= 0 else [0, 0])
    angles, entered = made["node/bondangles/x"], made["node/res/x"]
    np.testing.assert_allclose(np.arctan2(entered[:, :3], entered[:, 3:6]), angles, atol=1e-6)
    np.testing.assert_allclose(np.hypot(entered[:, :3], entered[:, 3:6]), angles != 0, atol=1e-6)
    np.testing.assert_allclose(made["node/plddt/x"][:, 0], np.linspace(0.3, 0.9, 25), rtol=1e-6)


@pytest.mark.parametrize("residues", [3, 4, 7, 30, 60, 90])
def test_shapes_are_those_of_the_layout(residues):
    made = arrays(wandering(residues), frames=True)
    widths = {"res": 38, "AA": 20, "coords": 3, "t_true": 3, "bondangles": 3, "plddt": 1, "ss": 3}
    shapes = {name: (residues, width) for name, width in widths.items()}
    shapes |= {"R_true": (residues, 3, 3), "fourier1dr": (residues, 80), "fourier1di": (residues, 80)}
    shapes |= {"fourier2dr": (1, 1300), "fourier2di": (1, 1300)}
    nodes = {name.split("/")[1]: values for name, values in made.items() if name.startswith("node/")}
    assert {name: values.shape for name, values in nodes.items()} == shapes
    assert all(values.dtype == np.float32 and np.isfinite(values).all() for values in nodes.values())
    assert (nodes["ss"].sum(axis=1) == 1).all()
    np.testing.assert_array_equal(nodes["res"][:, 26:35], nodes["R_true"].reshape(-1, 9))


# --- symmetry


@pytest.mark.parametrize("residues", [6, 40, 64, 97])
def test_only_coordinates_frames_and_steps_turn_with_the_molecule(residues):
    backbone = wandering(residues, seed=residues)
    turn = Rotation.random(random_state=3)
    moved = turn.apply(backbone.reshape(-1, 3)).reshape(backbone.shape) + [10.0, -20, 5]
    before, after = arrays(backbone), arrays(moved)
    for name, values in before.items():
        if name in ("node/coords/x", "node/R_true/x", "node/t_true/x"):
            continue
        if "fourier" in name and name.endswith("i/x"):
            magnitude = before[name.replace("di/x", "dr/x")]
            # where there is no magnitude the phase is rounding
            close = np.abs(np.exp(1j * values) - np.exp(1j * after[name])) * (magnitude > 1e-3)
            np.testing.assert_allclose(close, 0, atol=1e-3)
        else:
            np.testing.assert_allclose(after[name], values, atol=1e-4, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(after["node/R_true/x"], turn.as_matrix() @ before["node/R_true/x"], atol=1e-5)
    np.testing.assert_allclose(after["node/t_true/x"], turn.apply(before["node/t_true/x"]), atol=1e-4)


# --- spectra


@pytest.mark.parametrize("residues", [3, 12, 79, 80, 85])
def test_row_spectra_are_the_plain_sums(residues):
    ca = wandering(residues)[:, 1]
    distances = cdist(ca, ca)
    magnitude, phase = row_spectra(distances)
    kept = min(residues, 80)
    k, j = np.arange(kept)[:, None], np.arange(residues)
    expected = distances @ np.exp(-2j * np.pi * k * j / residues).T
    np.testing.assert_allclose(magnitude[:, :kept] * np.exp(1j * phase[:, :kept]), expected, atol=1e-8)
    assert not magnitude[:, kept:].any() and not phase[:, kept:].any()


@pytest.mark.parametrize("residues", [5, 49, 50, 61])
def test_corners_of_the_flat_spectrum_are_the_plain_double_sums(residues):
    ca = wandering(residues)[:, 1]
    distances = cdist(ca, ca)
    size = max(residues, 50)
    wave = np.exp(-2j * np.pi * np.outer(np.arange(size), np.arange(residues)) / size)
    flat = wave @ distances @ wave.T
    corners = np.zeros((size, size), bool)
    for i in range(25):
        for j in range(25):
            if i + j < 25:
                corners[i, j] = corners[size - 1 - i, size - 1 - j] = True
            if i <= j:
                corners[i, size - 25 + j] = corners[size - 25 + j, i] = True
    magnitude, phase = corner_spectrum(distances)
    np.testing.assert_allclose((magnitude * np.exp(1j * phase))[0], flat[corners], atol=1e-7)


def test_phases_of_real_values_do_not_flip_with_rounding():
    ca = wandering(70)[:, 1]
    phases = [
        corner_spectrum(cdist(turned, turned))[1]
        for turned in (Rotation.random(random_state=seed).apply(ca) for seed in range(5))
    ]
    np.testing.assert_allclose(np.ptp(phases, axis=0), 0, atol=1e-6)


# --- secondary structure


def test_an_ideal_helix_is_a_helix_with_bonds_to_the_fourth_residue():
    backbone = build([HELIX] * 20)
    classes, bonds = secondary_structure(backbone, np.ones(19, bool), np.ones(20, bool))
    assert (classes[1:-1].argmax(1) == 1).all() and (classes[[0, -1]].argmax(1) == 0).all()
    assert {abs(i - j) for i, j in bonds.T} == {4}
    # N-H of i to C=O of i - 4: all but the first four residues give one
    assert sorted(i for i, j in bonds.T if i > j) == list(range(4, 20))


def test_proline_gives_no_hydrogen_bond():
    amide = np.ones(20, bool)
    amide[10] = False
    _, bonds = secondary_structure(build([HELIX] * 20), np.ones(19, bool), amide)
    assert [10, 6] not in bonds.T.tolist() and [10, 14] in bonds.T.tolist()


def test_a_helix_does_not_go_on_across_a_break():
    backbone = build([HELIX] * 20)
    whole, _ = secondary_structure(backbone, np.ones(19, bool), np.ones(20, bool))
    joined = np.arange(19) != 9
    cut, bonds = secondary_structure(backbone, joined, np.ones(20, bool))
    assert whole[8:12].argmax(1).tolist() == [1, 1, 1, 1]
    assert cut[9:11].argmax(1).tolist() == [0, 0]
    # the bonds are there all the same, but for that of the residue whose hydrogen has no place
    assert [11, 7] in bonds.T.tolist() and [10, 6] not in bonds.T.tolist()


def test_a_lone_strand_is_a_loop_and_two_side_by_side_are_strands():
    lone, bonds = secondary_structure(build([STRAND] * 8), np.ones(7, bool), np.ones(8, bool))
    assert (lone.argmax(1) == 0).all() and bonds.shape == (2, 0)
    sheet = strands_of_a_sheet()
    joined = np.arange(15) != 7
    classes, bonds = secondary_structure(sheet, joined, np.ones(16, bool))
    assert bonds.size and ((bonds[0] < 8) != (bonds[1] < 8)).all()
    assert (classes.argmax(1) == 2).sum() >= 4 and not (classes.argmax(1) == 1).any()


@pytest.mark.parametrize("kind", [HELIX, STRAND])
def test_a_missing_oxygen_is_put_where_it_was(kind):
    backbone = build([kind] * 10)
    bare = backbone.copy()
    bare[:, 3] = np.nan
    restored = with_oxygens(bare, np.ones(9, bool))
    np.testing.assert_allclose(restored[:-1], backbone[:-1], atol=0.1)
    n, ca, c, o = restored[-1]
    assert np.linalg.norm(o - c) == pytest.approx(1.231)
    assert abs(dihedrals(n, ca, c, o)) == pytest.approx(0, abs=1e-6)  # as if psi were 180 degrees
    np.testing.assert_array_equal(with_oxygens(backbone, np.ones(9, bool)), backbone)
