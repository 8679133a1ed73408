"""What is known to be wrong with what job scripts ask of the scheduler: directives, queues, limits. No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from gdyn import sites
from gdyn.errors import UserError
from gdyn.lint import request, variables
from gdyn.lint.findings import SBATCH, Finding, Rule, error, warning
from gdyn.lint.request import Job
from gdyn.sites import Queue, Site

_PLACEHOLDER = re.compile(
    r"<+[A-Za-z][\w .-]*>+|\b(?:CHANGE_?ME|TODO|FIXME|XXXX*|YOUR_[A-Z_]+|your_(?:project|account|email|name)\w*)\b"
)


def _source(site: Site) -> str:
    return str(site.facts.get("lint", {}).get("source", f"{site.path.name}, the site's file"))


def _mark(job: Job) -> str:
    return "#PBS" if job.scheduler == "pbs" else "#SBATCH"


# ---- directives as text -------------------------------------------------------------------------------------------


def placeholder(job: Job) -> Iterator[Finding]:
    for entry in job.lines:
        found = [match[0] for match in _PLACEHOLDER.finditer(entry.text)]
        if found:
            uneven = [text for text in found if text.count("<") != text.count(">")]
            what = f"{', '.join(found)} still stands where a value of yours belongs"
            what += f"; its brackets do not even match ({uneven[0]})" if uneven else ""
            yield error(entry.line, "placeholder", f"{what}.", "Fill it in, without the brackets.", SBATCH)
    for line, text in job.script.files:
        # outside quotes the shell takes <NAME> for a redirection
        row = job.script.text.splitlines()[line - 1]
        name = text.lstrip("<>&|")
        shown = (
            re.search(rf"(?<![<\d&])<{re.escape(name)}(?: [\w-]+)*>(?=[\s\"'/,;)]|$)", row) if text[0] == "<" else None
        )
        if shown and re.match(r"[A-Za-z]", name):
            yield error(
                line,
                "placeholder",
                f"{shown[0]} still stands where a value of yours belongs; the shell reads a file of that name.",
                "Fill it in, without the brackets.",
                "bash manual, redirections",
            )


def late_directive(job: Job) -> Iterator[Finding]:
    for entry in job.lines:
        if entry.late:
            yield error(
                entry.line,
                "late-directive",
                f"a command stands before it in line {job.script.first_command}; the scheduler reads directives up to "
                f"the first command only: `{entry.text}` has no effect.",
                "Move it to the top.",
                SBATCH,
            )


def unread_directive(job: Job) -> Iterator[Finding]:
    """Comments that look like directives and are none."""
    for line, text in job.script.comments:
        if 0 < job.script.first_command < line or job.scheduler == "none":
            continue
        row = text.strip()
        found = re.match(r"(#+)(\s*)([A-Za-z]{3,7})(?=\s+-{1,2}[A-Za-z])", row)
        if not found or text.startswith(_mark(job)) or len(found[1]) > 1:
            continue
        near = {"SBATCH": 2, "PBS": 1} if len(found[3]) > 3 else {"PBS": 0}
        if any(variables.distance(found[3].upper(), word, limit) <= limit for word, limit in near.items()):
            right = "SBATCH" if job.scheduler == "slurm" else "PBS"
            if found[3] == right and found[2] == "" and text.startswith("#"):
                continue
            yield warning(
                line,
                "unread-directive",
                f"`{row}` is a plain comment: only a line that begins with #{right} is read.",
                f"#{right} at the start of the line; ##{right} where it is switched off on purpose.",
                SBATCH,
            )


def directive_value(job: Job) -> Iterator[Finding]:
    for entry in job.lines:
        if entry.late or _PLACEHOLDER.search(entry.text):
            continue
        if entry.stray:
            yield error(
                entry.line,
                "directive-value",
                f'"{" ".join(entry.stray)}" belongs to no option (`{entry.text}`).',
                "No blanks around =; quotes around a value with blanks.",
                SBATCH,
            )
    for option in job.directives:
        if option.value.startswith("="):
            yield error(
                option.line,
                "directive-value",
                f'the value of {option.name} is read as "{option.value}": a short option takes no =.',
                f"Leave the = out, or write --{option.name}{option.value}.",
                SBATCH,
            )
        elif job.scheduler == "slurm" and option.name not in request.OPTIONS:
            near = difflib.get_close_matches(option.name, sorted(request.OPTIONS), 1, 0.8)
            if near:  # others may be a site's own plug-ins: --image, --module, --volume
                yield error(
                    option.line,
                    "directive-value",
                    f"sbatch has no option --{option.name}; there is --{near[0]}.",
                    f"Write --{near[0]}.",
                    SBATCH,
                )
        elif option.name in ("time", "walltime", "time-min") and not _PLACEHOLDER.search(option.value):
            if option.value.lower() in ("infinite", "unlimited"):
                continue
            try:
                sites.seconds(option.value)
            except UserError:
                yield error(
                    option.line,
                    "directive-value",
                    f'"{option.value}" is no wall time.',
                    "Write hours:minutes:seconds, e.g. 02:00:00.",
                    SBATCH,
                )


def log_folder(job: Job) -> Iterator[Finding]:
    if job.scheduler != "slurm":
        return
    seen: set[str] = set()
    for name in ("output", "error"):
        option = job.option(name)
        folder = Path(option.value).parent if option else Path()
        if option is None or str(folder) in (".", "/dev") or str(folder) in seen or folder.is_dir():
            continue
        seen.add(str(folder))
        if folder.is_absolute() and not folder.parent.is_dir():
            continue  # perhaps another machine's file system: cannot be seen from here
        made = [
            entry.line
            for entry in job.script.commands
            if entry.program == "mkdir" and any(word.rstrip("/") == str(folder) for word in entry.words[1:])
        ]
        late = f"; the script's own mkdir in line {made[0]} comes too late" if made else ""
        yield error(
            option.line,
            "log-folder",
            f"{folder}/ does not exist here, and Slurm does not make it{late}: it opens the log before the script "
            "starts, so the job fails at once and leaves no log that says so.",
            f"`mkdir -p {folder}` before sbatch, or let the log lie beside the script (--output=%x-%j.out).",
            "sbatch manual, Slurm 22.05; seen in public job scripts, 2026-08",
        )


# ---- queues and limits --------------------------------------------------------------------------------------------


def _queue(job: Job, site: Site) -> tuple[Queue | None, int]:
    """The queue whose limits hold (a quality of service before a partition), and the line that names it."""
    for name in ("qos", "queue", "partition"):
        option = job.option(name)
        queue = site.queue(option.value) if option else None
        if option and queue and queue.option == name:
            return queue, option.line
    default = site.facts.get("default_queue") or site.facts.get("lint", {}).get("unnamed_queue")
    named = any(job.option(entry.option) for entry in site.queues if entry.name == default)
    return (None if named or default is None else site.queue(default)), 0


def unknown_queue(job: Job) -> Iterator[Finding]:
    site = job.site
    if site is None or not site.queues or job.option("reservation"):
        return
    kinds = {queue.option for queue in site.queues}
    for kind in sorted(kinds):
        option = job.option(kind)
        if option is None or _PLACEHOLDER.search(option.value) or re.fullmatch(r"[RMS]\d+(\..*)?", option.value):
            continue
        names = [queue.name for queue in site.queues if queue.option == kind]
        wrong = [value for value in option.value.split(",") if value not in names]
        if not wrong:
            continue
        other = site.queue(wrong[0])
        near = difflib.get_close_matches(wrong[0], names, 1, 0.75)
        known = ", ".join(
            queue.name for queue in site.queues if queue.option == kind and (queue.direct or kind != "queue")
        )
        if other is not None:
            what, cure = f"{wrong[0]} is a {other.option} of {site.name}, no {kind}", f"--{other.option}={wrong[0]}"
        elif near:
            what, cure = f"{site.name} has no {kind} {wrong[0]}", f"Write {near[0]}."
        else:
            what, cure = f"{site.name} documents no {kind} {wrong[0]}", f"One of {known}."
        report = error if other is not None or near or kind == "queue" else warning
        yield report(option.line, "unknown-queue", f"{what}.", cure, _source(site))
    if "partition" not in kinds and (option := job.option("partition")) is not None:
        yield warning(
            option.line,
            "unknown-queue",
            f"{site.name}'s jobs choose a {' or '.join(sorted(kinds))}; a partition {option.value} is not documented.",
            f"--{sorted(kinds)[0]}, one of {', '.join(queue.name for queue in site.queues)}.",
            _source(site),
        )


def queue_limits(job: Job) -> Iterator[Finding]:
    site = job.site
    if site is None:
        return
    queue, line = _queue(job, site)
    if queue is None:
        return
    nodes = job.nodes or 1
    time = job.option("walltime", "time")
    where = job.option("nodes", "select")
    at = where.line if where else line
    implied = f"no {queue.option} is named, so the job lands in {queue.name}: " if not line else ""
    # A queue that others route to is PBS's; elsewhere "not direct" says what gdyn submit itself can use.
    if not queue.direct and queue.option == "queue":
        yield error(
            line,
            "routing-only-queue",
            f"jobs cannot be submitted to {queue.name} directly.",
            "Submit to the queue that routes to it" + (f": {queue.note}." if queue.note else "."),
            _source(site),
        )
    elif nodes < queue.min_nodes:
        what = f"{implied}{queue.name} starts at {queue.min_nodes} nodes, asked for {nodes}."
        yield error(at, "queue-size", what, _elsewhere(site, nodes, job.seconds or 0.0), _source(site))
    elif queue.max_nodes is not None and nodes > queue.max_nodes:
        what = f"{implied}{queue.name} ends at {queue.max_nodes} nodes, asked for {nodes}."
        yield error(at, "queue-size", what, _elsewhere(site, nodes, job.seconds or 0.0), _source(site))
    elif (
        time is not None
        and job.seconds is not None
        and (longest := queue.seconds(nodes)) is not None
        and job.seconds > longest
    ):
        yield error(
            time.line,
            "wall-time",
            f"{implied}in {queue.name} a job of {nodes} node{'s' * (nodes > 1)} may run for {sites.clock(longest)}, "
            f"asked for {sites.clock(job.seconds)}.",
            _elsewhere(site, nodes, job.seconds),
            _source(site),
        )


def _elsewhere(site: Site, nodes: int, seconds: float) -> str:
    """What the site would accept."""
    fitting = [
        queue.name
        for queue in site.queues
        if (queue.direct or queue.option != "queue")
        and nodes >= queue.min_nodes
        and (longest := queue.seconds(nodes)) is not None
        and seconds <= longest
    ]
    larger = sorted(
        below + 1
        for queue in site.queues
        for (below, _), (_, time) in zip(queue.limits, queue.limits[1:], strict=False)
        if time >= seconds and below >= nodes
    )
    ways = [f"{' or '.join(fitting)} would take it"] if fitting else []
    ways += [f"{larger[0]} nodes or more"] if larger and not fitting else []
    return ("; ".join([*ways, "or ask for less and submit a chain of jobs"])).capitalize() + "."


def unnamed_queue(job: Job) -> Iterator[Finding]:
    site = job.site
    if site is None or "default_queue" in site.facts or not job.directives:
        return
    default = site.facts.get("lint", {}).get("unnamed_queue")
    kinds = {queue.option for queue in site.queues}
    queue = site.queue(default) if default else None
    if queue is None or any(job.option(kind) for kind in kinds):
        return
    longest = queue.seconds(job.nodes or 1)
    if longest is not None and (job.seconds is None or job.seconds <= longest):
        limit = f"{queue.max_nodes} nodes and {sites.clock(longest)}"
        yield warning(
            job.directives[0].line,
            "unnamed-queue",
            f"no {queue.option} is named, so the job lands in {queue.name}: at most {limit}.",
            f"Name one: --{queue.option}={' or '.join(entry.name for entry in site.queues)}.",
            _source(site),
        )


def no_wall_time(job: Job) -> Iterator[Finding]:
    if job.scheduler == "none" or not job.directives or job.option("time", "walltime", "time-min"):
        return
    yield warning(
        job.directives[0].line,
        "no-wall-time",
        "no wall time is asked for: the queue's default holds. It may be minutes; or the limit, which waits longest.",
        "#PBS -l walltime=2:00:00" if job.scheduler == "pbs" else "#SBATCH --time=02:00:00",
        SBATCH,
    )


# ---- shapes -------------------------------------------------------------------------------------------------------


def _cpu_only(job: Job) -> bool:
    return bool(re.search(r"(^|[&|,])cpu\b", job.value("constraint")))


def ranks_and_devices(job: Job) -> Iterator[Finding]:
    site, gpus, tasks = job.site, job.gpus_per_node, job.tasks_per_node
    option = job.option("ntasks-per-node", "ntasks")
    at = option.line if option else (job.main_steps[0].command.line if job.main_steps else 0)
    devices = site.ranks_per_node if site else None
    if devices == 12 and (job.script.assigned("ZE_FLAT_DEVICE_HIERARCHY") or _NOTHING).value == "COMPOSITE":
        devices = 6  # whole GPUs instead of tiles
    source = _source(site) if site else SBATCH
    asked = job.option("gpus-per-node", "gres")
    if site and devices and gpus and gpus > devices and asked:
        yield error(
            asked.line,
            "gpus-per-node",
            f"a node of {site.name} has {devices} devices, asked for {gpus}.",
            f"--gpus-per-node={devices}",
            source,
        )
    wanted = gpus or (devices if not _cpu_only(job) else None)
    if tasks is None or tasks == 1 or wanted is None or any(step.torch_launcher for step in job.main_steps):
        return
    if tasks > wanted:
        report = error if site else warning  # elsewhere it may be meant: CPU ranks, MPS
        yield report(
            at,
            "ranks-per-node",
            f"{tasks} tasks share the {wanted} devices of a node.",
            f"One task a device: {wanted} a node.",
            source,
        )
    elif tasks < wanted and not job.option("gpus-per-task"):
        yield warning(
            at,
            "ranks-per-node",
            f"{tasks} tasks a node leave {wanted - tasks} of its {wanted} devices idle, which are paid for.",
            f"One task a device: {wanted} a node.",
            source,
        )


class _Empty:
    value = ""


_NOTHING = _Empty()


def cores_of_node(job: Job) -> Iterator[Finding]:
    site, cores, tasks = job.site, job.cpus_per_task, job.tasks_per_node
    option = job.option("cpus-per-task")
    if (
        site is None
        or option is None
        or cores is None
        or not site.ranks_per_node
        or not site.cores_per_rank
        or _cpu_only(job)
    ):
        return
    usable = site.ranks_per_node * site.cores_per_rank
    if (tasks or 1) * cores > usable and not job.option("core-spec"):
        yield error(
            option.line,
            "cores",
            f"{tasks or 1} times {cores} cores are {(tasks or 1) * cores}; a node of {site.name} has {usable}.",
            f"--cpus-per-task={usable // (tasks or 1)}",
            _source(site),
        )


def wrong_centre(job: Job) -> Iterator[Finding]:
    named = request.named_in_comments(job)
    shape = request.likely_site(job)
    if shape is None:
        return
    wrong = {
        name: line for name, line in named.items() if name != shape.name and request.fits(job, sites.read(name)) == 0
    }
    if shape.name in named:
        wrong = {}
    if job.site is not None and job.site.queues and job.site.name != shape.name and request.fits(job, job.site) == 0:
        wrong.setdefault(job.site.name, job.directives[0].line if job.directives else 1)
    for name, line in wrong.items():
        yield error(
            line,
            "wrong-centre",
            f"this says {sites.read(name).title.partition(',')[0]}, but the shape is {shape.title.partition(',')[0]}'s "
            f"({shape.ranks_per_node} devices a node, its queues).",
            f"Correct the heading, or the numbers: {sites.read(name).title}.",
            f"{_source(shape)}; {_source(sites.read(name))}",
        )


RULES: tuple[Rule, ...] = (
    placeholder,
    late_directive,
    unread_directive,
    directive_value,
    log_folder,
    unknown_queue,
    queue_limits,
    unnamed_queue,
    no_wall_time,
    ranks_and_devices,
    cores_of_node,
    wrong_centre,
)
