"""What each launcher tells its processes: environment variables -> `RankInfo`. Pure; `gdyn.ranks` applies it.

One row per launcher, tried in order; the tests hold a recorded environment for every row.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gdyn.errors import UserError


@dataclass(frozen=True)
class RankInfo:
    """What the environment says about this process. None: not said; `ranks.join` finds it out."""

    launcher: str
    evidence: str
    """How we know, for people: "torchrun", "srun, step 12.0"."""
    rank: int | None = None
    world_size: int | None = None
    local_rank: int | None = None
    local_size: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    mpi: bool = False
    """Whether MPI was started for this process and is to be asked."""
    pmix_only: bool = False
    """Whether the launcher speaks PMIx and no older PMI; not every MPI library understands it."""
    agent_store: bool = False
    """Whether torchrun's agent already serves the store at the master's address."""
    attempt: int = 0
    """How often torchrun has restarted the ranks."""

    @property
    def complete(self) -> bool:
        """Enough to meet the other ranks without MPI."""
        return None not in (self.rank, self.world_size, self.local_rank, self.master_addr, self.master_port)


@dataclass(frozen=True)
class _Launcher:
    """How one launcher is recognised (all of `signs` are set) and the names of its four numbers."""

    name: str
    title: str
    signs: tuple[str, ...] = ()
    numbers: tuple[str, str, str, str] = ("", "", "", "")
    """Variables of rank, world size, local rank, local size; "" where it sets none."""
    mpi: bool = True


def _mpi_names(prefix: str) -> tuple[str, str, str, str]:
    return f"{prefix}_RANK", f"{prefix}_SIZE", f"{prefix}_LOCAL_RANK", f"{prefix}_LOCAL_SIZE"


FIVE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_RANK_NAMES = FIVE[:3]
_PALS_NAMES = ("PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE")
_HYDRA_NAMES = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_SLURM_NAMES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "")

# Order is precedence. Open MPI before Slurm, because mpirun inside an allocation inherits SLURM_*; Hydra by
# MPI_LOCALRANKID, because srun sets PMI_RANK too; srun by SLURM_STEP_ID, because the batch shell already has
# SLURM_PROCID=0 and SLURM_NTASKS=N and would pass for rank 0 of N.
_LAUNCHERS = (
    _Launcher("torchrun", "torchrun", ("TORCHELASTIC_RUN_ID",), (*_RANK_NAMES, "LOCAL_WORLD_SIZE"), mpi=False),
    _Launcher("deepspeed", "the deepspeed launcher", ("CROSS_SIZE",), (*_RANK_NAMES, "LOCAL_SIZE"), mpi=False),
    _Launcher("environment", "RANK and WORLD_SIZE", FIVE, (*_RANK_NAMES, "LOCAL_SIZE"), mpi=False),
    _Launcher("openmpi", "Open MPI's mpirun", ("OMPI_COMM_WORLD_RANK",), _mpi_names("OMPI_COMM_WORLD")),
    _Launcher("mvapich", "MVAPICH", ("MV2_COMM_WORLD_RANK",), _mpi_names("MV2_COMM_WORLD")),
    _Launcher("pals", "PALS mpiexec", ("PALS_RANKID",), _PALS_NAMES),
    _Launcher("mpich", "Hydra mpiexec", ("PMI_RANK", "MPI_LOCALRANKID"), _HYDRA_NAMES),
    _Launcher("jsm", "jsrun", ("JSM_NAMESPACE_RANK",), _mpi_names("JSM_NAMESPACE")),
    _Launcher("slurm", "srun", ("SLURM_STEP_ID", "SLURM_PROCID"), _SLURM_NAMES),
    _Launcher("pmi", "a PMI launcher", ("PMI_RANK", "PMI_SIZE"), ("PMI_RANK", "PMI_SIZE", "", "")),
    _Launcher("mpi", "GDYN_LAUNCHER=mpi"),
    _Launcher("single", "no launcher", mpi=False),
)
_BY_NAME = {launcher.name: launcher for launcher in _LAUNCHERS}
# srun says by these whether it was told to serve an MPI (--mpi=...); its own numbers do without.
_PMI_SIGNS = ("PMI_RANK", "PMI_FD", "PMIX_RANK", "PMIX_NAMESPACE")


def discover(environ: Mapping[str, str]) -> RankInfo:
    """Rank, world and launcher as the environment tells them. Pure.

    GDYN_LAUNCHER names the launcher outright ("single", "slurm", "mpi", ...); otherwise the first that left its signs.
    Raises UserError for variables that are incomplete, no numbers, or contradict each other.
    """
    launcher = _recognise(environ)
    rank, world_size, local_rank, local_size = (number(environ, name) for name in launcher.numbers)
    info = RankInfo(
        launcher=launcher.name,
        evidence=launcher.title,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_size=local_size,
        master_addr=environ.get("MASTER_ADDR") or None,
        master_port=number(environ, "MASTER_PORT"),
        mpi=launcher.mpi,
        pmix_only=bool(environ.get("PMIX_RANK")) and not (environ.get("PMI_RANK") or environ.get("PMI_FD")),
    )
    if info.launcher == "torchrun":
        served = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        info = replace(info, agent_store=served, attempt=number(environ, "TORCHELASTIC_RESTART_COUNT") or 0)
    elif info.launcher == "environment":
        info = replace(info, local_size=local_size or number(environ, "LOCAL_WORLD_SIZE"))  # composer's name
    elif info.launcher == "slurm":
        info = _slurm(info, environ)
    elif info.launcher == "mpi":
        info = replace(info, world_size=_tasks(environ)[0])
    elif info.launcher == "single":
        info = _single(info, environ)
    _check_numbers(info, launcher)
    if not environ.get("GDYN_LAUNCHER"):
        _check_contradictions(info, environ)
    return info


def number(environ: Mapping[str, str], name: str) -> int | None:
    """The variable as a whole number >= 0; None if unset or empty."""
    text = environ.get(name, "")
    if text and not text.isdecimal():
        raise UserError(f'{name}="{text}" in the environment; expected a whole number, 0 or more.')
    return int(text) if text else None


def _recognise(environ: Mapping[str, str]) -> _Launcher:
    chosen = environ.get("GDYN_LAUNCHER")
    if chosen and chosen not in _BY_NAME:
        raise UserError(f'GDYN_LAUNCHER="{chosen}" is unknown; known: {", ".join(sorted(_BY_NAME))}.')
    if chosen:
        return _BY_NAME[chosen]
    for launcher in _LAUNCHERS:
        if launcher.signs and all(environ.get(sign) for sign in launcher.signs):
            return launcher
    return _BY_NAME["single"]


def _slurm(info: RankInfo, environ: Mapping[str, str]) -> RankInfo:
    """`info` with what all tasks of a step can work out without talking: rank 0's host, and a port of the step's own.

    Only STEP variables: in a step smaller than the job the others still describe the job.
    """
    job, step = number(environ, "SLURM_JOB_ID") or 0, number(environ, "SLURM_STEP_ID") or 0
    # "n[01-03,7]-ib,m1" -> "n01-ib": the first of every bracket, then the first host
    host: str | None = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", environ.get("SLURM_STEP_NODELIST", "")).split(",")[0]
    if environ.get("SLURM_STEP_NUM_NODES") == "1":
        host = "127.0.0.1"  # Slurm's node names need not resolve
    return replace(
        info,
        evidence=f"srun, step {job}.{step}",
        local_size=_tasks_of_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""), number(environ, "SLURM_NODEID")),
        master_addr=info.master_addr or host or None,
        master_port=info.master_port or 10000 + (31 * job + step) % 20000,  # below the ephemeral ports
        mpi=environ.get("GDYN_LAUNCHER") != "slurm" and any(environ.get(sign) for sign in _PMI_SIGNS),
    )


def _tasks_of_node(counts: str, node: int | None) -> int | None:
    """ "3,1" is 3 tasks on node 0 and 1 on node 1; "2(x2)" is 2 on both. Not expanded: every rank of thousands asks."""
    after = 0
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        after += int(times or 1)
        if node is not None and node < after:
            return int(count)
    return None


def _single(info: RankInfo, environ: Mapping[str, str]) -> RankInfo:
    info = replace(info, rank=0, world_size=1, local_rank=0, local_size=1, master_addr=None, master_port=None)
    tasks = number(environ, "SLURM_NTASKS") or 1
    if tasks > 1:
        hint = f"no launcher (outside srun in a Slurm job of {tasks} tasks: start with srun to use them)"
        info = replace(info, evidence=hint)
    return info


def _tasks(environ: Mapping[str, str]) -> tuple[int | None, str]:
    """How many tasks the launcher started that starts one process each, and the variable that says so."""
    names = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE"]
    if environ.get("SLURM_STEP_ID"):
        names.append("SLURM_STEP_NUM_TASKS")
    counts = [(count, name) for name in names if (count := number(environ, name)) is not None]
    return max(counts, default=(None, ""))


def _check_numbers(info: RankInfo, launcher: _Launcher) -> None:
    """Raises UserError if the launcher's own numbers are missing or impossible."""
    if info.master_port is not None and not 0 < info.master_port < 65536:
        raise UserError(f"MASTER_PORT={info.master_port}; expected 1 to 65535.")
    if not info.mpi and not info.complete and info.launcher != "single":
        raise UserError(
            f"Started by {info.evidence}, but the environment lacks one of "
            f"{', '.join((*launcher.numbers[:3], 'MASTER_ADDR', 'MASTER_PORT'))}. Set all, or GDYN_LAUNCHER=single."
        )
    rank_name, world_name, local_name, _ = launcher.numbers
    if info.rank is not None and info.world_size is not None and info.rank >= info.world_size:
        raise UserError(f"{rank_name}={info.rank} but {world_name}={info.world_size}; ranks start at 0.")
    if info.local_rank is not None and info.local_size is not None and info.local_rank >= info.local_size:
        raise UserError(f"{local_name}={info.local_rank} but this node has {info.local_size} ranks; they start at 0.")


def _check_contradictions(info: RankInfo, environ: Mapping[str, str]) -> None:
    """Raises UserError where two sources name different worlds: some ranks would train a model of their own."""
    if info.launcher in ("torchrun", "deepspeed", "environment"):
        tasks, name = _tasks(environ)
        if tasks is not None and info.world_size is not None and info.world_size < tasks:
            raise UserError(
                f"WORLD_SIZE={info.world_size} but {name}={tasks}: the {tasks} tasks would train several models, not "
                "one. Unset RANK, WORLD_SIZE and LOCAL_RANK in the job script; the launcher sets what is needed."
            )
        return
    expected = {"RANK": info.rank, "WORLD_SIZE": info.world_size}
    if info.launcher == "single":
        expected["LOCAL_RANK"] = info.local_rank
    for name, value in expected.items():
        found = number(environ, name)
        if found is not None and value is not None and found != value:
            missing = ", ".join(variable for variable in FIVE if not environ.get(variable)) or "none"
            raise UserError(
                f"{name}={found} in the environment, but {info.evidence} means {value}. Unset it, or start all ranks "
                f"with srun, mpirun, torchrun or deepspeed (or set all of {', '.join(FIVE)}; missing: {missing})."
            )
