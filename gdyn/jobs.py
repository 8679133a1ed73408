"""Jobs: a request becomes a script and frozen files, checked against the site's rules; then it is handed in.

Nothing here imports torch, so that a login node answers at once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gdyn import ds_config, recipes, run_files, schedulers, sites
from gdyn.errors import UserError
from gdyn.rundir import RunDir
from gdyn.sites import Blank, Queue, Site

SEED = 1234
"""RunConfig's default; a test compares."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_IMAGE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./:@+-]*")


@dataclass(frozen=True)
class Request:
    """What somebody asks for, in the words of `gdyn submit`."""

    site: Site
    run_file: Path
    nodes: int = 1
    ranks_per_node: int | None = None
    time: str | None = None
    account: str | None = None
    queue: str | None = None
    name: str | None = None
    chain: int = 1
    requeue: bool = False
    array: str | None = None
    changes: tuple[str, ...] = ()
    """key=value, applied to the run file."""
    env: str = "auto"
    spares: int = 0
    max_restarts: int | None = None
    signal_seconds: int = 300
    """How long before the end of the wall time the run is told to save and stop."""
    checkpoint_seconds: float | None = None
    """What saving takes, where it is known."""
    preflight: bool = True
    directory: Path = field(default_factory=Path.cwd)
    """Where relative paths of the run file start, and the job, too."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Those that only this site has."""

    @property
    def seconds(self) -> float | None:
        return None if self.time is None else sites.seconds(self.time)

    @property
    def allocated(self) -> int:
        """Nodes, spare ones too."""
        return self.nodes + self.spares


@dataclass(frozen=True)
class Job:
    """A request worked out: everything that will be written, and the numbers people want to see first."""

    request: Request
    run_dir: RunDir
    queue: Queue | None
    script: str
    files: Mapping[str, str]
    """Path within the job folder -> text."""
    members: tuple[str, ...]
    """Of an ensemble; empty for a single run."""
    ranks: int
    micro_batch: int
    accumulation: int
    environment: str
    """What Python runs in, for people."""
    cautions: tuple[str, ...]

    @property
    def script_name(self) -> str:
        return f"job{self.request.site.path.suffix}"

    @property
    def jobs(self) -> int:
        """How many jobs the scheduler will see."""
        return max(self.request.chain, len(self.members))

    @property
    def node_hours(self) -> float | None:
        """At most, if every job takes its whole wall time."""
        seconds = self.request.seconds
        return None if seconds is None else self.request.allocated * seconds / 3600 * self.jobs


def prepare(request: Request, launch: Path) -> Job:
    """Work a request out. launch: the folder of the programs that the script starts.

    Raises: UserError for anything in request, run file or DeepSpeed JSON that the site or the trainer would refuse.
    """
    site = request.site
    _check_numbers(request)
    base = run_files.read(request.run_file, request.changes)
    run_dir = run_files.run_folder(base, request.run_file)
    members = _members(request, base)
    queue = _check_rules(request, run_dir, max(request.chain, len(members)))
    ranks_per_node = ranks_of_a_node(request)
    runs = members or {"": (base, request.run_file)}
    frozen = [_freeze(request, run_dir, member, *run, i) for i, (member, run) in enumerate(runs.items())]
    cautions = [caution for run in frozen for caution in run.cautions]
    if len({(run.micro_batch, run.accumulation) for run in frozen}) > 1:
        cautions.append("the members have different batch sizes; the first one's are shown.")
    blanks = _blanks(request, run_dir, queue, ranks_per_node, tuple(members), launch)
    _check_places(request, queue, blanks)
    return Job(
        request=request,
        run_dir=run_dir,
        queue=queue,
        script=site.render(blanks),
        files={name: text for run in frozen for name, text in run.files.items()},
        members=tuple(members),
        ranks=request.nodes * ranks_per_node,
        micro_batch=frozen[0].micro_batch,
        accumulation=frozen[0].accumulation,
        environment=" ".join(str(blanks[name]) for name in ("environment", "conda", "venv", "image") if blanks[name]),
        cautions=tuple(dict.fromkeys(cautions)),
    )


@dataclass(frozen=True)
class _Frozen:
    """One run as it will be started, whatever becomes of the files it was made from."""

    files: dict[str, str]
    micro_batch: int
    accumulation: int
    cautions: list[str]


def _freeze(
    request: Request, run_dir: RunDir, member: str, content: Mapping[str, Any], source: Path, number: int
) -> _Frozen:
    """The run file and DeepSpeed JSON of a single run (member "") or of an ensemble's member. Raises: UserError."""
    run_name, json_name = (
        (f"members/{number}.yaml", f"members/{number}.json") if member else ("run.yaml", "deepspeed.json")
    )
    recipe = ds_config.read(recipes.find_recipe(run_files.text(content, "deepspeed", source), source.parent))
    cautions = ds_config.check(recipe)
    wishes = content.get("optimization") or {}
    micro_batch, accumulation = ds_config.batch_sizes(
        recipe, wishes.get("batch_size"), wishes.get("gradient_accumulation_steps")
    )
    frozen = {**content, "run_dir": str(run_dir.path / member), "deepspeed": str(run_dir.job / json_name)}
    given = content.get("init_from")
    if isinstance(given, str):
        frozen["init_from"] = str(request.directory / given)
    elif isinstance(given, dict):
        frozen["init_from"] = {glob: str(request.directory / str(source)) for glob, source in given.items()}
    if not request.preflight:
        frozen["preflight"] = "off"
    run_file = yaml.safe_dump(frozen, sort_keys=False, allow_unicode=True)
    return _Frozen({json_name: recipe.path.read_text(), run_name: run_file}, micro_batch, accumulation, cautions)


def _members(request: Request, base: dict[str, Any]) -> dict[str, tuple[dict[str, Any], Path]]:
    """Member -> (run file, where it was read). Empty without --array."""
    if request.array is None:
        return {}
    kind, _, value = request.array.partition("=")
    found: dict[str, tuple[dict[str, Any], Path]] = {}
    if kind == "seeds" and value.isdecimal() and value.isascii():
        first = base.get("seed", SEED)
        seeds = range(first, first + int(value)) if isinstance(first, int) else ()
        found = {f"seed{seed}": ({**base, "seed": seed}, request.run_file) for seed in seeds}
    elif kind == "runs" and value:
        for path in map(Path, value.split(",")):
            if path.stem in found:
                raise UserError(f"--array {request.array}: two run files are named {path.stem}; rename one.")
            found[_named("a member of --array", path.stem)] = (run_files.read(path, request.changes), path)
    else:
        raise UserError(f'--array is "{request.array}"; expected seeds=5 or runs=a.yaml,b.yaml.')
    if len(found) < 2:
        raise UserError(f"--array {request.array}: an ensemble has two members or more, found {len(found)}.")
    return found


# Rules


def _check_numbers(request: Request) -> None:
    least = {"nodes": 1, "ranks_per_node": 1, "chain": 1, "spares": 0, "max_restarts": 0, "signal_seconds": 1}
    for name, smallest in least.items():
        value = getattr(request, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name} is {value}; expected {smallest} or more.")
    if request.seconds is not None and request.seconds <= 0:
        raise UserError(f"--time is {request.time}; expected more than nothing.")
    for name in ("account", "queue", "name"):
        if getattr(request, name) is not None:
            _named(f"--{name}", getattr(request, name))


def _named(what: str, value: str) -> str:
    if not _NAME.fullmatch(value):
        raise UserError(
            f"{what} is {value!r}; expected up to 64 letters, digits, dots, dashes and underscores, no dash first."
        )
    return value


def ranks_of_a_node(request: Request) -> int:
    """As the site says, or the request. Raises: UserError if neither does, or they differ."""
    fixed, asked = request.site.ranks_per_node, request.ranks_per_node
    if fixed is None and asked is None:
        raise UserError(f"{request.site.name} does not say how many ranks a node has; give --ranks_per_node.")
    if fixed is not None and asked not in (None, fixed):
        raise UserError(f"--ranks_per_node is {asked}, but a node of {request.site.name} has {fixed}, one per device.")
    return fixed or asked or 1


def _check_rules(request: Request, run_dir: RunDir, jobs: int) -> Queue | None:
    """The queue the job will wait in. Raises: UserError for what site or scheduler would refuse."""
    site, seconds = request.site, request.seconds
    if request.array and request.chain > 1:
        raise UserError("--chain and --array exclude each other; submit the members one by one for chains of them.")
    if request.requeue and request.chain > 1:
        raise UserError("--requeue and --chain exclude each other: either the job goes on itself, or its successor.")
    if site.scheduler != "slurm" and request.requeue:
        why = "a user of PBS cannot requeue (qrerun needs privileges)" if site.scheduler == "pbs" else "nothing queues"
        raise UserError(f"--requeue on {site.name}: {why}; use --chain on a cluster with a scheduler.")
    if site.scheduler == "none":
        _check_hosts(request)
    elif seconds is None:
        raise UserError(f"{site.name}: how long may the job run? Give --time, e.g. --time 2:00:00.")
    if site.facts.get("account") == "required" and request.account is None:
        raise UserError(f"{site.name}: which project pays? Give --account.")
    queue = site.choose_queue(request.queue)
    site.check(queue, request.allocated, seconds, jobs)
    if site.scheduler == "slurm" and seconds is not None:
        _check_warning(request, seconds, run_dir)
    return queue


def _check_hosts(request: Request) -> None:
    hostfile = request.options.get("hostfile")
    if request.chain > 1:
        raise UserError(f"--chain on {request.site.name}: there is no scheduler to start a successor.")
    if hostfile:
        hosts = len(schedulers.read_hosts(Path(hostfile).expanduser()))
        if hosts < request.allocated:
            raise UserError(f"{hostfile} has {hosts} hosts, asked for {request.allocated} (nodes and spares).")
    elif request.allocated > 1:
        able = "hostfile" in {option.name for option in request.site.options}
        cure = "give --hostfile, one host per line" if able else "it is one machine: --nodes 1, no --spares"
        raise UserError(f"{request.site.name}: {request.allocated} nodes (spares counted); {cure}.")


def _check_warning(request: Request, seconds: float, run_dir: RunDir) -> None:
    """The time between warning and end must do for a checkpoint, twice, and leave time to train."""
    warning = request.signal_seconds
    if 2 * warning > seconds:
        raise UserError(
            f"the job runs for {sites.clock(seconds)} and is told to stop {warning} s before: too little to train. "
            "Give more --time or a smaller --signal_seconds."
        )
    needed = request.checkpoint_seconds
    if needed is not None and warning < 2 * needed:
        raise UserError(
            f"--signal_seconds is {warning}, but a checkpoint takes {needed:.0f} s; expected twice that, "
            f"{2 * needed:.0f}, because file systems have bad moments."
        )


def _check_places(request: Request, queue: Queue | None, blanks: Mapping[str, Blank]) -> None:
    """Refuse what the site's script has no place for: it would be ignored."""
    asked = {name: f"--{name}" for name in ("account", "requeue", "time") if getattr(request, name)}
    asked |= {"members": "--array"} if request.array else {}
    asked |= {queue.option: "--queue"} if queue else {}
    environment = "python" if blanks["container"] else str(blanks["environment"])
    asked |= {environment: f"--env {request.env}"} if environment != "none" else {}
    for name, option in asked.items():
        if name not in request.site.blanks:
            raise UserError(f"{request.site.name} has no place for {option}: {request.site.path.name} lacks {name}.")


# The blanks


def _blanks(
    request: Request, run_dir: RunDir, queue: Queue | None, ranks_per_node: int, members: tuple[str, ...], launch: Path
) -> dict[str, Blank]:
    site, seconds = request.site, request.seconds
    cores = site.cores_per_rank
    return {
        "account": request.account,
        "name": request.name or _default_name(run_dir),
        "time": None if seconds is None else sites.clock(seconds),
        "seconds": None if seconds is None else str(round(seconds)),
        "allocated": str(request.allocated),
        "spares": str(request.spares) if request.spares else None,
        "ranks_per_node": str(ranks_per_node),
        "cores_per_rank": None if cores is None else str(cores),
        **_queue_blanks(queue),
        "signal": f"B:USR2@{request.signal_seconds}",
        "requeue": "yes" if request.requeue else None,
        "array": f"0-{len(members) - 1}" if members else None,
        "members": members or None,
        "run_dir": str(run_dir.path),
        "workdir": str(request.directory),
        "launch": str(launch),
        "supervise": _supervise(request, run_dir, ranks_per_node, members),
        **_environment(request),
        **_site_options(request),
    }


def _default_name(run_dir: RunDir) -> str:
    return run_dir.path.name if _NAME.fullmatch(run_dir.path.name) else "gdyn"


def _queue_blanks(queue: Queue | None) -> dict[str, Blank]:
    blanks: dict[str, Blank] = {"partition": queue.partition if queue else None, "qos": None, "queue": None}
    return blanks | ({queue.option: queue.name} if queue else {})


def _supervise(request: Request, run_dir: RunDir, ranks_per_node: int, members: tuple[str, ...]) -> list[str]:
    words = ["--nodes", str(request.nodes), "--ranks_per_node", str(ranks_per_node)]
    words += [] if request.max_restarts is None else ["--max_restarts", str(request.max_restarts)]
    words += ["--requeue"] if request.requeue else []
    words += ["--ensemble", str(run_dir.job / "members")] if members else []
    return words


def _site_options(request: Request) -> dict[str, Blank]:
    known = {option.name: option for option in request.site.options}
    for name in request.options:
        if name not in known:
            raise UserError(f"{request.site.name} has no option --{name}; its own: {', '.join(known) or 'none'}.")
    given = {name: request.options.get(name, option.default) for name, option in known.items()}
    return {name: known[name].fill(value, request.allocated) for name, value in given.items()}


def _environment(request: Request) -> dict[str, Blank]:
    """What of `conda`, `venv` and `image` is filled, and the words that start Python on a rank."""
    kind, value = environment_here() if request.env == "auto" else _split(request.env)
    blanks: dict[str, Blank] = {"conda": None, "venv": None, "container": None, "image": None, "python": ["python3"]}
    containers = request.site.containers
    if kind == "conda":
        blanks["conda"] = str(_folder(request, value)) if "/" in value else _named("--env conda", value)
    elif kind == "venv":
        folder = _folder(request, value)
        if not (folder / "bin" / "activate").is_file():
            raise UserError(f"--env {request.env}: {folder} has no bin/activate, so it is no virtual environment.")
        blanks["venv"] = str(folder)
    elif kind in containers:
        words = containers[kind].split()
        image = str(Path(value).expanduser().absolute()) if Path(value).expanduser().is_file() else value
        if image == value and not _IMAGE.fullmatch(value):
            raise UserError(f"--env {request.env}: {value!r} is neither a file nor the name of an image.")
        python = [word.replace("{image}", image) for word in words] + ["python3"]
        blanks |= {"container": kind, "image": image, "python": python}
    elif kind != "none":
        known = ["auto", "none", "conda:NAME", "venv:PATH", *(f"{name}:IMAGE" for name in containers)]
        raise UserError(f"--env is {request.env!r}; {request.site.name} knows {', '.join(known)}.")
    return blanks | {"environment": kind}


def environment_here() -> tuple[str, str]:
    """(kind, folder) of the environment this process runs in; ("none", "") for the system's Python."""
    if (Path(sys.prefix) / "conda-meta").is_dir():
        return "conda", sys.prefix
    return ("venv", sys.prefix) if sys.prefix != sys.base_prefix else ("none", "")


def _split(env: str) -> tuple[str, str]:
    kind, colon, value = env.partition(":")
    if kind != "none" and not (colon and value):
        raise UserError(
            f"--env is {env!r}; expected none, auto, or a kind and what it is, e.g. conda:NAME or venv:PATH."
        )
    return kind, value


def _folder(request: Request, value: str) -> Path:
    folder = Path(value).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"--env {request.env}: {folder} does not exist.")
    return folder


# The arithmetic


def arithmetic(job: Job, seconds_per_step: float | None, measured: str) -> dict[str, str]:
    """The numbers people want to see before they spend node-hours. measured: where seconds_per_step is from."""
    request = job.request
    nodes = f"{request.nodes}" + (f" and {request.spares} spare" if request.spares else "")
    batch = job.micro_batch * job.accumulation * job.ranks
    rows = {
        "site": request.site.title + (f", {job.queue.option} {job.queue.name}" if job.queue else ""),
        "run folder": str(job.run_dir.path),
        "environment": job.environment,
        "nodes": nodes,
        "ranks": f"{request.nodes} x {job.ranks // request.nodes} = {job.ranks}",
        "global batch": f"{job.micro_batch} x {job.accumulation} x {job.ranks} = {batch} "
        "(micro-batch x accumulation x ranks)",
    }
    if job.members:
        rows["ensemble"] = ", ".join(job.members)
    if request.seconds is not None and job.node_hours is not None:
        times = f" x {job.jobs} jobs" if job.jobs > 1 else ""
        rows["node-hours"] = (
            f"{request.allocated} x {request.seconds / 3600:.4g} h{times} = {job.node_hours:.4g} at most"
        )
        training = request.seconds - (request.signal_seconds if request.site.scheduler == "slurm" else 0)
        if seconds_per_step:
            rows["steps"] = (
                f"about {int(training / seconds_per_step)} per job, {seconds_per_step:.3g} s each ({measured})"
            )
        else:
            rows["steps"] = "not known: train a short run in this folder first, or give --seconds_per_step"
    return rows
