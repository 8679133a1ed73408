"""What a machine cannot run, must compile or would wait for is said before training."""

import os
from pathlib import Path
from typing import Any

import pytest

from gdyn import ds_machine
from gdyn.ds_machine import Machine
from gdyn.errors import UserError
from tests.test_ds_config import config

TOOLLESS = Machine("cpu", frozenset({"fp32", "bf16"}), ("a C++ compiler (c++)", "ninja"), frozenset())
EQUIPPED = Machine("cpu", frozenset({"fp32", "bf16"}), (), frozenset())


def test_precision_the_device_lacks_is_refused() -> None:
    mine = config(fp16__enabled=True)
    with pytest.raises(UserError, match=r"mine\.json: precision fp16 is not supported .* bf16, fp32"):
        ds_machine.check_hardware(mine, mine.values, EQUIPPED, {})


@pytest.mark.parametrize(
    ("changes", "ops"),
    [
        ({}, []),
        ({"optimizer__params__torch_adam": False}, ["fused_adam"]),
        (
            {"optimizer__params__torch_adam": False, "zero_optimization__offload_optimizer": {"device": "cpu"}},
            ["cpu_adam"],
        ),
        ({"zero_optimization__offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, ["async_io"]),
        ({"optimizer": {"type": "SGD", "params": {"lr": 1.0}}}, []),
    ],
)
def test_ops_that_must_be_compiled_are_foreseen(changes: dict[str, Any], ops: list[str]) -> None:
    assert ds_machine.ops_needed(config(**changes).values) == ops


def test_compilation_without_tools_is_refused_and_with_tools_announced(tmp_path: Path) -> None:
    mine = config(optimizer__params__torch_adam=False)
    directories = {"fused_adam": tmp_path}
    with pytest.raises(UserError, match=r'C\+\+ compiler .* ninja; .*g\+\+.*"torch_adam": true'):
        ds_machine.check_hardware(mine, mine.values, TOOLLESS, directories)
    [warning] = ds_machine.check_hardware(mine, mine.values, EQUIPPED, directories)
    assert "fused_adam" in warning and "minutes" in warning
    (tmp_path / "fused_adam.so").touch()
    assert ds_machine.check_hardware(mine, mine.values, EQUIPPED, directories) == []
    with pytest.raises(UserError, match=r"does not find ninja;"):
        ds_machine.check_hardware(mine, mine.values, TOOLLESS, directories)


def test_abandoned_build_lock_is_refused_with_the_cure(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    for path in (lock, tmp_path):
        os.utime(path, (0, 0))
    with pytest.raises(UserError, match=f"rm {lock}"):
        ds_machine.check_build_locks({"fused_adam": tmp_path})


def test_lock_of_a_live_build_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            lock.unlink()

    monkeypatch.setattr("time.sleep", nap)
    ds_machine.check_build_locks({"fused_adam": tmp_path})
    assert len(naps) == 3


def test_a_process_in_the_build_directory_counts_as_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ds_machine._process_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert ds_machine._process_in(tmp_path)


def test_no_lock_no_wait_and_no_op_no_directory(tmp_path: Path) -> None:
    ds_machine.check_build_locks({"fused_adam": tmp_path})
    assert ds_machine.build_directories(config().values, EQUIPPED) == {}


def test_torch_says_where_it_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    values = config(optimizer__params__torch_adam=False).values
    assert ds_machine.build_directories(values, EQUIPPED) == {"fused_adam": tmp_path / "fused_adam"}
    built_in = Machine("cpu", frozenset({"fp32"}), (), frozenset({"fused_adam"}))
    assert ds_machine.build_directories(values, built_in) == {}
