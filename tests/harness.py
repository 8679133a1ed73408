"""Real ranks for tests: as processes forked from a warm server (`run_ranks`) or by a real launcher (`launch`)."""

import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent

TEST_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "TORCHDYNAMO_DISABLE": "1",  # no compiler needed, and two seconds less in every deepspeed.initialize
    "GDYN_RENDEZVOUS_S": "30",
}
_RANK_PREFIXES = ("OMPI_", "PMI_", "PMIX_", "PALS_", "MPI_LOCAL", "JSM_", "SLURM_", "TORCHELASTIC_", "MV2_", "GDYN_")
_RANK_NAMES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_SIZE", "CROSS_RANK"}
_RANK_NAMES |= {"MASTER_ADDR", "MASTER_PORT"}

# What a rank imports before it can train; loaded once, in the server every rank is forked from (5 s).
_PRELOAD = [
    "torch",
    "torch._dynamo",
    "deepspeed",
    "deepspeed.comm",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "torch.utils.tensorboard",
    "gdyn.trainer",
    "gdyn.report",
]


def clean_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`environ` as if no launcher had started us, with the test settings."""
    kept = {k: v for k, v in environ.items() if k not in _RANK_NAMES and not k.startswith(_RANK_PREFIXES)}
    return kept | TEST_ENVIRONMENT


class RanksFailed(AssertionError):
    """At least one rank raised or died. `errors`: rank -> its exception (RuntimeError if it died or hung)."""

    def __init__(self, errors: dict[int, BaseException], report: str):
        super().__init__(report)
        self.errors = errors


@dataclass(frozen=True)
class _Outcome:
    """How one rank ended: a value, or an error with its traceback."""

    value: Any = None
    error: BaseException | None = None
    traceback: str = ""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60, join: bool = True
) -> list[Any]:
    """Call function(here, *args) on `world_size` ranks of one torch.distributed job; return their results by rank.

    function must be importable (module level); args and results picklable. Raises RanksFailed when a rank raises, dies
    or is not done within `timeout` seconds; after a first failure the others get 5 s to end by themselves.
    join=False: only the ranks' variables are set; function(*args) joins the job itself, as a program does.
    """
    context, port = _server(), free_port()
    processes, pipes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        variables |= {"WORLD_SIZE": str(world_size), "LOCAL_SIZE": str(world_size)}
        process = context.Process(target=_rank_main, args=(sender, variables, function, args, join))
        process.start()
        sender.close()  # so that the pipe ends when the rank dies
        processes.append(process)
        pipes.append(receiver)
    outcomes = _collect(pipes, timeout)
    for process, outcome in zip(processes, outcomes, strict=True):
        process.join(10 if outcome else 0)
        process.kill()
        process.join()
    errors, report = {}, ""
    for rank, outcome in enumerate(outcomes):
        if outcome is None:
            outcome = _Outcome(error=RuntimeError(f"no answer; exit code {processes[rank].exitcode}"))
        if outcome.error is not None:
            errors[rank] = outcome.error
            report += f"\n--- rank {rank} of {world_size}\n{outcome.traceback or outcome.error}"
    if errors:
        raise RanksFailed(errors, report)
    return [outcome.value for outcome in outcomes if outcome is not None]


def warm_up() -> None:
    """Start the server and wait until it has imported everything, so that no test's time limit pays for it."""
    process = _server().Process(target=os.getpid)
    process.start()
    process.join()


def launch(
    command: Sequence[str | Path], timeout: float = 180, cwd: Path = REPOSITORY, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a launcher with a clean environment plus `variables`, venv first on PATH; stdout and stderr are captured.

    After `timeout` seconds its whole process group is killed and TimeoutExpired raised, with what it had said.
    """
    environment = clean_environment() | variables
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise subprocess.TimeoutExpired(command, timeout, stdout, stderr) from None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _rank_main(
    sender: Connection, variables: dict[str, str], function: Callable[..., Any], args: Sequence[Any], join: bool
) -> None:
    """What one rank does. Runs in its own process."""
    os.environ.update(clean_environment(), **variables)
    from gdyn import ranks

    try:
        if join:
            with ranks.join(timeout_s=60) as here:
                outcome = _Outcome(function(here, *args))
        else:
            outcome = _Outcome(function(*args))
        payload = pickle.dumps(outcome)
    except BaseException as error:  # the parent raises it
        try:
            payload = pickle.dumps(_Outcome(None, error, traceback.format_exc()))
            pickle.loads(payload)
        except Exception:
            payload = pickle.dumps(_Outcome(None, RuntimeError(repr(error)), traceback.format_exc()))
    sender.send_bytes(payload)
    sender.close()


def _collect(pipes: Sequence[Connection], timeout: float) -> list[_Outcome | None]:
    """The outcomes in order; None for a rank that died or did not answer in time."""
    outcomes: list[_Outcome | None] = [None] * len(pipes)
    open_pipes = list(pipes)
    deadline = time.monotonic() + timeout
    while open_pipes and (ready := wait(open_pipes, max(0, deadline - time.monotonic()))):
        for pipe in ready:
            assert isinstance(pipe, Connection)
            open_pipes.remove(pipe)
            try:
                outcome = pickle.loads(pipe.recv_bytes())
            except EOFError:
                outcome = None
            outcomes[pipes.index(pipe)] = outcome
            if outcome is None or outcome.error is not None:
                deadline = min(deadline, time.monotonic() + 5)
    return outcomes
