"""Signals leave a note and nothing else; wall time is weighed against what stopping costs."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gdyn import processes
from gdyn.rundir import STOPPED, RunDir, read_json
from gdyn.signals import STOP_SIGNALS, StopRequest
from tests import runs
from tests.harness import REPOSITORY, clean_environment


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_noted_and_the_work_goes_on(number):
    with StopRequest() as stop:
        assert not stop.due(now=0, seconds_needed=1)
        signal.raise_signal(number)
        assert stop.due(now=0, seconds_needed=1)
    assert stop.reason == f"{number.name} received"


def test_the_first_reason_is_kept():
    with StopRequest(deadline=0) as stop:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.due(now=100, seconds_needed=1)
    assert stop.reason == "SIGUSR1 received"


def test_a_second_interrupt_does_not_wait():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.reason == "SIGINT received"


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_wall_time_leaves_room_for_a_window_and_a_checkpoint():
    stop = StopRequest(deadline=1000)
    assert not stop.due(now=890, seconds_needed=110)
    assert stop.due(now=891, seconds_needed=110)
    assert stop.reason == "wall time: 109 s left, 110 s needed for a window and a checkpoint"


def test_without_a_deadline_time_is_no_reason():
    assert not StopRequest().due(now=1e9, seconds_needed=1e9)


def test_a_deadline_may_become_known_later():
    stop = StopRequest()
    assert not stop.due(now=100, seconds_needed=1)
    stop.deadline = 100
    assert stop.due(now=100, seconds_needed=1)


@pytest.mark.slow
def test_a_stop_in_the_first_moments_is_obeyed_when_everything_is_imported(tmp_path):
    config = runs.small_run(tmp_path, "run")
    run_file = tmp_path / "run.yaml"
    run_file.write_text(config.to_yaml())
    command = [sys.executable, "launch/train.py", "--config", run_file]
    with subprocess.Popen(command, cwd=REPOSITORY, env=clean_environment(), stderr=subprocess.PIPE) as process:
        while not processes._listens(process.pid, signal.SIGUSR2):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGUSR2)
        _, said = process.communicate(timeout=120)
    assert process.returncode == STOPPED, said
    assert "SIGUSR2 received" in read_json(RunDir(Path(config.run_dir)).status_json)["reason"]
