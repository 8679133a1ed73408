"""Everything a user can get wrong: one clear message on standard error, exit code 2, on every rank, within seconds."""

import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from gdyn.engines.vamp import frames
from gdyn.errors import UserError
from gdyn.loader import Batch, Loader
from gdyn.ranks import ALONE
from tests import harness
from tests.bad_inputs import CASES
from tests.data import write_trajectory
from tests.proteins import write_proteins
from tests.trial import ProteinTrial, Trial

ONE_RANK = [name for name in CASES if not name.startswith("apart_")]
PROGRAMS_OF_ONE_PROCESS = ("evaluate_", "analyze_", "encode_", "export_", "prepare_")
TWO_RANKS = [name for name in CASES if not name.removeprefix("trained_").startswith(PROGRAMS_OF_ONE_PROCESS)]
REPRESENTATIVE = [
    *(
        "run_file_missing",
        "run_file_not_yaml",
        "key_of_engine_unknown",
        "option_unknown",
        "one_state",
        "trains_nothing",
    ),
    *("json_key_unknown", "two_precisions", "fp16_on_cpu", "data_file_missing", "distance_nan", "distance_nan_late"),
    *("validation_nan_late", "batch_too_large", "env_port_impossible", "run_dir_is_a_file", "init_from_other_network"),
    *("trained_tag_unknown", "trained_corrupted", "trained_other_schedule", "gdynet_key_unknown"),
    *("protein_file_missing", "protein_group_missing_late", "protein_coordinates_nan_late", "protein_widths_differ"),
    *("protein_too_large", "protein_one_code", "protein_foldx_nowhere"),
    *(name for name in CASES if name.startswith("apart_")),
]
"""Of every kind of mistake, and of every moment at which it shows."""

BEFORE_THEY_MEET = {name for name in CASES if name.startswith("env_")}
"""Of these every rank must speak for itself."""


@dataclass(frozen=True)
class Ending:
    """How a program ended on one rank."""

    code: int
    stderr: str


def attempt(trial: Trial, argv: list[str], port: int) -> Ending:
    """One rank's part, and all it said to standard error, C++ included."""
    rank, before = os.environ["RANK"], dict(os.environ)
    folder = trial.folder / "elsewhere" if trial.apart and rank == "1" else trial.folder
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    os.environ["MASTER_PORT"] = str(port)
    for name, value in trial.environ.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    frames.CHECKED_BYTES, checked_bytes = trial.checked_bytes or frames.CHECKED_BYTES, frames.CHECKED_BYTES
    said, stderr = trial.folder / f"stderr-{rank}", os.dup(2)
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
    try:
        code = import_module(f"launch.{trial.program}").main(argv)
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        logging.getLogger("gdyn").handlers.clear()
        frames.CHECKED_BYTES = checked_bytes
        os.environ.clear()
        os.environ.update(before)
    return Ending(code, said.read_text())


def attempts(trials: list[tuple[Trial, list[str], int]]) -> list[Ending]:
    """One after the other in one process, because the first of a process takes ten times as long as the others."""
    return [attempt(*trial) for trial in trials]


def endings(world_size: int, trials: Iterable[Trial]) -> list[tuple[Ending, ...]]:
    """How each trial ended on each rank."""
    harness.warm_up()
    work = [(trial, trial.write(), harness.free_port()) for trial in trials]
    limit = 30 + 3 * len(work)
    return list(zip(*harness.run_ranks(world_size, attempts, work, timeout=limit, join=False), strict=True))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each kind of trial a folder with data, and beside them a run that was trained on them."""
    folder = tmp_path_factory.mktemp("good")
    vamp, protein = folder / Trial.__name__, folder / ProteinTrial.__name__
    write_trajectory(vamp / "train", frames=60)
    write_trajectory(vamp / "validation", frames=40, seed=1)
    write_proteins(protein / "train.h5", structures=12, residues=(8, 14))
    write_proteins(protein / "validation.h5", structures=4, residues=(8, 14), seed=1)
    for (ending,) in endings(1, [Trial(vamp), ProteinTrial(protein)]):
        assert ending.code == 0, ending.stderr
    return folder


def spoilt(name: str, prepared: Path, folder: Path) -> Trial:
    """A trial of its own, in `folder / name`."""
    trained = name.startswith("trained_")
    kind = ProteinTrial if "protein" in name else Trial
    shutil.copytree(prepared / kind.__name__, folder / name, ignore=None if trained else shutil.ignore_patterns("run"))
    trial = kind(folder / name)
    CASES[name][0](trial)
    return trial


Results = dict[str, tuple[Ending, ...]]


def results(world_size: int, names: list[str], prepared: Path, folder: Path) -> Results:
    return dict(zip(names, endings(world_size, [spoilt(name, prepared, folder) for name in names]), strict=True))


@pytest.fixture(scope="module")
def alone(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results(1, ONE_RANK, prepared, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def pair(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results(2, REPRESENTATIVE, prepared, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def pair_of_all(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results(2, TWO_RANKS, prepared, tmp_path_factory.mktemp("pair_of_all"))


def check(name: str, ranks: tuple[Ending, ...]) -> None:
    """Exit code 2 everywhere; one message in all, which says what it must; no traceback anywhere."""
    said = "\n".join(ending.stderr for ending in ranks)
    assert [ending.code for ending in ranks] == [2] * len(ranks), said
    assert "Traceback" not in said
    messages = re.split("^gdyn: ", said, flags=re.MULTILINE)[1:]
    assert len(messages) == (len(ranks) if name in BEFORE_THEY_MEET else 1), said
    for part in CASES[name][1]:
        assert re.search(part, messages[0]), f"{part!r} is not in: {messages[0]}"


@pytest.mark.parametrize("name", ONE_RANK)
def test_a_mistake_is_one_message_and_exit_code_2(name: str, alone: Results) -> None:
    check(name, alone[name])


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_two_ranks_end_together_with_one_message(name: str, pair: Results) -> None:
    check(name, pair[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_end_together_whatever_the_mistake(name: str, pair_of_all: Results) -> None:
    check(name, pair_of_all[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["key_of_engine_unknown", "distance_nan"])
def test_a_real_launcher_shows_the_message_once(name: str, prepared: Path, tmp_path: Path) -> None:
    argv = spoilt(name, prepared, tmp_path).write()
    torchrun = ["torchrun", "--nproc_per_node", "2", "--master_port", str(harness.free_port())]
    done = harness.launch([*torchrun, "launch/train.py", *argv])
    assert done.returncode != 0
    assert done.stderr.count("gdyn: ") == 1
    assert "exitcode  : 2" in done.stderr  # torchrun's table of the ranks that failed


class Unreadable:
    """A data set whose samples cannot be read."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, indices: np.ndarray) -> Batch:
        raise UserError(f"frame {indices[0]} is bad: repair it.")


def test_what_a_worker_process_cannot_read_is_said_without_its_traceback() -> None:
    loader = Loader(Unreadable(), 8, 1, ALONE, workers=1)
    with pytest.raises(UserError, match=r"^frame \d is bad: repair it\.$"):
        next(loader.windows(0))
