"""The rank at fault is on record: the first that failed, whoever else fails of it; and where each of them was."""

import functools
import os
import sys
import threading
import time

import pytest

from gdyn import failures
from gdyn.failures import Failure, Where
from gdyn.rundir import RunDir, read_json
from tests.harness import RanksFailed

HERE = Where("training", "vamp2", 1, 6)


def failure(**changes) -> Failure:
    facts = {"kind": "error", "rank": 1, "node": "n2", "where": HERE, "error": "ValueError: no"}
    return Failure(**facts | changes)


def test_a_failure_is_the_same_again_on_another_rank_and_another_one_at_another_step():
    again = failure(rank=3, node="n4")
    others = [failure(where=Where("training", "vamp2", 1, 7)), failure(kind="died"), failure(error="ValueError: yes")]
    assert failure().signature == again.signature == "error at step 6: ValueError: no"
    assert failure().signature not in [other.signature for other in others]


def test_a_failure_says_who_and_where():
    assert str(failure()) == "rank 1 on n2 (training, phase vamp2, epoch 1, step 6): ValueError: no"
    assert str(failure(rank=None, node="", where=Where())) == "another rank (starting): ValueError: no"


def test_a_record_is_read_as_it_was_written_and_damage_is_no_failure(tmp_path):
    run_dir = RunDir(tmp_path)
    assert failures.read(run_dir) is None
    failures._record(run_dir, failure())
    assert failures.read(run_dir) == failure()
    for damaged in ("", '{"kind": "er', "[]", '{"time": 1, "kind": "error"}'):
        run_dir.failure_json.write_text(damaged)
        assert failures.read(run_dir) is None


def test_the_first_record_stays_unless_it_names_no_rank(tmp_path):
    run_dir = RunDir(tmp_path)
    for record, known in [
        (failure(kind="died", rank=None), failure(kind="died", rank=None)),
        (failure(rank=2), failure(rank=2)),
        (failure(rank=None), failure(rank=2)),
        (failure(rank=3), failure(rank=2)),
    ]:
        failures._record(run_dir, record)
        assert failures.read(run_dir) == known


def test_where_there_is_no_run_folder_nothing_is_recorded(tmp_path):
    failures._record(RunDir(tmp_path / "none"), failure())
    assert list(tmp_path.iterdir()) == []


def test_a_place_is_the_innermost_line_of_code():
    frame = sys._getframe()
    assert failures.place(frame) == f"is in {frame.f_code.co_name} (test_failures.py:{frame.f_lineno})"


# ---- real ranks


def fall_over(here, folder, kind, who):
    """Rank `who` gets into trouble, the others are in a collective; every rank that still can reports. What the ranks
    said is in `folder`, one file each."""
    os.dup2(os.open(folder / f"{here.rank}.log", os.O_CREAT | os.O_WRONLY), 2)
    failures.roll_call = functools.partial(failures.roll_call, timeout_s=1)  # two ranks answer sooner than thousands
    try:
        if here.rank == who:
            if kind == "die":
                os._exit(3)
            raise ArithmeticError("one apple\ntoo many")
        here.barrier()
    except Exception as error:
        failures.report(RunDir(folder), here, HERE, error)
        raise


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(
    ("kind", "recorded", "what"),
    [("raise", "error", "ArithmeticError: one apple too many"), ("die", "died", "gone without a word")],
)
def test_of_two_ranks_the_one_at_fault_is_named_and_both_say_where_they_were(
    run_ranks, tmp_path, kind, recorded, what, who
):
    with pytest.raises(RanksFailed):
        run_ranks(2, fall_over, tmp_path, kind, who)
    found = failures.read(RunDir(tmp_path))
    assert (found.kind, found.rank, found.where, found.error) == (recorded, who, HERE, what)
    assert found.node == os.uname().nodename
    other = (tmp_path / f"{1 - who}.log").read_text()
    assert f"at {HERE}" in other and "here.barrier()" in other
    assert all(line.startswith(f"[rank {1 - who} on ") for line in other.splitlines() if "barrier" in line)
    if kind == "raise":
        assert "raise ArithmeticError" in (tmp_path / f"{who}.log").read_text()


def test_alone_an_error_is_ones_own_even_if_it_speaks_of_connections(run_ranks, tmp_path):
    with pytest.raises(RanksFailed):
        run_ranks(1, fall_over, tmp_path, "raise", 0)
    assert failures.read(RunDir(tmp_path)).rank == 0
    assert read_json(RunDir(tmp_path).failure_json)["time"] > 0


def waits_or_works(here):
    """On rank 0: where its main thread is while it waits for rank 1."""
    seen = []

    def look():
        while not (seen and seen[-1].startswith("waits")):
            time.sleep(0.05)
            seen.append(failures.place(sys._current_frames()[threading.main_thread().ident]))
        here.store.set("seen", "")

    if here.main:
        threading.Thread(target=look, daemon=True).start()
    else:
        here.store.wait(["seen"])
    here.barrier()
    return seen[-1:] if here.main else []


def test_a_rank_in_a_collective_waits(run_ranks):
    assert run_ranks(2, waits_or_works)[0] == ["waits for the other ranks in all_reduce"]
