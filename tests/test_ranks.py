"""Real ranks: they meet, agree, fail together, and never wait for ever."""

import json
import os
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gdyn import ranks
from gdyn.errors import UserError
from gdyn.launchers import RankInfo
from gdyn.rendezvous import check_in
from tests import harness

# ---- what `here` offers, on processes forked for the purpose


def collectives(here, greeting):
    return {
        "main": here.main,
        "any": [here.any(here.rank == 1), here.any(False)],
        "gather": here.gather(here.rank**2),
        "broadcast": here.broadcast(f"{greeting} {here.rank}"),
        "variables": [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")],
        "mpi": "mpi4py" in sys.modules,
    }


def test_two_ranks_talk(run_ranks):
    first, second = run_ranks(2, collectives, "hello from")
    assert first == {
        "main": True,
        "any": [True, False],
        "gather": [0, 1],
        "broadcast": "hello from 0",
        "variables": ["0", "2", "0", "2"],
        "mpi": False,
    }
    assert second == first | {"main": False, "variables": ["1", "2", "1", "2"]}


def read_on_one_rank(here, failing):
    with here.together():
        if here.rank == failing:
            raise FileNotFoundError("no file") if failing else UserError("bad key")


@pytest.mark.parametrize(("failing", "message"), [(0, "bad key"), (1, "[rank 1] no file")])
def test_a_user_error_on_one_rank_is_raised_on_all(run_ranks, failing, message):
    with pytest.raises(harness.RanksFailed) as caught:
        run_ranks(2, read_on_one_rank, failing)
    assert [str(caught.value.errors[rank]) for rank in (0, 1)] == [message, message]
    assert all(isinstance(error, ranks.AgreedError) for error in caught.value.errors.values())


def die_on_one_rank(here):
    if here.rank == 1:
        os._exit(3)
    here.barrier()


def test_a_dead_rank_ends_the_others(run_ranks):
    with pytest.raises(harness.RanksFailed) as caught:
        run_ranks(2, die_on_one_rank)
    assert "exit code 3" in str(caught.value.errors[1])
    assert "peer" in str(caught.value.errors[0])


def test_alone_needs_no_torch_distributed():
    here = ranks.ALONE
    assert (here.rank, here.world_size, here.main, here.device) == (0, 1, True, torch.device("cpu"))
    assert (here.any(True), here.any(False), here.broadcast("x"), here.gather("x")) == (True, False, "x", ["x"])
    with here.together():
        here.barrier()
    with pytest.raises(UserError, match="bad"), here.together():
        raise UserError("bad")
    with pytest.raises(KeyError), here.together():
        raise KeyError


# ---- entering alone, and in vain


@pytest.mark.parametrize("ending", [None, ranks.AgreedError, KeyError])
def test_a_single_process_enters_and_leaves_without_a_trace(monkeypatch, ending):
    monkeypatch.setenv("MASTER_PORT", "1")  # left over from another job, say
    try:
        with ranks.join() as here:
            assert torch.distributed.get_world_size() == here.world_size == 1
            assert os.environ["WORLD_SIZE"] == os.environ["LOCAL_SIZE"] == "1"
            if ending:
                raise ending
    except (UserError, KeyError) as error:
        assert type(error) is ending
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR"} & os.environ.keys()
    assert os.environ["MASTER_PORT"] == "1"
    assert not torch.distributed.is_initialized()


@pytest.fixture
def claim(monkeypatch):
    """Sets the five variables to rank `rank` of 4 on a free port of this host."""

    def set_variables(rank: int, address: str = "127.0.0.1", port: int | None = None) -> int:
        port = port or harness.free_port()
        five = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank, "MASTER_ADDR": address, "MASTER_PORT": port}
        for name, value in five.items():
            monkeypatch.setenv(name, str(value))
        return port

    return set_variables


def refusal(rendezvous_s: float = 0.3) -> str:
    with pytest.raises(UserError) as caught, ranks.join(rendezvous_s=rendezvous_s):
        pass
    assert not torch.distributed.is_initialized()
    return str(caught.value)


def test_ranks_that_never_come_are_not_waited_for(claim):
    port = claim(rank=0)
    assert f"1 of 4 ranks arrived at 127.0.0.1:{port} within 0.3 s" in refusal()


def test_a_rank_without_rank_0_is_not_left_waiting(claim):
    claim(rank=1)
    assert "Rank 1 of 4 found no rank 0" in refusal()


def test_a_master_address_that_is_not_rank_0s_is_an_error(claim):
    claim(rank=0, address="nowhere.invalid")
    assert "MASTER_ADDR must be the host of rank 0" in refusal()


def test_a_port_in_use_is_an_error_that_names_it(claim):
    with socket.socket() as other_job:
        other_job.bind(("", 0))
        other_job.listen()
        port = claim(rank=0, port=other_job.getsockname()[1])
        assert f"cannot serve port {port}" in refusal()


def meet(claims: list[tuple[int, str]], world_size: int) -> list[str]:
    """What check_in answers to (rank, device) claims, each made by a client of its own. "" for a welcome."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = []

    def visit(rank: int, device: str) -> None:
        client = torch.distributed.TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=10))
        info = RankInfo("environment", "a test", rank, world_size, rank, None, "127.0.0.1", server.port)
        try:
            check_in(client, info, device, timeout_s=10)
            answers.append("")
        except UserError as error:
            answers.append(str(error))

    threads = [threading.Thread(target=visit, args=claim) for claim in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_ranks_with_devices_of_their_own_are_welcome():
    assert meet([(0, "host:GPU-a"), (1, "host:GPU-b"), (2, "other:GPU-a")], world_size=3) == ["", "", ""]


def test_two_ranks_on_one_device_are_refused_everywhere():
    first, second = meet([(0, "host:GPU-a"), (1, "host:GPU-a")], world_size=2)
    assert first == second
    assert "Two ranks share the device host:GPU-a" in first


def test_two_processes_of_one_rank_are_refused_everywhere():
    first, second = meet([(1, "host:GPU-a"), (1, "host:GPU-b")], world_size=2)
    assert first == second
    assert "Rank 1 came twice" in first


@pytest.mark.parametrize(("local_rank", "visible", "index"), [(3, 8, 3), (3, 1, 0), (5, 4, 1)])
def test_device_index_is_the_local_rank_modulo_visible_devices(monkeypatch, local_rank, visible, index):
    properties = [SimpleNamespace(uuid=f"GPU-{i}") for i in range(visible)]
    monkeypatch.setattr(
        torch, "get_device_module", lambda kind: SimpleNamespace(get_device_properties=properties.__getitem__)
    )
    accelerator = SimpleNamespace(
        device_name=lambda i=None: "cuda" if i is None else f"cuda:{i}", device_count=lambda: visible
    )
    found = ranks._device(accelerator, local_rank)
    assert found == (index, f"cuda:{index}", f"{socket.gethostname()}:GPU-{index}")


def test_an_accelerator_without_devices_is_an_error():
    accelerator = SimpleNamespace(device_name=lambda: "cuda", device_count=lambda: 0)
    with pytest.raises(UserError, match="No cuda device is visible"):
        ranks._device(accelerator, 0)


# ---- real launchers

SCRIPT = """
import json, pathlib, sys
from gdyn import ranks
from gdyn.errors import UserError

try:
    with ranks.join() as here:
        said = dict(rank=here.rank, local_rank=here.local_rank, local_size=here.local_size)
        said |= dict(squares=here.gather(here.rank**2), launcher=here.launcher, evidence=here.evidence)
        (pathlib.Path(__file__).parent / f"{here.rank}.json").write_text(json.dumps(said))
        if "fail" in sys.argv and here.rank == 1:
            raise UserError("rank 1 alone gives up")
        here.barrier()
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


needs_mpi4py = pytest.mark.skipif(find_spec("mpi4py") is None, reason="pip install mpi4py mpich")
needs_mpich = pytest.mark.skipif(
    find_spec("mpi4py") is None or not Path(sys.executable).with_name("mpiexec").exists(),
    reason="pip install mpi4py mpich",
)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "command"),
    [
        pytest.param("mpich", ["mpiexec", "-n", "2", sys.executable], marks=needs_mpich),
        ("torchrun", ["torchrun", "--standalone", "--nproc_per_node", "2"]),
        ("deepspeed", ["deepspeed", "--num_gpus", "2", "--no_local_rank", "--master_port", str(harness.free_port())]),
    ],
)
def test_every_launcher_makes_the_same_two_ranks(launcher, command, script):
    ended = harness.launch([*command, script])
    assert ended.returncode == 0, ended.stderr
    for rank in (0, 1):
        said = json.loads((script.parent / f"{rank}.json").read_text())
        evidence = said.pop("evidence")
        assert said == {"rank": rank, "local_rank": rank, "local_size": 2, "squares": [0, 1], "launcher": launcher}
        assert evidence.startswith(f"rank {rank}/2 on {socket.gethostname()} via ")
        assert ("mpi4py" in evidence) == (launcher == "mpich")


@pytest.mark.slow
@needs_mpich
def test_under_mpi_a_rank_that_fails_alone_ends_the_job_with_its_code(script):
    ended = harness.launch(["mpiexec", "-n", "2", sys.executable, script, "fail"])
    assert ended.returncode == 2
    assert ended.stderr.count("rank 1 alone gives up") == 1


@needs_mpi4py
@pytest.mark.parametrize(
    ("variables", "cure"),
    [
        (
            {"JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_LOCAL_RANK": "0"},
            "build mpi4py against",
        ),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "GDYN_LAUNCHER": "mpi"}, "mpirun or mpiexec that belongs"),
    ],
    ids=["jsrun", "srun"],
)
def test_an_mpi_that_is_a_world_of_its_own_is_refused(variables, cure, script):
    ended = harness.launch([sys.executable, script], **variables)
    assert ended.returncode == 2
    assert "rank 0 of 1: several models would be trained, not one" in ended.stderr
    assert cure in ended.stderr


def test_srun_with_the_wrong_pmi_names_the_flag():
    step = RankInfo("slurm", "srun, step 1.0")
    assert "--mpi=pmix" in ranks._pmi_cure(step, "Open MPI")
    assert "--mpi=pmi2" in ranks._pmi_cure(step, "MPICH")


def test_importing_ranks_imports_neither_torch_nor_mpi():
    code = "import sys, gdyn.ranks; print([m for m in ('torch', 'deepspeed', 'mpi4py') if m in sys.modules])"
    assert harness.launch([sys.executable, "-c", code]).stdout.strip() == "[]"


def test_launch_ends_what_does_not_end():
    with pytest.raises(subprocess.TimeoutExpired):
        harness.launch([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.5)
