"""Everything a user can get wrong: one clear message on standard error, exit code 2, on every rank, within seconds."""

import os
import re
import shutil
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from tests import harness
from tests.bad_inputs import CASES, Trial
from tests.data import write_trajectory

SECONDS = 15
"""A rank that needs longer waits for something."""


@dataclass(frozen=True)
class Ending:
    """How one rank ended."""

    code: int
    stderr: str


def program(trial: Trial, argv: list[str], port: int) -> Ending:
    """One rank's part, and all it said to standard error, C++ included."""
    rank = os.environ["RANK"]
    folder = trial.folder / "elsewhere" if trial.apart and rank == "1" else trial.folder
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    said = trial.folder / f"stderr-{rank}"
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
    os.environ["MASTER_PORT"] = str(port)
    for name, value in trial.environ.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if trial.checked_bytes is not None:
        from gdyn.engines.vamp import frames

        frames.CHECKED_BYTES = trial.checked_bytes
    try:
        code = import_module(f"launch.{trial.program}").main(argv)
    except SystemExit as stop:
        code = stop.code
    sys.stderr.flush()
    return Ending(code, said.read_text())


def endings(world_size: int, trial: Trial) -> list[Ending]:
    return harness.run_ranks(
        world_size, program, trial, trial.write(), harness.free_port(), timeout=SECONDS, join=False
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and beside them a run that was trained on them."""
    harness.warm_up()
    folder = tmp_path_factory.mktemp("good")
    write_trajectory(folder / "train", frames=60)
    write_trajectory(folder / "validation", frames=40, seed=1)
    (ending,) = endings(1, Trial(folder))
    assert ending.code == 0, ending.stderr
    return folder


def spoilt(name: str, prepared: Path, tmp_path: Path) -> Trial:
    folder = tmp_path / "here"
    trained = name.startswith("trained_")
    shutil.copytree(prepared, folder, ignore=None if trained else shutil.ignore_patterns("run"))
    trial = Trial(folder)
    CASES[name][0](trial)
    return trial


def check(name: str, ranks: list[Ending]) -> None:
    """Exit code 2 everywhere; one message in all, which says what it must; no traceback anywhere."""
    said = "\n".join(ending.stderr for ending in ranks)
    assert [ending.code for ending in ranks] == [2] * len(ranks), said
    assert "Traceback" not in said
    starts = re.findall("^gdyn: ", said, re.MULTILINE)
    assert len(starts) == 1, said
    message = said.split("gdyn: ")[1]
    for part in CASES[name][1]:
        assert re.search(part, message), f"{part!r} is not in: {message}"


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 45


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("apart_")])
def test_a_mistake_is_one_message_and_exit_code_2(name: str, prepared: Path, tmp_path: Path) -> None:
    check(name, endings(1, spoilt(name, prepared, tmp_path)))
