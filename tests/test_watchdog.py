"""A rank that gets nowhere ends the job within limit + grace, both tell where they were, and the right one is named."""

import ctypes
import os
import signal
import threading
import time

import pytest

from gdyn import failures, watchdog
from gdyn.failures import Where
from gdyn.rundir import HUNG, RunDir, read_json
from gdyn.signals import StopRequest
from gdyn.watchdog import Watchdog, blamed
from tests.harness import RanksFailed

LIMIT = 1.0
WAITS = "waits for the other ranks in all_reduce"


@pytest.mark.parametrize(
    ("answers", "ranks"),
    [
        ([WAITS, "is in sleep (engine.py:3)", WAITS], [1]),
        ([WAITS, WAITS, "does not answer: stopped"], [2]),
        (["is in read (loader.py:3)", WAITS, "is in read (loader.py:3)"], [0, 2]),
        ([WAITS, WAITS], [0, 1]),  # the fabric's fault
    ],
)
def test_to_blame_are_those_that_do_not_wait_for_others(answers, ranks):
    assert blamed(answers) == ranks


def hold_the_lock():
    ctypes.PyDLL(None).sleep(60)


def stop_here():
    os.kill(os.getpid(), signal.SIGSTOP)


def spin_for_ever():
    while True:
        time.sleep(0.01)


def get_stuck(here, folder, who, trouble):
    """Rank `who` gets into trouble in its seventh step, the others wait for it. What they said is in `folder`."""
    os.dup2(os.open(folder / f"{here.rank}.log", os.O_CREAT | os.O_WRONLY), 2)
    watchdog.GRACE = 1.5
    with Watchdog(here, limit=LIMIT) as watch:
        watch.run_dir = RunDir(folder) if here.main else None
        here.barrier()
        watch.at("training", "vamp2", 1, 6)
        if here.rank == who:
            trouble()
        here.barrier()


def stuck(run_ranks, folder, ranks, who, trouble):
    """(exit codes as the harness tells them, what each rank said, the failure on record)."""
    with pytest.raises(RanksFailed) as caught:
        run_ranks(ranks, get_stuck, folder, who, trouble)
    said = [(folder / f"{rank}.log").read_text() for rank in range(ranks)]
    return [str(caught.value.errors[rank]) for rank in range(ranks)], said, failures.read(RunDir(folder))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(("ranks", "who"), [slow(1, 0), slow(2, 0), (2, 1)])
def test_a_hang_ends_all_ranks_with_71_their_stacks_and_the_name_of_the_one_at_fault(run_ranks, tmp_path, ranks, who):
    ends, said, failure = stuck(run_ranks, tmp_path, ranks, who, spin_for_ever)
    assert ends == ranks * [f"no answer; exit code {HUNG}"]
    assert (failure.kind, failure.rank, failure.where) == ("hang", who, Where("training", "vamp2", 1, 6))
    assert failure.error.startswith("is in spin_for_ever (test_watchdog.py:")
    assert "time.sleep(0.01)" in said[who] and f"[rank {who} on {os.uname().nodename}]" in said[who]
    assert f"rank {who} on {os.uname().nodename} is in spin_for_ever" in said[0]
    if ranks > 1:
        assert "waits for the other ranks in all_reduce" in said[1 - who] and "here.barrier()" in said[1 - who]


@pytest.mark.slow
def test_a_rank_that_holds_pythons_lock_is_named_and_ended_by_faulthandler(run_ranks, tmp_path):
    ends, said, failure = stuck(run_ranks, tmp_path, 2, 1, hold_the_lock)
    assert ends == [f"no answer; exit code {HUNG}", "no answer; exit code 1"]
    assert "Timeout" in said[1] and "in hold_the_lock" in said[1]
    assert (failure.rank, failure.error) == (1, "does not answer: stopped, swapping, or its node is gone")


@pytest.mark.slow
def test_a_stopped_rank_is_named_by_rank_0(run_ranks, tmp_path):
    ends, _, failure = stuck(run_ranks, tmp_path, 2, 1, stop_here)
    assert ends[0] == f"no answer; exit code {HUNG}"
    assert (failure.kind, failure.rank) == ("hang", 1)


def get_on_slowly(here):
    watchdog.GRACE = 0.1
    with Watchdog(here, limit=LIMIT) as watch:
        for step in range(6):
            watch.at("training", "vamp2", 0, step)
            time.sleep(LIMIT / 4)
            here.barrier()
    watch.at("final evaluation")
    time.sleep(LIMIT + 3 * watchdog.GRACE)  # nobody watches any more
    return [thread.name for thread in threading.enumerate() if thread.name == "watchdog"]


@pytest.mark.slow
def test_slow_ranks_that_get_on_are_left_alone_and_the_watch_ends_with_the_run(run_ranks):
    assert run_ranks(2, get_on_slowly) == [[], []]


def fail_inside(here):
    watchdog.GRACE = 0.1
    try:
        with Watchdog(here, limit=LIMIT):
            raise ArithmeticError
    except ArithmeticError:
        time.sleep(LIMIT + 3 * watchdog.GRACE)
        return threading.active_count()


def test_the_watch_ends_with_a_run_that_fails(run_ranks):
    assert run_ranks(1, fail_inside) == [1]


def beat(here, folder):
    """The heartbeats of three stages, and the second of one stage."""
    watchdog.BEAT = 0.1
    run_dir, beats = RunDir(folder), []
    with Watchdog(here, limit=5) as watch:
        watch.run_dir = RunDir(folder / "not there")  # is survived
        time.sleep(0.6)
        watch.run_dir = run_dir
        for stage in ("preflight", "training", "training"):
            watch.at(stage, "vamp2", 1, len(beats))
            while not run_dir.heartbeat_json.exists() or read_json(run_dir.heartbeat_json)["step"] < len(beats):
                time.sleep(0.01)
            beats.append(read_json(run_dir.heartbeat_json))
    return beats


def test_a_heartbeat_says_that_rank_0_lives_and_where_it_is(run_ranks, tmp_path):
    (beats,) = run_ranks(1, beat, tmp_path)
    assert [one["stage"] for one in beats] == ["preflight", "training", "training"]
    assert {"phase": "vamp2", "epoch": 1, "step": 2, "limit": 5, "node": os.uname().nodename}.items() <= beats[
        2
    ].items()
    assert beats[0]["time"] < beats[1]["time"] < beats[2]["time"]


def stay_busy_when_asked_to_stop(here, folder):
    log = folder / "0.log"
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
    watchdog.SAVING = 0.3
    with StopRequest() as stop, Watchdog(here, stop, limit=60) as watch:
        watch.at("training", "vamp2", 0, 3)
        signal.raise_signal(signal.SIGTERM)
        while not log.read_text():
            time.sleep(0.05)


def test_a_rank_that_will_be_killed_shows_where_it_was(run_ranks, tmp_path):
    run_ranks(1, stay_busy_when_asked_to_stop, tmp_path)
    said = (tmp_path / "0.log").read_text()
    assert "asked to stop, but no progress since" in said and "stay_busy_when_asked_to_stop" in said


def note_only(here):
    watchdog.GRACE = 0.1
    watch = Watchdog(here)
    watch.limit_to(0.2)
    watch.at("saving", "vamp2", 2, 9)
    time.sleep(1)
    return watch.where, threading.active_count()


def test_unstarted_it_only_notes_where_the_run_is(run_ranks):
    assert run_ranks(1, note_only) == [(Where("saving", "vamp2", 2, 9), 1)]
