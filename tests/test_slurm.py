"""On a real Slurm: what `gdyn submit` hands in trains, stops, goes on, survives, and ends with the same numbers.

Every job is the generated slurm.sbatch, over virtual nodes of this machine. Without Slurm the tests skip; with CI set,
a skip is a failure.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gdyn import attempts
from gdyn.rundir import RunDir
from tests import runs, slurm_cluster
from tests.harness import REPOSITORY, clean_environment
from tests.troubled import TROUBLED, Troubled

pytestmark = pytest.mark.slow
VENV = Path(sys.prefix)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    why = slurm_cluster.missing()
    if why and os.environ.get("CI"):
        pytest.fail(why)
    if why:
        pytest.skip(why)
    cluster = slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster.start()
    cluster.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def expected(run_ranks, folder):
    """expected(ranks): the same run without a scheduler, and without interruption."""
    done = {}

    def get(ranks=2):
        if ranks not in done:
            config = runs.small_run(folder, f"expected{ranks}", split=(ranks, 1))
            done[ranks] = dataclasses.replace(config, engine=Troubled(**vars(config.engine)))
            run_ranks(ranks, runs.run, done[ranks])
        return done[ranks]

    return get


class Job:
    """A run file, submitted."""

    def __init__(self, cluster, folder, name, ranks=2, top=None, **trouble):
        config = runs.small_run(folder, name, split=(ranks, 1))
        content = config.to_dict() | (top or {})
        content["engine"] = {"class_path": TROUBLED, "init_args": content["engine"]["init_args"] | trouble}
        self.cluster, self.config, self.ids = cluster, config, []
        self.dir = RunDir(Path(config.run_dir))
        self.run_file = folder / f"{name}.yaml"
        self.run_file.write_text(yaml.safe_dump(content))

    def submit(self, *options, nodes=2, minutes=6, check=True):
        """`gdyn submit`, as on a login node; returns what it said."""
        command = [sys.executable, "launch/submit.py", "--site", "slurm", f"--nodes={nodes}", f"--time={minutes}"]
        command += ["--signal_seconds=60", f"--env=venv:{VENV}", *options, str(self.run_file)]
        if not any(option.startswith("--ranks_per_node") for option in options):
            command.append("--ranks_per_node=1")
        environ = clean_environment() | self.cluster.environment | {"PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(command, cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, done.stderr
        if done.returncode == 0:
            self.ids = json.loads((self.dir.job / "submission.json").read_text())["jobs"]
        return done.stdout + done.stderr

    def wait(self, seconds=240):
        """Until all its jobs have ended; returns the log."""
        self.cluster.wait(lambda: all(self.cluster.ended(job) for job in self.ids), seconds)
        return self.log()

    def until(self, condition, seconds=120):
        self.cluster.wait(lambda: condition() or self.cluster.ended(self.ids[-1]), seconds, pause=0.05)
        assert condition(), self.log()

    def log(self):
        return "".join(path.read_text() for path in sorted(self.dir.job.glob("*.out")))

    def steps(self):
        return max((record["step"] for record in runs.metrics(self.config)), default=0)

    def attempts(self):
        return [attempt.code for attempt in attempts.read_all(self.dir)]


@pytest.mark.parametrize("mpi", ["none", "pmi2"])
def test_four_ranks_on_two_nodes_meet_with_mpi_and_without(cluster, folder, expected, mpi):
    job = Job(cluster, folder, f"four_{mpi}", ranks=4)
    job.submit("--ranks_per_node=2", f"--mpi={mpi}")
    log = job.wait()
    assert job.attempts() == [0], log
    (start,) = job.dir.starts()
    assert (start["world_size"], start["nodes"], start["job"]) == (4, 2, job.ids[0])
    assert ("mpi4py" in start["launcher"]) == (mpi == "pmi2")
    runs.assert_same(job.config, expected(4))


def test_told_before_its_time_is_up_it_saves_requeues_itself_and_ends_with_the_same_numbers(cluster, folder, expected):
    # Two minutes; Slurm speaks up to a minute early: enough for the start, not for sixteen windows of five seconds.
    job = Job(cluster, folder, "requeued", pause=5.0)
    job.submit("--requeue", minutes=2)
    job.until(lambda: job.attempts() == [75])
    assert "SIGUSR2 received" in job.log()
    patient = yaml.safe_load((job.dir.job / "run.yaml").read_text())
    patient["engine"]["init_args"]["pause"] = 0.0
    (job.dir.job / "run.yaml").write_text(yaml.safe_dump(patient))
    log = job.wait()
    assert job.attempts() == [75, 0], log
    assert "resuming from checkpoint" in log and "putting job" in log
    runs.assert_same(job.config, expected())


def test_a_chain_hands_over_twice_and_ends_when_the_run_is_finished(cluster, folder, expected):
    """Four jobs; the first two are told to stop by hand, so that nobody has to wait for their time to be up."""
    job = Job(cluster, folder, "chain", pause=0.4)
    job.submit("--chain=4")
    assert len(job.ids) == 4
    for stops, step in ((1, 3), (2, 8)):
        job.until(lambda step=step: job.steps() >= step)
        cluster.run("scancel", "--batch", "--signal=USR2", job.ids[stops - 1])
        job.until(lambda stops=stops: job.attempts() == [75] * stops)
    log = job.wait()
    assert job.attempts() == [75, 75, 0], log
    assert f"cancelling {job.ids[3]}: the run is finished" in log
    runs.assert_same(job.config, expected())


def test_cancelled_it_loses_nothing_beyond_the_last_checkpoint_and_goes_on_when_submitted_again(
    cluster, folder, expected
):
    job = Job(cluster, folder, "cancelled", pause=0.4)
    job.submit()
    job.until(lambda: job.steps() >= 6)
    assert "still" in job.submit(check=False)  # two jobs must not train in one folder
    cluster.run("scancel", job.ids[0])
    job.wait()
    assert runs.store(job.config).whole()[0].position.step >= 4
    job.submit()
    log = job.wait()
    assert "resuming from checkpoint" in log
    runs.assert_same(job.config, expected())


def test_a_killed_rank_is_named_with_the_stacks_of_the_others_and_the_run_starts_again(cluster, folder, expected):
    job = Job(cluster, folder, "killed", trouble="kill", at_window=7, once=str(folder / "killed.once"))
    job.submit()
    log = job.wait()
    assert job.attempts() == [1, 0], log
    first = attempts.read_all(job.dir)[0]
    assert first.reason == "rank 1 on n2 (training, phase vamp2, epoch 1, step 6): gone without a word"
    assert "[rank 0 on n1] at training, phase vamp2, epoch 1, step 6" in log and "in _train_window" in log
    runs.assert_same(job.config, expected())


def test_a_hung_rank_is_named_with_its_stack_and_the_run_starts_again(cluster, folder, expected):
    trouble = {"trouble": "hang", "at_window": 7, "once": str(folder / "hung.once")}
    job = Job(cluster, folder, "hung", top={"hang_timeout": 15.0}, **trouble)
    job.submit()
    log = job.wait()
    assert job.attempts() == [71, 0], log
    assert "rank 1 on n2 is in make_trouble" in log and "[rank 1 on n2]     time.sleep(1)" in log
    runs.assert_same(job.config, expected())


def test_an_error_that_would_come_again_is_not_tried_for_ever(cluster, folder):
    job = Job(cluster, folder, "hopeless", trouble="raise", at_window=2)
    job.submit("--chain=2")
    log = job.wait()
    assert job.attempts() == [1, 1], log
    assert "failed twice in the same way (error at step 1: ArithmeticError: one apple too many)" in log
    assert f"cancelling {job.ids[1]}" in log


def test_a_spare_node_steps_in_for_one_that_goes_down_and_then_the_world_gets_smaller(cluster, folder, expected):
    job = Job(cluster, folder, "spare", pause=0.5)
    job.submit("--spares=1")
    try:
        for node, step in (("n2", 5), ("n3", 9)):
            job.until(lambda step=step: job.steps() >= step)
            cluster.node_down(node)
        log = job.wait()
    finally:
        for node in ("n2", "n3"):
            cluster.node_up(node)
    made = attempts.read_all(job.dir)
    assert [attempt.nodes for attempt in made] == [["n1", "n2"], ["n1", "n3"], ["n1"]], log
    assert made[-1].code == 0 and "the world gets smaller" in log
    # The global batch stays: one rank does in two micro-batches what two ranks did in one.
    assert {start["world_size"] for start in job.dir.starts()} == {1, 2}
    found, reference = runs.metrics(job.config), runs.metrics(expected())
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in reference], rel=1e-5)


def test_an_ensemble_of_seeds_ends_with_one_table(cluster, folder):
    job = Job(cluster, folder, "ensemble", ranks=1)
    job.submit("--array=seeds=2", nodes=1)
    log = job.wait()
    table = (job.dir.job / "comparison.csv").read_text()
    assert {"seed1234", "seed1235"} <= set(table.replace(",", "\n").split()), table
    assert log.count("seed1234") >= 1 and "seed" in table.splitlines()[0]
