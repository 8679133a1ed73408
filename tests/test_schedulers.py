"""Schedulers: node lists and environments as they were recorded, programs that answer, fail, or are not there."""

import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from gdyn import schedulers
from gdyn.errors import UserError
from gdyn.schedulers import NoScheduler, Pbs, Slurm


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make stand-ins for a scheduler's programs: programs(sbatch="echo 12"). Returns the file their arguments go to."""
    folder, log = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(**bodies: str) -> Path:
        for name, body in bodies.items():
            (folder / name).write_text(f'#!/bin/bash\necho {name} "$@" >>{log}\n{body}\n')
            (folder / name).chmod(0o755)
        return log

    return make


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-2]", ["n1", "n2"]),
        ("n[01-03,7],m1", ["n01", "n02", "n03", "n7", "m1"]),
        ("r[1-2]n[08-10]-ib", [f"r{r}n{n}-ib" for r in "12" for n in ("08", "09", "10")]),
        ("nid[001000-001001,002000]", ["nid001000", "nid001001", "nid002000"]),
        ("a-b,c", ["a-b", "c"]),
    ],
)
def test_node_lists_expand(text: str, names: list[str]) -> None:
    assert schedulers.expand(text) == names


def test_all_of_frontier_expands_in_order() -> None:
    names = schedulers.expand("frontier[00001-09472]")
    assert len(names) == 9472 and names == sorted(names) and names[-1] == "frontier09472"


@pytest.mark.parametrize("text", ["n[", "n[1-]", "a,,b", "n[a-b]", "n]1["])
def test_a_garbled_node_list_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="cannot be understood"):
        schedulers.expand(text)


def test_scheduler_is_known_by_its_job_variable() -> None:
    assert schedulers.around({"SLURM_JOB_ID": "7"}) == Slurm()
    assert schedulers.around({"PBS_JOBID": "7.aurora"}) == Pbs()
    assert schedulers.around({}) == NoScheduler()


def test_slurm_submits_with_a_dependency(programs) -> None:
    calls = programs(sbatch="echo a wrapper greets; echo '42;cluster'")
    assert Slurm().submit(Path("/x/job.sbatch"), "41") == "42"
    assert calls.read_text() == "sbatch --parsable --dependency=afterany:41 /x/job.sbatch\n"


def test_pbs_submits_with_a_dependency(programs) -> None:
    calls = programs(qsub="echo 42.aurora-pbs")
    assert Pbs().submit(Path("/x/job.pbs"), "41.aurora-pbs") == "42.aurora-pbs"
    assert calls.read_text() == "qsub -W depend=afterany:41.aurora-pbs /x/job.pbs\n"


def test_a_refusal_is_passed_on_in_the_schedulers_words(programs) -> None:
    programs(sbatch="echo 'sbatch: error: Invalid account' >&2; exit 1", qsub="echo what")
    with pytest.raises(UserError, match="exit code 1: sbatch: error: Invalid account"):
        Slurm().submit(Path("job.sbatch"))
    with pytest.raises(UserError, match='qsub answered "what"'):
        Pbs().submit(Path("job.pbs"))


def test_a_missing_or_silent_program_is_an_error_in_bounded_time(programs, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        with pytest.raises(UserError, match="sbatch is not on PATH"):
            Slurm().submit(Path("job.sbatch"))
    programs(squeue="exec sleep 30", sinfo="exec sleep 30")
    monkeypatch.setattr(schedulers, "TIMEOUT_S", 0.2)
    with pytest.raises(UserError, match="has not answered"):
        Slurm().queued(["1"])
    assert Slurm().nodes_down(["n1"], "7") is None


def test_slurm_knows_which_jobs_are_alive_arrays_included(programs) -> None:
    programs(squeue="echo '12 12'; echo '13_4 13'; echo '14_[0-3] 14'")
    assert Slurm().queued(["11", "12", "13", "14"]) == ["12", "13", "14"]


def test_nobody_is_asked_about_no_jobs() -> None:
    assert Slurm().queued([]) == Pbs().queued([]) == []
    Slurm().cancel([])


def test_pbs_knows_which_jobs_are_alive_and_cancels_only_those(programs) -> None:
    jobs = '{"Jobs": {"12.a": {"job_state": "R"}, "13[].a": {"job_state": "B"}, "14.a": {"job_state": "F"}}}'
    calls = programs(qstat=f"echo '{jobs}'", qdel="")
    assert Pbs().queued(["12.a", "13[].a", "14.a", "15.a"]) == ["12.a", "13[].a"]
    Pbs().cancel(["12.a", "14.a"])
    assert calls.read_text().splitlines()[-1] == "qdel 12.a"


def test_slurm_tells_when_the_job_ends(programs) -> None:
    assert Slurm().end_time({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1800000000"}) == 1.8e9
    programs(squeue="echo 2026-11-24T12:00:00")
    assert Slurm().end_time({"SLURM_JOB_ID": "7"}) == datetime(2026, 11, 24, 12).timestamp()
    programs(squeue="echo N/A")
    assert Slurm().end_time({"SLURM_JOB_ID": "7"}) is None


def test_pbs_tells_when_the_job_ends(programs) -> None:
    facts = '"Resource_List": {"walltime": "02:00:00"}, "resources_used": {"walltime": "00:30:00"}'
    programs(qstat=f'echo \'{{"Jobs": {{"7.a": {{{facts}}}}}}}\'')
    end = Pbs().end_time({"PBS_JOBID": "7.a"})
    assert end is not None and abs(end - time.time() - 5400) < 60
    programs(qstat="echo '{}'")
    assert Pbs().end_time({"PBS_JOBID": "7.a"}) is None


def test_without_a_scheduler_the_script_says_when_it_ends() -> None:
    assert NoScheduler().end_time({"GDYN_END_TIME": "1800000000"}) == 1.8e9
    assert NoScheduler().end_time({}) is None


def test_nodes_come_from_list_file_or_this_machine(tmp_path: Path) -> None:
    assert Slurm().node_names({"SLURM_JOB_NODELIST": "n[1-2]"}) == ["n1", "n2"]
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\nx1.hsn\nx1.hsn\n\nx2:4 slots=4\nx3 slots=4\n")
    assert Pbs().node_names({"PBS_NODEFILE": str(hosts)}) == ["x1.hsn", "x2", "x3"]
    assert NoScheduler().node_names({"GDYN_HOSTFILE": str(hosts)}) == ["x1.hsn", "x2", "x3"]
    assert NoScheduler().node_names({}) == ["localhost"]
    for scheduler in (Slurm(), Pbs()):
        with pytest.raises(UserError, match="is not set"):
            scheduler.node_names({})


def test_nodes_that_are_down_are_named(programs) -> None:
    programs(
        sinfo="echo 'n1 allocated'; echo 'n2 down*'; echo 'n3 allocated*'; echo 'n4 draining'",
        squeue="echo 'n[1-4]'",
        pbsnodes="echo 'x2  offline,down'",
    )
    # n5 is up again, but no longer the job's
    assert Slurm().nodes_down(["n1", "n2", "n3", "n4", "n5"], "7") == {"n2", "n3", "n5"}
    assert Pbs().nodes_down(["x1.hsn", "x2.hsn"], "7") == {"x2.hsn"}
    assert NoScheduler().nodes_down(["n1"], "7") is None


def test_requeue_is_slurms_alone(programs) -> None:
    calls = programs(scontrol="")
    Slurm().requeue("7")
    assert calls.read_text() == "scontrol requeue 7\n"
    for scheduler in (Pbs(), NoScheduler()):
        with pytest.raises(UserError, match="requeue"):
            scheduler.requeue("7")


def test_without_a_scheduler_a_job_is_a_process_of_ours() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()", "supervise.py"], stdin=subprocess.PIPE)
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert NoScheduler().queued([str(child.pid), str(stranger.pid), "0", "none"]) == [str(child.pid)]
        assert NoScheduler().queued([str(os.getpid())]) == []
        NoScheduler().cancel([str(child.pid)])
        assert child.wait(10) != 0
    finally:
        for process in (child, stranger):
            process.kill()
            process.communicate()
