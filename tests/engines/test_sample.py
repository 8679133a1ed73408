"""gdyn sample: molecules in the places of ligands, the same for any batch and any ranks; mistakes are one message."""

import csv
import logging
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import torch

from gdyn.config import Logging, Optimization, RunConfig
from gdyn.engines import Diffusion, Monodecoder
from gdyn.engines.diffusion import layout, sample
from gdyn.engines.diffusion.complexes import Complexes
from gdyn.engines.diffusion.pockets import read_pockets
from gdyn.engines.diffusion.prepare import Preparation, prepare
from gdyn.errors import UserError
from gdyn.inference import Run, load_run
from gdyn.phases import Phase
from gdyn.ranks import ALONE, RankContext
from gdyn.recipes import bundled
from launch import sample as program
from tests import harness, runs
from tests.complexes import write_complexes
from tests.harness import REPOSITORY, run_ranks

EXAMPLE = REPOSITORY / "examples" / "ligands_in_pockets" / "test.tar.xz"
TIMESTEPS = 50


def trained(folder: Path) -> Run:
    """An epoch of each objective on generated complexes."""
    train = write_complexes(folder / "train.h5", 12, ligand=(5, 9), pocket=(10, 20))
    validation = write_complexes(folder / "validation.h5", 4, ligand=(5, 9), pocket=(10, 20), seed=1)
    sizes = {"latent": 4, "hidden": 8, "blocks": 1, "denoiser_hidden": 8, "denoiser_blocks": 1, "timesteps": TIMESTEPS}
    config = RunConfig(
        engine=Diffusion(train=[str(train)], validation=[str(validation)], guidance=2.0, **sizes),  # type: ignore[arg-type]
        phases=[Phase("ligand_vae", 1), Phase("joint", 1)],
        deepspeed=str(bundled()["fp32_zero0"]),
        optimization=Optimization(4, learning_rate=0.01),
        logging=Logging(every_steps=6, progress="off"),
        run_dir=str(folder / "run"),
    )
    run_ranks(1, runs.run, config, timeout=180)
    return load_run(config.run_dir)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    harness.warm_up()
    return trained(tmp_path_factory.mktemp("diffusion"))


@pytest.fixture(scope="module")
def complexes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_complexes(tmp_path_factory.mktemp("targets") / "targets.h5", 3, (5, 9), (10, 20), seed=2)


@pytest.fixture(autouse=True)
def no_log_that_another_test_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("gdyn"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("gdyn"), "propagate", True)


class Atoms(NamedTuple):
    """Of a molecule in an SDF file, which may be no molecule by the rules of valence."""

    name: str
    elements: list[str]
    positions: np.ndarray


def read_sdf(path: Path) -> list[Atoms]:
    """By the columns of the format."""
    found = []
    for block in path.read_text().split("$$$$\n")[:-1]:
        lines = block.splitlines()
        rows = lines[4 : 4 + int(lines[3][:3])]
        positions = [[float(row[i : i + 10]) for i in (0, 10, 20)] for row in rows]
        found.append(Atoms(lines[0], [row[31:34].strip() for row in rows], np.array(positions)))
    return found


def make(run: Run, pockets: Path, output: Path, here: RankContext = ALONE, **options: Any) -> dict[str, list[Atoms]]:
    """The molecules that are written for each pocket."""
    run.engine.sample(run, pockets, output, here, **{"number": 2, "steps": 10} | options)
    return {path.stem: read_sdf(path) for path in sorted(output.glob("*.sdf"))}


def assert_same(one: dict[str, list[Atoms]], other: dict[str, list[Atoms]], tolerance: float = 2e-3) -> None:
    assert one.keys() == other.keys()
    for name in one:
        for a, b in zip(one[name], other[name], strict=True):
            assert (a.name, a.elements) == (b.name, b.elements)
            np.testing.assert_allclose(a.positions, b.positions, atol=tolerance)


def test_molecules_lie_where_the_ligands_were(run, complexes, tmp_path) -> None:
    found = make(run, complexes, tmp_path / "out")
    with h5py.File(complexes) as file:
        offsets, identifiers = file["ligand/offsets"][...], file["identifier"].asstr()[...]
        for i, identifier in enumerate(identifiers):
            mean = file["ligand/positions"][offsets[i] : offsets[i + 1]].mean(0) + file["centre"][i]
            assert [atoms.name for atoms in found[identifier]] == [f"{identifier} {k}" for k in (1, 2)]
            for atoms in found[identifier]:
                np.testing.assert_allclose(atoms.positions.mean(0), mean, atol=2e-3)
    assert len(found) == len(identifiers)


def test_what_is_written(run, complexes, tmp_path) -> None:
    lines = run.engine.sample(run, complexes, tmp_path / "a" / "out", ALONE, number=2, steps=3)
    identifiers = Complexes(complexes).identifiers
    names = {path.name for path in (tmp_path / "a" / "out").iterdir()}
    expected = {f"{name}{end}" for name in identifiers for end in (".sdf", "_pocket.pdb")} | {
        "samples.csv",
        "samples.html",
    }
    assert expected <= names and not [name for name in names if "partial" in name]
    with (tmp_path / "a" / "out" / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["pocket"] for row in rows] == [name for name in identifiers for _ in range(2)]
    with h5py.File(complexes) as file:
        pocket = file["pocket/positions"][: file["pocket/offsets"][1]] + file["centre"][0]
    said = (tmp_path / "a" / "out" / f"{identifiers[0]}_pocket.pdb").read_text().splitlines()
    written = [[float(line[i : i + 8]) for i in (30, 38, 46)] for line in said if line.startswith("ATOM")]
    np.testing.assert_allclose(written, pocket, atol=1e-3)
    assert str(tmp_path / "a" / "out") in "\n".join(lines)


def generated(run: Run, complexes: Path, batch_size: int = 32, **changes: Any) -> list[sample.Made]:
    """Molecules as the network makes them, in order."""
    usual = {"number": 4, "sampler": "ddim", "steps": 10, "guidance": 2.0, "seed": 0, "atoms": None}
    settings = sample.Settings(**usual | changes)
    pockets = read_pockets(complexes)
    jobs = sample.make_jobs(pockets, run.model.ligand_sizes, settings)
    made = sample.generate(run.model, pockets, jobs, settings, batch_size, ALONE)
    return sorted(made, key=lambda item: (item.pocket, item.number))


def assert_equal(one: list[sample.Made], other: list[sample.Made]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.pocket, a.number, a.elements.tolist(), a.charges.tolist()) == (
            *(b.pocket, b.number),
            *(b.elements.tolist(), b.charges.tolist()),
        )
        np.testing.assert_allclose(a.positions, b.positions, atol=2e-3)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_molecules_depend_on_the_seed_and_not_on_the_batch(run, complexes, sampler) -> None:
    first = generated(run, complexes, sampler=sampler)
    for size in (1, 5):
        assert_equal(generated(run, complexes, size, sampler=sampler), first)
    more = generated(run, complexes, sampler=sampler, number=6)
    assert_equal([item for item in more if item.number < 4], first)
    for a, b in zip(first, generated(run, complexes, sampler=sampler, seed=10**30), strict=True):
        assert a.positions.shape != b.positions.shape or np.abs(a.positions - b.positions).max() > 0.1


def on_ranks(here: RankContext, run_dir: Path, pockets: Path, output: Path) -> list[str]:
    run = load_run(run_dir)
    return run.engine.sample(run, pockets, output, here, number=2, steps=10)


def test_two_ranks_make_the_molecules_of_one(run, complexes, tmp_path) -> None:
    alone = make(run, complexes, tmp_path / "one")
    lines = run_ranks(2, on_ranks, run.dir.path, complexes, tmp_path / "two")
    assert_same({path.stem: read_sdf(path) for path in (tmp_path / "two").glob("*.sdf")}, alone)
    assert lines[0] and not lines[1]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of three real complexes."""
    folder = tmp_path_factory.mktemp("pairs")
    with tarfile.open(EXAMPLE) as archive:
        for member in archive.getmembers()[:6]:
            member.name = Path(member.name).name
            archive.extract(member, folder, filter="data")
    return folder


def test_pairs_of_files_are_what_prepare_makes_of_them(run, pairs, tmp_path) -> None:
    prepare(Preparation([pairs], tmp_path / "pairs.h5"))
    prepared = make(run, tmp_path / "pairs.h5", tmp_path / "prepared", number=2)
    assert len(prepared) == 3
    assert_same(make(run, pairs, tmp_path / "files", number=2), prepared)


def test_pairs_are_cut_as_the_training_data_were(run, pairs, tmp_path) -> None:
    with h5py.File(run.engine.train[0]) as file:
        assert file.attrs["radius"] == 10.0
    narrow = {pocket.entry.identifier: pocket for pocket in read_pockets(pairs, radius=5.0)}
    for pocket in read_pockets(pairs, radius=10.0):
        assert len(narrow[pocket.entry.identifier].entry.pocket["element"]) < len(pocket.entry.pocket["element"])
    small = tmp_path / "small"
    small.mkdir()
    train = write_complexes(small / "train.h5", 12, (5, 9), (10, 20))
    with h5py.File(train, "r+") as file:
        file.attrs["radius"] = 5.0
    found = sample._begin(Complexes(train), pairs, "*", tmp_path / "out", overwrite=False)
    for pocket in found:
        expected = narrow[pocket.entry.identifier].entry.pocket["positions"]
        np.testing.assert_array_equal(pocket.entry.pocket["positions"], expected)


def test_pockets_alone_get_molecules_at_their_mean(run, pairs, tmp_path) -> None:
    folder = tmp_path / "pockets"
    for path in pairs.glob("*_pocket10.pdb"):
        shutil.copy(path, (folder if folder.exists() else folder.mkdir() or folder) / path.name)
    found = make(run, folder, tmp_path / "out", number=2)
    assert sorted(found) == sorted(path.name.removesuffix("_pocket10.pdb") for path in folder.iterdir())
    for path in folder.iterdir():
        lines = [line for line in path.read_text().splitlines() if line.startswith("ATOM") and line[76:78] != " H"]
        mean = np.mean([[float(line[i : i + 8]) for i in (30, 38, 46)] for line in lines], axis=0)
        for atoms in found[path.name.removesuffix("_pocket10.pdb")]:
            np.testing.assert_allclose(atoms.positions.mean(0), mean, atol=2e-3)
    one = next(folder.iterdir())
    (name,) = make(run, one, tmp_path / "one", number=2)
    assert name == one.name.partition(".")[0]


def test_a_pocket_that_cannot_be_read_is_left_out_with_its_reason(run, pairs, tmp_path, caplog) -> None:
    folder = tmp_path / "pockets"
    shutil.copytree(pairs, folder)
    first, *rest = sorted(folder.glob("*_pocket10.pdb"))
    first.write_text("no atoms here")
    found = make(run, folder, tmp_path / "out", number=1)
    assert len(found) == len(rest)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any(
        first.name.removesuffix("_pocket10.pdb") in message and "no atom of an amino acid" in message
        for message in said
    )


def test_sizes_are_those_of_the_training_data_unless_told(run, complexes) -> None:
    settings = sample.Settings(1, "ddim", 10, 1.0, 0, None)
    counts = run.model.ligand_sizes
    drawn = torch.bincount(sample.draw_sizes(torch.arange(20_000), counts, settings), minlength=len(counts))
    assert not drawn[counts == 0].any()
    shares = counts / counts.sum()
    assert ((drawn / drawn.sum() - shares).abs() < 4 * (shares * (1 - shares) / drawn.sum()).sqrt() + 1e-9).all()
    for atoms, expected in (((7, 7), {7}), ((3, 5), {3, 4, 5}), ((1, 1), {1})):
        found = generated(run, complexes, atoms=atoms, number=10, steps=2)
        assert {len(item.elements) for item in found} == expected


def test_no_atom_is_of_an_unknown_element_or_charge(run, complexes) -> None:
    """Though the training data have some: they are a class of the network, but nothing one could write down."""
    for item in generated(run, complexes, number=40, steps=2):
        assert set(item.elements.tolist()) <= set(layout.ELEMENTS)
        assert set(item.charges.tolist()) <= set(layout.CHARGES)


def test_a_pocket_is_encoded_once_however_many_molecules(run, complexes, monkeypatch) -> None:
    encoded: list[int] = []
    encode = run.model.encode_pocket

    def counted(batch: dict[str, torch.Tensor]):
        encoded.extend(batch["keys"].tolist())
        return encode(batch)

    monkeypatch.setattr(run.model, "encode_pocket", counted)
    generated(run, complexes, 7, number=20, steps=2)
    assert len(encoded) == len(set(encoded)) == len(Complexes(complexes))


def test_without_a_pocket_means_that_the_network_does_not_keep_it(run) -> None:
    """The one atom that stands for no pocket is the network's, whatever is given in its place."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.tensor([6, 4])[:, None]
    x, h = torch.randn(2, 6, 3, generator=generator), torch.randn(2, 6, 4, generator=generator)
    x, h = x * mask.unsqueeze(-1), h * mask.unsqueeze(-1)
    pocket = torch.randn(2, 9, 3, generator=generator), torch.randn(2, 9, 4, generator=generator)
    pocket_mask, t_b = torch.arange(9) < torch.tensor([9, 5])[:, None], torch.tensor([20, 20])
    with torch.inference_mode():
        for keep in (True, False):
            encoded = [
                sample.Encoded(pocket[0][b, :size], pocket[1][b, :size], torch.zeros(3)) for b, size in ((0, 9), (1, 5))
            ]
            found = sample.denoiser(run.model, mask, encoded if keep else None)(t_b, x, h)
            expected = run.model.predict_noise(
                t_b, x, h, mask, *pocket, pocket_mask, torch.full((2,), keep), averaged=True
            )
            torch.testing.assert_close(found, expected)


def test_guidance_of_the_run_file_is_the_default(run, complexes, tmp_path, caplog) -> None:
    with caplog.at_level(logging.INFO, "gdyn"):
        make(run, complexes, tmp_path / "out", number=1, steps=2)
    assert "guidance 2," in caplog.text
    weak, strong = generated(run, complexes), generated(run, complexes, guidance=20.0)
    assert any(np.abs(a.positions - b.positions).max() > 2e-3 for a, b in zip(weak, strong, strict=True))


@pytest.mark.parametrize(
    ("steps", "sampler", "expected"),
    [
        (None, None, ("ddim", 100)),
        (None, "ancestral", ("ancestral", 1000)),
        (1000, None, ("ancestral", 1000)),
        (1000, "ddim", ("ddim", 1000)),
        (50, None, ("ddim", 50)),
        (50, "ancestral", ("ancestral", 50)),
    ],
)
def test_few_steps_are_taken_by_ddim_and_all_by_ancestral_sampling(steps, sampler, expected) -> None:
    assert sample.choose_sampler(1000, steps, sampler) == expected
    assert sample.choose_sampler(50, None, None) == ("ddim", 50)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_the_work(run, complexes, world_size) -> None:
    pockets = read_pockets(complexes)
    jobs = sample.make_jobs(pockets, run.model.ligand_sizes, sample.Settings(30, "ddim", 10, 1.0, 0, None))
    shares = [sample.share(jobs, pockets, RankContext(rank, world_size)) for rank in range(world_size)]
    assert [job for part in shares for job in part] == jobs
    cost = [sum(j.atoms * (j.atoms + len(pockets[j.pocket].entry.pocket["element"])) for j in part) for part in shares]
    assert max(cost) < 1.3 * sum(cost) / world_size
    assert len({job.key for job in jobs}) == len(jobs)


def test_a_molecule_that_diverged_is_written_and_said(run, complexes, tmp_path, caplog) -> None:
    found = make(run, complexes, tmp_path / "out", guidance=1e30, number=2)
    positions = np.concatenate([item.positions for items in found.values() for item in items])
    assert np.isfinite(positions).all()
    assert "diverged" in caplog.text


def test_names_of_files_are_names_and_differ() -> None:
    names = sample.file_names(["a/b", "a_b", "A_B", "../../etc/passwd", "..", "1abc", "x" * 300, "蛋白"])
    assert names[:6] == ["a_b", "a_b-2", "A_B-3", "_.._etc_passwd", "pocket", "1abc"]
    assert len(set(names)) == len(names) and all(len(name) < 220 and Path(name).name == name for name in names)


def test_files_are_replaced_only_when_asked(run, complexes, tmp_path) -> None:
    first = make(run, complexes, tmp_path / "out")
    with pytest.raises(UserError, match="not empty"):
        make(run, complexes, tmp_path / "out", seed=3)
    assert_same({path.stem: read_sdf(path) for path in (tmp_path / "out").glob("*.sdf")}, first)
    other = make(run, complexes, tmp_path / "out", seed=3, overwrite=True)
    assert all(not np.array_equal(first[name][0].positions, other[name][0].positions) for name in first)


def test_training_files_that_are_gone_are_no_obstacle(run, complexes, tmp_path, monkeypatch, caplog) -> None:
    expected = make(run, complexes, tmp_path / "with")
    monkeypatch.setitem(vars(run.engine), "train", [str(tmp_path / "gone.h5")])
    assert_same(make(run, complexes, tmp_path / "without"), expected)
    assert "gone.h5" in caplog.text
    with (tmp_path / "without" / "samples.csv").open() as file:
        assert {row["novel"] for row in csv.DictReader(file)} == {""}


@pytest.mark.parametrize("package", ["rdkit.Chem", "gemmi", "networkx", "posebusters"])
def test_a_missing_package_is_said_before_the_work(run, complexes, tmp_path, monkeypatch, package) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=re.escape('pip install "gdyn[sample]"')):
        make(run, complexes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_engines_make_no_molecules(run, complexes, tmp_path) -> None:
    other = Monodecoder(train=["a.h5"], validation=["b.h5"])
    with pytest.raises(UserError, match="Monodecoder makes no molecules"):
        other.sample(run, complexes, tmp_path / "out", ALONE)


# What users get wrong.


def folder_of(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def empty_h5(folder: Path) -> Path:
    path = write_complexes(folder / "empty.h5", 1)
    with h5py.File(path, "r+") as file:
        del file["identifier"]
        file.create_dataset("identifier", (0,), h5py.string_dtype())
    return path


def other_h5(folder: Path) -> Path:
    with h5py.File(folder / "other.h5", "w") as file:
        file["x"] = 1
    return folder / "other.h5"


def protein(folder: Path) -> Path:
    """A file of more atoms than a pocket has."""
    line = "ATOM  {:5d}  CA  ALA A{:4d}    {:8.3f}{:8.3f}{:8.3f}  1.00  0.00           C\n"
    text = "".join(line.format(i, i, 3.8 * (i % 50), 3.8 * (i // 50), 0) for i in range(1, 3102))
    return folder_of(folder / "protein", x_protein__pdb=text)


def full(folder: Path) -> Path:
    return folder_of(folder / "full", a__sdf="")


def good(folder: Path) -> Path:
    return write_complexes(folder / "good.h5", 2, (5, 9), (10, 20), seed=2)


def spoilt(*words: str) -> Callable[[Path], list[Any]]:
    """Options on pockets and an output that are right."""
    return lambda folder: ["--pockets", good(folder), "--output", folder / "out", *words]


def pockets_of(source: Callable[[Path], Path]) -> Callable[[Path], list[Any]]:
    return lambda folder: ["--pockets", source(folder), "--output", folder / "out"]


BAD: dict[str, tuple[Callable[[Path], list[Any]], tuple[str, ...]]] = {
    "pockets_not_said": (lambda f: ["--output", f / "out"], ("pockets",)),
    "output_not_said": (lambda f: ["--pockets", good(f)], ("output",)),
    "pockets_missing": (pockets_of(lambda f: f / "nowhere"), ("nowhere", "does not exist")),
    "pockets_h5_missing": (pockets_of(lambda f: f / "no.h5"), ("no.h5", "does not exist", "gdyn prepare complexes")),
    "pockets_none": (pockets_of(lambda f: folder_of(f / "none", a__txt="")), ("none has no pockets", "_pocket10.pdb")),
    "pockets_ligand_alone": (
        pockets_of(lambda f: folder_of(f / "alone", a_ligand__sdf="x")),
        ("alone", "a_ligand.sdf", "no pocket or protein file"),
    ),
    "pockets_file_of_no_kind": (pockets_of(lambda f: folder_of(f / "d", a__txt="") / "a.txt"), ("a.txt",)),
    "pockets_h5_empty": (pockets_of(empty_h5), ("empty.h5", "no complex")),
    "pockets_h5_other": (pockets_of(other_h5), ("other.h5", "gdyn prepare complexes")),
    "pockets_no_hdf5": (pockets_of(lambda f: folder_of(f / "d", a__h5="x") / "a.h5"), ("a.h5", "HDF5")),
    "pockets_unreadable": (
        pockets_of(lambda f: folder_of(f / "bad", a__pdb="ATOM  nonsense\n")),
        ("bad/a.pdb", "cannot be read by gemmi", "line 1"),
    ),
    "pockets_no_pdb": (
        pockets_of(lambda f: folder_of(f / "bad", a__pdb="x")),
        ("bad/a.pdb", "no atom of an amino acid"),
    ),
    "pockets_without_atoms": (pockets_of(lambda f: folder_of(f / "bad", a__pdb="")), ("bad/a.pdb", "empty")),
    "pockets_a_protein": (pockets_of(protein), ("x_protein.pdb", "3101 atoms", "at most 3000", "_ligand.sdf")),
    "number_zero": (spoilt("--number", "0"), ("number", "0")),
    "steps_negative": (spoilt("--steps", "-5"), ("steps", "-5")),
    "steps_zero": (spoilt("--steps", "0"), ("steps", "0")),
    "steps_too_many": (spoilt("--steps", "51"), ("--steps 51", "50 steps", "1 to 50")),
    "guidance_nan": (spoilt("--guidance", "nan"), ("guidance", "nan")),
    "guidance_not_finite": (spoilt("--guidance", ".nan"), ("--guidance nan", "a number")),
    "guidance_infinite": (spoilt("--guidance", ".inf"), ("--guidance inf",)),
    "guidance_a_word": (spoilt("--guidance", "much"), ("guidance", "much")),
    "seed_a_word": (spoilt("--seed", "x"), ("seed", "x")),
    "sampler_unknown": (spoilt("--sampler", "euler"), ("sampler", "euler", "ancestral", "ddim")),
    "seed_negative": (spoilt("--seed", "-1"), ("seed", "-1")),
    "atoms_none": (spoilt("--atoms", "0"), ("--atoms 0", "1 to 512", "20:30")),
    "atoms_the_wrong_way_round": (spoilt("--atoms", "30:20"), ("--atoms 30:20",)),
    "atoms_a_word": (spoilt("--atoms", "many"), ("--atoms many",)),
    "atoms_too_many": (spoilt("--atoms", "1:100000"), ("--atoms 1:100000", "512")),
    "batch_of_nothing": (spoilt("--batch_size", "0"), ("batch_size",)),
    "option_unknown": (spoilt("--numbr", "3"), ("numbr",)),
    "checkpoint_unknown": (spoilt("--checkpoint", "p9-x-e0001"), ("p9-x-e0001",)),
    "output_exists": (lambda f: ["--pockets", good(f), "--output", full(f)], ("full", "not empty", "--overwrite")),
    "output_is_a_file": (lambda f: ["--pockets", good(f), "--output", full(f) / "a.sdf"], ("a.sdf", "is a file")),
    "output_within_a_file": (lambda f: ["--pockets", good(f), "--output", full(f) / "a.sdf" / "x"], ("a.sdf/x",)),
    "output_is_the_pockets": (
        lambda f: ["--pockets", full(f), "--output", f / "full", "--overwrite"],
        ("full", "the pockets themselves"),
    ),
}
SLOW_TO_SHOW = (
    "pockets_none",
    "pockets_a_protein",
    "steps_too_many",
    "guidance_infinite",
    "number_zero",
    "output_exists",
)
"""Of every moment at which a mistake shows."""


def attempts(work: list[tuple[list[str], Path, int]]) -> list[tuple[int, str]]:
    """One rank's exit codes and what it said to standard error, C++ included."""
    endings = []
    for argv, folder, port in work:
        os.environ["MASTER_PORT"] = str(port)
        said, stderr = folder / f"stderr-{os.environ['RANK']}", os.dup(2)
        with said.open("w") as file:
            os.dup2(file.fileno(), 2)
        try:
            code = program.main(argv)
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            logging.getLogger("gdyn").handlers.clear()
        endings.append((code, said.read_text()))
    return endings


Endings = dict[str, tuple[tuple[int, str], ...]]


def endings(world_size: int, names: list[str], run: Run, folder: Path) -> Endings:
    """How each mistake ends on each rank."""
    work = []
    for name in names:
        (folder / name).mkdir()
        argv = [run.dir.path, *BAD[name][0](folder / name)]
        work.append(([str(word) for word in argv], folder / name, harness.free_port()))
    ranks = run_ranks(world_size, attempts, work, timeout=60 + 3 * len(work), join=False)
    return dict(zip(names, zip(*ranks, strict=True), strict=True))


@pytest.fixture(scope="module")
def alone(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Endings:
    return endings(1, list(BAD), run, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def pair(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Endings:
    return endings(2, list(SLOW_TO_SHOW), run, tmp_path_factory.mktemp("pair"))


def check(name: str, ranks: tuple[tuple[int, str], ...]) -> None:
    said = "\n".join(text for _, text in ranks)
    assert [code for code, _ in ranks] == [2] * len(ranks), said
    assert "Traceback" not in said
    messages = re.split("^gdyn: ", said, flags=re.MULTILINE)[1:]
    # What the command line says is said before the ranks meet.
    assert len(messages) == 1 or "see --help" in messages[0], said
    assert all(part in messages[0] for part in BAD[name][1]), messages[0]


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_message_and_exit_code_2(name: str, alone: Endings) -> None:
    check(name, alone[name])


@pytest.mark.parametrize("name", SLOW_TO_SHOW)
def test_two_ranks_end_together_with_one_message(name: str, pair: Endings) -> None:
    check(name, pair[name])


def test_a_folder_that_is_no_run_is_one_message_and_exit_2(tmp_path) -> None:
    argv = [str(tmp_path), "--pockets", str(tmp_path), "--output", str(tmp_path / "out")]
    ((ending,),) = run_ranks(1, attempts, [(argv, tmp_path, harness.free_port())], timeout=60, join=False)
    assert ending[0] == 2 and "is not a run folder" in ending[1]


def test_a_checkpoint_from_before_the_denoisers_training_is_refused(run, complexes, tmp_path) -> None:
    before = load_run(run.dir.path, "p1-joint-e0000")
    with pytest.raises(UserError, match="no trained denoiser"):
        make(before, complexes, tmp_path / "out")


def test_the_command_ends_with_molecules(run, complexes, tmp_path, capfd) -> None:
    argv = [str(run.dir.path), "--pockets", str(complexes), "--number", "1", "--steps", "2"]
    argv += ["--output", str(tmp_path / "out")]
    ((ending,),) = run_ranks(1, attempts, [(argv, tmp_path, harness.free_port())], timeout=60, join=False)
    assert ending[0] == 0, ending[1]
    assert "3 pockets: ddim sampler, 2 steps, guidance 2" in ending[1]
    assert len(list((tmp_path / "out").glob("*.sdf"))) == 3
