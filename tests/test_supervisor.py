"""The supervisor: what it makes of each way an attempt can end, and that nothing survives it.

It runs as a job script starts it, in a process of its own, above a stand-in for launcher and ranks that writes the
files ranks write. Decisions that need a queue are put to it directly; tests/test_slurm.py has the real one.
"""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from gdyn import supervisor
from gdyn.attempts import Attempt, earlier_verdict, read_all
from gdyn.errors import UserError
from gdyn.rundir import DONE, FAILED, HUNG, STOPPED, USER_ERROR, RunDir, read_json, write_json
from gdyn.supervisor import Order, Supervisor
from tests.harness import REPOSITORY, clean_environment

STAND_IN = '''
"""Stands for a launcher and its ranks. On the n-th start it does what line n of the script says."""
import json, os, signal, sys, time
from pathlib import Path
from gdyn import rundir

run_dir, (nodes, ranks, hosts), options = rundir.RunDir(Path(sys.argv[1])), sys.argv[2:5], sys.argv[5:]
here = Path(__file__).parent
with (here / "starts.jsonl").open("a") as file:
    start = {"nodes": nodes, "ranks": ranks, "hosts": Path(hosts).read_text().split(), "options": options}
    file.write(json.dumps(start) + "\\n")
number = len((here / "starts.jsonl").read_text().splitlines())

def beat(step=0):
    where = {"stage": "training", "phase": "vamp2", "epoch": 0, "step": step}
    rundir.write_json(run_dir.heartbeat_json, {"time": time.time(), "node": "n1"} | where)

def begin(accumulation=1):
    rundir.write_json(run_dir.deepspeed_json, {"gradient_accumulation_steps": accumulation})
    run_dir.begin_start({"world_size": int(ranks)})

def checkpoint(tag):
    (run_dir.checkpoints / "latest").write_text(tag)

def done():
    run_dir.write_status(0, "finished")

def stopped():
    run_dir.write_status(75, "stopped early")
    sys.exit(75)

def user_error():
    run_dir.write_status(2, "no such file")
    sys.exit(2)

def blame(*names):
    rundir.write_json(run_dir.preflight_json, {"blamed": names})
    run_dir.write_status(2, "preflight refuses")
    sys.exit(2)

def fail(kind="error", rank=1, node="n2", step=3, error="one apple too many", launcher=1):
    from gdyn import failures

    where = failures.Where("training", "vamp2", 0, step)
    failures._record(run_dir, failures.Failure(kind, rank, node, where, error))
    run_dir.write_status(1, "failed")
    sys.exit(launcher)

def show(name, text=""):
    rundir.write_text(here / name, text or str(os.getpid()))

def sleep():
    while True:
        time.sleep(60)

def forget():
    """A process in a session of its own, whose parent has gone: no launcher finds it."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            show("orphan")
            sleep()
        os._exit(0)
    os.wait()
    while not (here / "orphan").exists():
        time.sleep(0.01)

def listening(needed, before=lambda: None, after=lambda: None):
    """Stop like a rank, once it has been told `needed` times; note how often it was told when."""
    told = []
    signal.signal(signal.SIGUSR2, lambda *_: told.append(1))
    show("up")
    before()
    early = len(told)
    beat()
    while len(told) < needed:
        time.sleep(0.01)
    run_dir.write_status(75, "stopped early")
    count = len(told)
    after()
    show("told", json.dumps({"early": early, "late": len(told) - count}))
    os._exit(75)

def launcher_of(rank):
    """A launcher that would die of USR2, as torchrun and deepspeed do."""
    pid = os.fork()
    if pid == 0:
        rank()
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

exec(json.loads((here / "script.json").read_text())[number - 1])
'''

DRIVER = """
import json, sys
from gdyn import attempts, processes, supervisor
from launch import supervise

for name, value in json.loads(sys.argv[1]).items():
    home = next(module for module in (processes, attempts, supervisor) if hasattr(module, name))
    setattr(home, name, value)
sys.exit(supervise.main(sys.argv[2:]))
"""
"""The supervisor, with other patience."""
PYTHON = [sys.executable, "-S"]  # the standard library is enough, and starts sooner
QUICK = {"POLL": 0.02, "REPEAT": 0.05, "LEFTOVER_PATIENCE": 0.3, "TERM_PATIENCE": 2.0}


class Supervised:
    """A run folder, the script its ranks follow, and the supervisor above."""

    def __init__(self, folder: Path):
        self.folder, self.dir = folder, RunDir(folder / "run")
        (folder / "stand_in.py").write_text(STAND_IN)

    def start(self, *script, nodes=2, hosts=("n1", "n2"), options=(), **patience):
        (self.folder / "script.json").write_text(json.dumps(script))
        (self.folder / "starts.jsonl").unlink(missing_ok=True)
        (self.folder / "hosts").write_text("\n".join(hosts))
        ranks = [*PYTHON, self.folder / "stand_in.py", self.dir.path, "{nodes}", "{ranks}", "{hosts}"]
        arguments = ["--run_dir", self.dir.path, f"--nodes={nodes}", "--ranks_per_node=1", *options, "--", *ranks]
        self.process = subprocess.Popen(
            [*PYTHON, "-c", DRIVER, json.dumps(QUICK | patience), *map(str, arguments)],
            cwd=REPOSITORY,
            env=clean_environment() | {"GDYN_HOSTFILE": str(self.folder / "hosts"), "PYTHONPATH": str(REPOSITORY)},
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self) -> int:
        """The exit code; what it said is in `said`."""
        try:
            _, self.said = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        return self.process.returncode

    def run(self, *script, **settings) -> int:
        self.start(*script, **settings)
        return self.finish()

    def wait_for(self, name: str) -> str:
        """What the stand-in shows in a file."""
        path = self.folder / name
        while not path.exists():
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)
        return path.read_text()

    @property
    def starts(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "starts.jsonl").read_text().splitlines()]

    @property
    def attempts(self) -> list[Attempt]:
        return read_all(self.dir)

    @property
    def hosts(self) -> list[list[str]]:
        return [start["hosts"] for start in self.starts]

    @property
    def options(self) -> list[list[str]]:
        return [start["options"] for start in self.starts]


@pytest.fixture
def job(tmp_path):
    return Supervised(tmp_path)


def gone(pid: str) -> bool:
    try:
        return psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# ---- how an attempt ends


@pytest.mark.parametrize(("line", "code"), [("done()", 0), ("stopped()", 75), ("user_error()", 2)])
def test_a_run_that_is_done_stopped_or_the_users_to_mend_is_not_started_again(job, line, code):
    assert job.run(line) == code
    assert len(job.starts) == 1
    assert [attempt.code for attempt in job.attempts] == [code]


def test_after_a_failure_the_ranks_are_started_again_and_told_where(job):
    assert job.run("fail()", "done()", hosts=("n1", "n2", "n3")) == DONE
    assert job.starts == 2 * [{"nodes": "2", "ranks": "2", "hosts": ["n1", "n2"], "options": []}]
    first = job.attempts[0]
    assert first.reason == "rank 1 on n2 (training, phase vamp2, epoch 0, step 3): one apple too many"
    assert (first.code, first.node, first.final, job.attempts[1].final) == (FAILED, "n2", "", "the run is finished")


def test_the_same_failure_twice_ends_it(job):
    assert job.run(*3 * ["fail()"]) == FAILED
    assert len(job.starts) == 2
    assert "failed twice in the same way (error at step 3: one apple too many), so it would again" in job.said


def test_different_failures_are_tried_as_often_as_allowed(job):
    script = [f"fail(step={step}, node='n{step % 2}')" for step in range(9)]
    assert job.run(*script, hosts=("n1", "n2"), options=["--max_restarts=2"]) == FAILED
    assert len(job.starts) == 3
    assert "2 restarts were allowed (--max_restarts)" in job.said


@pytest.mark.parametrize("launcher", [0, 143])
def test_the_ranks_verdict_counts_and_not_the_launchers(job, launcher):
    assert job.run(f"fail(launcher={launcher})", "done()") == DONE
    assert [attempt.code for attempt in job.attempts] == [FAILED, DONE]
    assert job.run(f"run_dir.write_status(2, 'no such file'); sys.exit({launcher})") == USER_ERROR
    assert len(job.starts) == 1


@pytest.mark.parametrize(
    ("line", "code", "reason"),
    [
        ("sys.exit(0)", FAILED, "ended without a verdict, the launcher says 0; before the first heartbeat"),
        ("os.kill(os.getpid(), 9)", FAILED, "the launcher died of SIGKILL"),
        (
            "beat(step=4); sys.exit(137)",
            FAILED,
            "says 137; rank 0 on n1 was last heard at training, phase vamp2, step 4",
        ),
        ("begin(); sys.exit(71)", HUNG, "no progress"),
    ],
)
def test_ranks_that_end_without_a_word_have_failed(job, line, code, reason):
    assert job.run(line, line, line) == code
    assert len(job.starts) == 2
    assert reason in job.attempts[0].reason
    status = read_json(job.dir.status_json)
    assert status["exit_code"] == code and reason in status["reason"]


def test_ranks_that_could_not_start_are_the_users_to_mend(job):
    assert job.run("sys.exit(2)") == USER_ERROR
    assert "see their message above" in job.attempts[0].reason


def test_what_an_earlier_attempt_left_is_not_taken_for_this_ones(job):
    assert job.run("beat(); fail()", "sys.exit(1)", "done()") == DONE
    assert "before the first heartbeat" in job.attempts[1].reason
    assert (job.attempts[1].node, job.attempts[1].code) == ("", FAILED)


# ---- which nodes


def test_a_node_that_failed_twice_is_left_out_and_then_the_world_gets_smaller(job):
    script = ["begin(); fail(step=1)", "fail(step=2)", "fail(step=3, node='n3')", "fail(step=4, node='n3')", "done()"]
    assert job.run(*script, hosts=("n1", "n2", "n3"), options=["--max_restarts=9"]) == DONE
    assert job.hosts == [["n1", "n2"], ["n1", "n2"], ["n1", "n3"], ["n1", "n3"], ["n1"]]
    assert "going on without n2." in job.said and "1 of 2 nodes are left: the world gets smaller." in job.said
    assert (job.starts[-1]["nodes"], job.starts[-1]["ranks"]) == ("1", "1")


def test_the_same_failure_twice_on_a_node_is_tried_on_a_spare_one_first(job):
    assert job.run("fail()", "fail()", "done()", hosts=("n1", "n2", "n3")) == DONE
    assert job.hosts[-1] == ["n1", "n3"]
    assert job.run("fail()", "fail()", "fail(node='n3')", "done()", hosts=("n1", "n2", "n3")) == FAILED
    assert len(job.starts) == 3


@pytest.mark.parametrize("hosts", [("n1", "n2", "n3"), ("n1.cluster.org", "n2.cluster.org", "n3.cluster.org")])
def test_a_node_that_preflight_blames_is_left_out(job, hosts):
    assert job.run("blame('n1')", "done()", hosts=hosts) == DONE
    assert job.hosts == [[*hosts[:2]], [*hosts[1:]]]


@pytest.mark.parametrize("names", [("n1", "n2"), ("elsewhere",), ()])
def test_preflight_that_blames_all_nodes_or_none_of_the_jobs_is_the_users_to_mend(job, names):
    assert job.run(f"blame(*{names})") == USER_ERROR
    assert len(job.starts) == 1


def test_preflights_refusals_count_as_attempts(job):
    assert (
        job.run("blame('n1')", "blame('n2')", "blame('n3')", hosts=("n1", "n2", "n3"), options=["--max_restarts=1"])
        == 2
    )
    assert len(job.starts) == 2


def test_an_earlier_preflights_blame_is_forgotten(job):
    job.dir.create()
    write_json(job.dir.preflight_json, {"blamed": ["n1"]})
    assert job.run("user_error()") == USER_ERROR
    assert job.attempts[0].blamed == []


def test_the_global_batch_stays_on_every_smaller_world(job):
    script = ["begin(3); blame('n3', 'n4')", "begin(6); blame('n1')", "begin(12); done()"]
    assert job.run(*script, nodes=4, hosts=("n1", "n2", "n3", "n4")) == DONE
    # 3 micro-batches on each of 4 ranks
    accumulation = "--optimization.gradient_accumulation_steps="
    assert job.options == [[], [f"{accumulation}6"], [f"{accumulation}12"]]


def test_a_global_batch_that_cannot_stay_is_told(job):
    assert job.run("begin(); blame('n3')", "done()", nodes=3, hosts=("n1", "n2", "n3")) == DONE  # 3 of them on 2 ranks
    assert "the global batch changes with the number of ranks" in job.said
    (job.dir.job / "deepspeed.json").write_text('{"gradient_accumulation_steps": 1}')  # the user's own wish
    assert job.run("begin(); blame('n2')", "done()") == DONE
    assert "the global batch changes with the number of ranks" in job.said
    assert job.options == [[], []]


# ---- ranks that do not end


def test_no_rank_outlives_the_job(job):
    assert job.run("forget(); done()") == DONE
    assert gone(job.wait_for("orphan"))


def test_ranks_that_never_give_a_sign_of_life_are_ended_even_if_they_do_not_listen(job):
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN); show('up'); sleep()"
    assert job.run(stubborn, "done()", options=["--start_timeout=1"], TERM_PATIENCE=0.2) == DONE
    first = job.attempts[0]
    assert (first.code, first.reason) == (HUNG, "no sign of life from rank 0 for 1 s")
    assert gone(job.wait_for("up"))


@pytest.mark.slow
def test_a_rank_0_that_falls_silent_is_given_up_and_one_that_goes_on_is_not(job):
    beating = "[(beat(i), time.sleep(0.1)) for i in range(15)]; done()"
    assert job.run("beat(); sleep()", beating, SILENCE=1.0) == DONE
    assert [attempt.reason for attempt in job.attempts] == ["no sign of life from rank 0 for 1 s", "finished"]


def test_a_finished_run_may_take_its_time_for_the_report(job):
    assert job.run("beat(); done(); time.sleep(1)", SILENCE=0.1, LEAVING=0.1) == DONE


@pytest.mark.parametrize(("line", "code"), [("fail(launcher=1)", FAILED), ("stopped()", STOPPED)])
def test_a_launcher_that_stays_after_the_ranks_verdict_is_ended(job, line, code):
    stays = f"beat()\ntry:\n    {line}\nfinally:\n    show('up'); sleep()"
    assert job.run(stays, "done()", options=["--max_restarts=0"], LEAVING=0.2) == code
    assert job.attempts[0].code == code
    assert gone(job.wait_for("up"))


# ---- being told to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_stop_reaches_ranks_that_listen_past_a_launcher_that_would_die_of_it(job, number):
    job.start("launcher_of(lambda: listening(needed=1))")
    job.wait_for("up")
    job.process.send_signal(number)
    assert job.finish() == STOPPED
    assert [attempt.code for attempt in job.attempts] == [STOPPED]
    assert f"{number.name} received: asking the ranks to stop." in job.said


def test_ranks_are_told_from_the_first_heartbeat_on_until_they_have_decided_and_no_longer(job):
    job.start("listening(needed=3, before=lambda: time.sleep(0.5), after=lambda: time.sleep(0.3))")
    job.wait_for("up")
    job.process.send_signal(signal.SIGTERM)
    assert job.finish() == STOPPED
    assert json.loads(job.wait_for("told")) == {"early": 0, "late": 0}


def test_a_failure_after_a_stop_was_asked_for_is_left_to_the_successor(job):
    job.start("show('up')\nwhile not (here / 'now').exists(): time.sleep(0.01)\nfail()", "done()")
    job.wait_for("up")
    job.process.send_signal(signal.SIGTERM)
    (job.folder / "now").touch()
    assert job.finish() == STOPPED
    assert len(job.starts) == 1


def test_a_second_interrupt_does_not_wait_for_a_checkpoint_and_leaves_nobody_behind(job):
    job.start("show('up'); forget(); sleep()")
    pid, orphan = job.wait_for("up"), job.wait_for("orphan")
    while not gone(pid):  # two at once may become one
        job.process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert job.finish() == 128 + signal.SIGINT
    assert gone(orphan)


# ---- one start after the other


def test_two_starts_without_a_step_of_progress_end_the_chain(job):
    assert job.run("checkpoint('one'); stopped()") == STOPPED
    assert job.run("checkpoint('two'); stopped()") == STOPPED
    assert job.run("stopped()") == FAILED
    assert "the wall time is too short for this run" in job.said


def test_a_history_cut_short_by_a_kill_does_not_break_the_next_start(job):
    assert job.run("checkpoint('one'); stopped()") == STOPPED
    path = job.dir.job / "attempts.jsonl"
    path.write_text(path.read_text() + path.read_text()[:40])
    assert job.run("done()") == DONE
    assert [attempt.code for attempt in job.attempts] == [STOPPED, DONE]


@pytest.mark.parametrize("damaged", ["submission.json", "deepspeed.json"])
def test_other_files_cut_short_do_not_break_a_start_either(job, damaged):
    job.dir.job.mkdir(parents=True)
    (job.dir.job / damaged).write_text('{"jobs": ["1')
    assert job.run("begin(); blame('n2')", "done()") == DONE


# ---- what a user may get wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: --run_dir, --nodes, --ranks_per_node"),
        (("--nodes=0",), "--nodes: 0 is not a number of at least 1"),
        (("--run_dir=run", "--nodes=1", "--ranks_per_node=1"), "required: -- COMMAND"),
        (("--run_dir=run", "--nodes=2", "--ranks_per_node=1", "--", "true"), "the job has 1 nodes, the run asks for 2"),
        (("--run_dir=run", "--nodes=1", "--ranks_per_node=1", "--", "mpirum"), "mpirum, which is to start the ranks"),
        (("--run_dir=file/run", "--nodes=1", "--ranks_per_node=1", "--", "true"), "file/run cannot be written"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tmp_path, arguments, message):
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, REPOSITORY / "launch" / "supervise.py", *arguments],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == USER_ERROR
    assert message in done.stderr and "Traceback" not in done.stderr


# ---- decisions that need a queue


class Queue:
    """A scheduler that notes what it is asked."""

    name = "slurm"

    def __init__(self, hosts=("n1", "n2"), job="7", left=None, down=()):
        self.hosts, self.job, self.left, self.down = list(hosts), job, left, set(down)
        self.cancelled, self.requeued = [], []

    def cancel(self, ids):
        self.cancelled += ids

    def requeue(self, job):
        self.requeued.append(job)

    def job_id(self, environ):
        return self.job

    def end_time(self, environ):
        return self.left and time.time() + self.left

    def node_names(self, environ):
        return list(self.hosts)

    def nodes_down(self, names, job):
        return self.down & set(names)


@pytest.fixture
def decide(tmp_path, monkeypatch):
    """decide(queue, attempts..., told="", ...): the supervisor after its attempts, and what it made of the last."""
    monkeypatch.setattr(supervisor.time, "sleep", lambda seconds: None)
    run_dir = RunDir(tmp_path)
    run_dir.job.mkdir()
    write_json(run_dir.job / "submission.json", {"jobs": ["6", "7", "8", "9"]})

    def decide(queue, *attempts, told="", **order):
        above = Supervisor(Order(run_dir, 2, 1, ("true",), **order), queue, {})
        above.told = told
        for attempt in attempts:
            above.attempts.append(attempt)
            code = above._decide(attempt)
        return above, code

    return decide


def ended(code, **facts):
    return replace(Attempt("7", ["n1", "n2"], 0.0, 1.0, code, "a reason", signature="a reason"), **facts)


SOON, LATER = 10, 100_000
"""Seconds left to the job."""


@pytest.mark.parametrize(
    ("told", "left", "requeued"),
    [
        ("", LATER, ["7"]),  # the ranks knew the end of their time
        ("SIGUSR2", LATER, ["7"]),
        ("SIGTERM", SOON, ["7"]),
        ("SIGTERM", LATER, []),  # scancel, or a preemption after which the scheduler requeues
        ("SIGTERM", None, []),
    ],
)
def test_a_stopped_run_goes_back_into_the_queue_unless_somebody_cancelled_it(decide, told, left, requeued):
    queue = Queue(left=left)
    assert decide(queue, ended(STOPPED), told=told, requeue=True)[1] == STOPPED
    assert (queue.requeued, queue.cancelled) == (requeued, [])


def test_a_stopped_run_of_a_chain_goes_on_in_the_next_job(decide):
    queue = Queue()
    assert decide(queue, ended(STOPPED), told="SIGUSR2")[1] == STOPPED
    assert (queue.requeued, queue.cancelled) == ([], [])


@pytest.mark.parametrize("codes", [(DONE,), (USER_ERROR,), (FAILED, FAILED), (STOPPED, STOPPED)])
def test_what_ends_for_good_cancels_its_successors_and_none_starts_that_could_not_be_cancelled(decide, codes):
    queue = Queue()
    above, code = decide(queue, *map(ended, codes))
    assert code == (FAILED if codes[-1] == STOPPED else codes[-1])
    assert queue.cancelled == ["8", "9"]
    assert Supervisor(replace(above.order, command=("false",)), Queue(job="8"), {}).run() == code
    assert len(read_all(above.run_dir)) == len(codes)


def test_successors_that_cannot_be_cancelled_are_no_reason_to_fail(decide, monkeypatch):
    def refuse(self, ids):
        raise UserError("scancel does not answer")

    monkeypatch.setattr(Queue, "cancel", refuse)
    assert decide(Queue(), ended(DONE))[1] == DONE


def test_a_failure_near_the_end_of_the_job_is_left_to_the_successor_which_takes_it_up(decide):
    above, code = decide(Queue(left=SOON), ended(FAILED))
    assert code == STOPPED
    assert earlier_verdict(above.run_dir, "8") is None
    assert decide(Queue(left=LATER), ended(FAILED, signature="another"))[1] is None


def test_a_job_that_was_killed_between_two_attempts_does_not_end_the_chain(decide):
    above, code = decide(Queue(left=LATER), ended(FAILED))
    assert code is None
    assert earlier_verdict(above.run_dir, "8") is None


def test_nodes_that_are_down_are_left_out(decide):
    above, code = decide(Queue(hosts=("n1", "n2", "n3"), down=("n1",)), ended(FAILED))
    assert (code, above.hosts) == (None, ["n2", "n3"])


def test_if_all_nodes_are_said_to_be_down_all_are_tried(decide):
    above, code = decide(Queue(down=("n1", "n2")), ended(FAILED))
    assert (code, above.hosts) == (None, ["n1", "n2"])


def test_a_node_is_known_with_and_without_its_domain(decide):
    above, code = decide(
        Queue(hosts=("n1.cm.org", "n2.cm.org", "n3.cm.org")),
        ended(FAILED, node="n2", signature="one"),
        ended(FAILED, node="n2", signature="two"),
    )
    assert (code, above.hosts) == (None, ["n1.cm.org", "n3.cm.org"])


def test_rank_0s_address_is_handed_over_only_where_its_name_means_nothing(decide, monkeypatch):
    monkeypatch.setattr(Queue, "address", lambda self, name: "10.0.0.7", raising=False)
    above, _ = decide(Queue(), ended(FAILED))
    assert above._environment(["nowhere.invalid"]) == {"MASTER_ADDR": "10.0.0.7"}
    assert above._environment(["localhost"]) == {}
    above.environ = {"MASTER_ADDR": "given"}
    assert above._environment(["nowhere.invalid"]) == {"MASTER_ADDR": "given"}
