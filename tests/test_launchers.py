"""Recorded environments of every launcher, and the contradictions that must not pass for a job."""

import pytest

from gdyn.errors import UserError
from gdyn.launchers import discover

ELASTIC = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}
MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
FIVE = {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "1", **MASTER}
DEEPSPEED = FIVE | {"LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "8"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "PMIX_RANK": "3",
    "PMIX_NAMESPACE": "prterun-node1-77@1",
    "PRTE_LAUNCHED": "1",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "16", "PMI_FD": "9", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PALS = {"PALS_RANKID": "3", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "2", "PMI_RANK": "3", "PMI_SIZE": "16"}
JSM = {"JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_SIZE": "16", "LSB_JOBID": "9"}
MVAPICH = {"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_SIZE": "16"}
BATCH_SHELL = {"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16"}
# a step on 8 of the job's 10 nodes
SRUN = BATCH_SHELL | {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "n[1-10]",
    "SLURM_STEP_ID": "4",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x8)",
    "SLURM_STEP_NODELIST": "n[03-10]",
}

# name, environment, launcher, whether MPI is asked, local size where the environment tells it
RECORDED = [
    ("torchrun", FIVE | ELASTIC | {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}, "torchrun", False, 2),
    ("torchrun in an srun step", SRUN | FIVE | ELASTIC | {"SLURM_STEP_NUM_TASKS": "8"}, "torchrun", False, None),
    ("deepspeed, local or PDSH", DEEPSPEED, "deepspeed", False, 2),
    ("deepspeed --launcher openmpi", OPENMPI, "openmpi", True, 2),
    ("deepspeed --launcher mpich", FIVE | HYDRA | {"LOCAL_SIZE": "2"}, "environment", False, 2),
    ("deepspeed --launcher impi", FIVE | HYDRA | {"LOCAL_SIZE": "2", "I_MPI_PIN": "0"}, "environment", False, 2),
    ("deepspeed --launcher slurm", SRUN, "slurm", False, 2),
    ("deepspeed --launcher mvapich", MVAPICH, "mvapich", True, None),
    ("composer", FIVE | {"LOCAL_WORLD_SIZE": "2", "NODE_RANK": "1", "BASE_RANK": "2"}, "environment", False, 2),
    ("mpirun of Open MPI", OPENMPI, "openmpi", True, 2),
    ("mpirun of Open MPI in an allocation", BATCH_SHELL | OPENMPI, "openmpi", True, 2),
    ("mpirun of Open MPI, daemons started by srun", SRUN | OPENMPI, "openmpi", True, 2),
    ("mpirun, address set by the site", OPENMPI | MASTER, "openmpi", True, 2),
    ("mpiexec of MPICH or Intel MPI", HYDRA, "mpich", True, 2),
    ("mpiexec of PALS", PALS, "pals", True, 2),
    ("jsrun", JSM, "jsm", True, None),
    ("srun without MPI", SRUN, "slurm", False, 2),
    ("srun --mpi=pmi2 or cray_shasta", SRUN | {"PMI_RANK": "3", "PMI_SIZE": "16"}, "slurm", True, 2),
    ("srun --mpi=pmix", SRUN | {"PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.12.4"}, "slurm", True, 2),
    ("another PMI launcher", {"PMI_RANK": "3", "PMI_SIZE": "16"}, "pmi", True, None),
    ("Slurm chosen over its PMI", SRUN | {"PMI_RANK": "3", "GDYN_LAUNCHER": "slurm"}, "slurm", False, 2),
]


@pytest.mark.parametrize(
    ("environ", "launcher", "mpi", "local_size"), [r[1:] for r in RECORDED], ids=[r[0] for r in RECORDED]
)
def test_each_launcher_is_rank_3_of_16(environ, launcher, mpi, local_size):
    info = discover(environ)
    assert (info.launcher, info.rank, info.world_size) == (launcher, 3, 16)
    assert info.local_rank in ({None} if launcher == "pmi" else {1})
    assert (info.mpi, info.local_size) == (mpi, local_size)
    assert info.mpi or info.complete


@pytest.mark.parametrize(
    "environ",
    [{}, BATCH_SHELL, MASTER, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, SRUN | {"GDYN_LAUNCHER": "single"}],
    ids=["plain python", "batch shell", "a site's address", "salloc shell", "chosen"],
)
def test_a_process_started_alone_is_alone(environ):
    info = discover(environ)
    assert (info.launcher, info.rank, info.world_size, info.local_rank, info.mpi) == ("single", 0, 1, 0, False)


def test_the_batch_shell_says_what_it_does_not_use():
    assert "16 tasks" in discover(BATCH_SHELL).evidence


def test_pals_with_pmix_leaves_the_world_size_to_mpi():
    info = discover({"PALS_RANKID": "3", "PALS_LOCAL_RANKID": "1", "PMIX_RANK": "3"})
    assert (info.rank, info.world_size, info.mpi) == (3, None, True)


def test_asking_for_mpi_still_checks_against_the_step():
    info = discover(SRUN | {"GDYN_LAUNCHER": "mpi"})
    assert (info.launcher, info.rank, info.world_size, info.mpi) == ("mpi", None, 16, True)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n7", "n7"),
        ("n[1-3,7]", "n1"),
        ("nid[001003,002]", "nid001003"),
        ("n[01-03]-ib,m1", "n01-ib"),
        ("a,b[1-2]", "a"),
    ],
)
def test_slurm_master_is_the_first_host_of_the_step(nodelist, host):
    assert discover(SRUN | {"SLURM_STEP_NODELIST": nodelist}).master_addr == host


def test_slurm_steps_get_ports_of_their_own_and_the_site_may_overrule():
    ports = {discover(SRUN | {"SLURM_JOB_ID": j, "SLURM_STEP_ID": s}).master_port for j in "12" for s in "012"}
    assert len(ports) == 6
    info = discover(SRUN | MASTER)
    assert (info.master_addr, info.master_port) == ("node1", 29500)


def test_slurm_local_size_is_that_of_the_own_node():
    uneven = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,1(x2)", "SLURM_LOCALID": "0"}
    assert [discover(uneven | {"SLURM_NODEID": node}).local_size for node in "012"] == [3, 1, 1]


CONTRADICTIONS = [
    ("world size without a job", {"WORLD_SIZE": "4"}, "WORLD_SIZE=4.*srun, mpirun, torchrun or deepspeed"),
    ("rank without a world", {"RANK": "1"}, "RANK=1.*no launcher"),
    ("no address", {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "missing: MASTER_ADDR, MASTER_PORT"),
    ("no number", FIVE | {"WORLD_SIZE": "four"}, 'WORLD_SIZE="four".*whole number'),
    ("negative", FIVE | {"RANK": "-1"}, 'RANK="-1"'),
    ("rank too high", FIVE | {"RANK": "16"}, "RANK=16 but WORLD_SIZE=16; ranks start at 0"),
    ("local rank too high", DEEPSPEED | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
    ("impossible port", FIVE | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
    ("torchrun's variables torn", ELASTIC | {"RANK": "0"}, "torchrun.*lacks one of RANK, WORLD_SIZE"),
    (
        "one world in each task of srun",
        SRUN | FIVE | {"RANK": "0", "WORLD_SIZE": "1"},
        "SLURM_STEP_NUM_TASKS=16.*Unset",
    ),
    ("one world in each rank of mpirun", OPENMPI | FIVE | {"RANK": "0", "WORLD_SIZE": "1"}, "OMPI_COMM_WORLD_SIZE=16"),
    ("one torchrun world in each task", SRUN | FIVE | ELASTIC | {"WORLD_SIZE": "8"}, "several models"),
    ("stale world size under mpirun", OPENMPI | {"WORLD_SIZE": "4"}, "WORLD_SIZE=4.*mpirun means 16"),
    ("stale rank under srun", SRUN | {"RANK": "0"}, "RANK=0.*step 12.4 means 3"),
    ("unknown launcher", {"GDYN_LAUNCHER": "lsf"}, "known: deepspeed, environment, jsm"),
    ("Slurm asked for outside a step", BATCH_SHELL | {"GDYN_LAUNCHER": "slurm"}, "SLURM_STEP_NUM_TASKS"),
]


@pytest.mark.parametrize(("environ", "message"), [c[1:] for c in CONTRADICTIONS], ids=[c[0] for c in CONTRADICTIONS])
def test_a_contradictory_environment_is_refused(environ, message):
    with pytest.raises(UserError, match=message):
        discover(environ)
