"""What a job script asks for and starts: the scheduler's options, the steps, the machine it is for. No torch."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath

from gdyn import sites
from gdyn.errors import UserError
from gdyn.lint.script import Command, Script, read
from gdyn.sites import Site

# sbatch(1) and srun(1); both commands together, where they mean the same.
_SHORT = dict(
    pair.split("=")
    for pair in """
    A=account a=array B=extra-node-info b=begin C=constraint c=cpus-per-task D=chdir d=dependency E=preserve-env
    e=error F=nodefile G=gpus H=hold h=help I=immediate i=input J=job-name K=kill-on-bad-exit k=no-kill L=licenses
    l=label M=clusters m=distribution N=nodes n=ntasks O=overcommit o=output p=partition Q=quiet q=qos r=relative
    S=core-spec s=oversubscribe T=threads t=time u=unbuffered V=version v=verbose W=wait w=nodelist X=disable-status
    x=exclude Z=no-allocate
    """.split()
)
_FLAGS = set(
    """
    contiguous disable-status exclusive exact get-user-env help hold ignore-pbs immediate interactive kill-on-bad-exit
    label multi-prog nice no-allocate no-kill no-requeue overcommit overlap oversubscribe parsable preserve-env
    propagate pty quiet reboot requeue resv-ports send-libs spread-job test-only unbuffered usage use-min-nodes
    verbose version whole compress bcast x11 stepmgr async
    """.split()
)
"""Without a value, or with one only after a `=`."""
OPTIONS = _FLAGS | set(
    """
    account acctg-freq array batch bb bbf bcast-exclude begin chdir cluster-constraint clusters comment constraint
    container container-id core-spec cores-per-socket cpu-bind cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot
    dependency distribution error exclude export export-file extra extra-node-info gid gpu-bind gpu-freq gpus
    gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint input job-name kill-on-invalid-dep licenses
    mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus mpi network nodefile nodelist nodes
    ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket oom-kill-step open-mode output partition
    power prefer priority profile qos relative reservation segment signal slurmd-debug sockets-per-node switches
    task-epilog task-prolog thread-spec threads threads-per-core time time-min tmp tres-bind tres-per-task uid wait
    wait-all-nodes wckey wrap epilog prolog het-group jobid accel-bind external-launcher treewidth
    consolidate-segments
    """.split()
)
"""The long options of sbatch and srun."""

_MPI_PAIRS = {"-genv", "--genv", "-env", "--env", "--mca", "-mca", "--pmixmca", "--prtemca"}
_MPI_SWITCHES = re.compile(
    r"-{1,2}(oversubscribe|verbose|v|V|q|l|report-bindings|display-map|tag-output|allow-run-as-root|nolocal|bynode|no-vni"
    r"|label|line-buffer|prepend-rank|genvall|envall|genvnone|display|nooversubscribe|enable-recovery)|--[\w-]+=.*"
)
_LAUNCHERS = set("srun mpirun mpiexec mpiexec.hydra mpiexec.slurm aprun jsrun flux prun".split())
TORCH_LAUNCHERS = {"torchrun", "deepspeed", "accelerate"}
_PROGRAMS = {*TORCH_LAUNCHERS, "python", "python3", "gdyn", "horovodrun"}
_HELPERS = set(
    """
    hostname mkdir rm cp mv tar ls echo printf cat true sleep chmod ln test [ df du date which find unzip zstd gzip
    pigz rsync touch sbcast conda-unpack id nvidia-smi rocm-smi amd-smi rocminfo xpu-smi lscpu numactl taskset ulimit
    env printenv uname stat head tail grep kill pkill set export source . module lfs sync nproc md5sum sha256sum cmp
    cd exit : (( [[ trap wait break continue local return
    """.split()
)
"""Programs of steps that prepare or look, rather than compute."""

SIGNALS = {"10": "USR1", "12": "USR2", "15": "TERM", "2": "INT", "1": "HUP"}


def signal_name(text: str) -> str:
    """USR1 for SIGUSR1, usr1 and 10."""
    return SIGNALS.get(text, text.upper().removeprefix("SIG"))


@dataclass(frozen=True)
class Directive:
    """One option of the scheduler, under its long name (`select`, `walltime`, ... of `#PBS -l` are options, too)."""

    name: str
    value: str
    line: int


@dataclass(frozen=True)
class DirectiveLine:
    """A line of directives as it stands."""

    line: int
    text: str
    """What follows #SBATCH or #PBS."""
    words: tuple[str, ...]
    stray: tuple[str, ...]
    """Words that belong to no option."""
    late: bool
    """Whether a command stands before it, so that the scheduler does not read it."""


@dataclass(frozen=True)
class Step:
    """A command that starts the computation, or a helper, on the job's nodes."""

    command: Command
    launcher: str
    """srun, mpirun, ...; empty for a program that the batch shell starts itself."""
    options: Mapping[str, str]
    """Long name -> value, of srun; of others the words as they stand -> the next word."""
    program: tuple[str, ...]
    opaque: bool
    """Whether some of its options are in a variable whose value is not known."""
    replaces_shell: bool
    """Started by `exec`."""
    prefix: Mapping[str, str]
    """Variables set for it alone."""

    @property
    def name(self) -> str:
        return PurePath(self.program[0]).name if self.program and self.program[0] else ""

    @property
    def torch_launcher(self) -> bool:
        """Whether it starts a program that starts the workers itself."""
        modules = ("torch.distributed.run", "torch.distributed.launch", "deepspeed.launcher.launch")
        return self.name in TORCH_LAUNCHERS or ("-m" in self.program and any(word in modules for word in self.program))

    def count(self, name: str) -> int | None:
        """The whole number an option gives."""
        return _count(self.options.get(name, ""))


@dataclass(frozen=True)
class Job:
    """A script together with what is known of where it runs."""

    script: Script
    scheduler: str
    """slurm, pbs or none."""
    site: Site | None
    lines: tuple[DirectiveLine, ...]
    directives: tuple[Directive, ...]
    """Those that the scheduler reads, in order."""

    def option(self, *names: str) -> Directive | None:
        """The last directive of one of those names."""
        return next((entry for entry in reversed(self.directives) if entry.name in names), None)

    def value(self, *names: str) -> str:
        found = self.option(*names)
        return found.value if found else ""

    @cached_property
    def nodes(self) -> int | None:
        """Nodes asked for; None: not said, or not as a number."""
        if self.scheduler == "pbs":
            chunks = re.findall(r"(?:^|\+)(\d+)(?=[:+]|$)", self.value("select", "nodes"))
            return sum(map(int, chunks)) if chunks else None
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", self.value("nodes"))
        return int(found[2] or found[1]) if found else None

    @cached_property
    def tasks_per_node(self) -> int | None:
        """As a directive says, or the main step, or as -n and -N give."""
        stated = _count(self.value("ntasks-per-node"))
        if stated is not None:
            return stated
        for step in self.main_steps:
            told = step.count("ntasks-per-node") or step.count("-ppn") or step.count("--ppn")
            if told is not None:
                return told
            tasks, nodes = step.count("ntasks"), step.count("nodes") or self.nodes
            if tasks and nodes and tasks % nodes == 0:
                return tasks // nodes
        total = _count(self.value("ntasks"))
        return total // self.nodes if total and self.nodes and total % self.nodes == 0 else None

    @cached_property
    def gpus_per_node(self) -> int | None:
        found = re.search(r"(?:^|[:=])(\d+)$", self.value("gpus-per-node"))
        gres = re.search(r"gpu(?::[a-zA-Z]\w*)?:(\d+)", self.value("gres"))
        return int(found[1]) if found else int(gres[1]) if gres else None

    @property
    def cpus_per_task(self) -> int | None:
        return _count(self.value("cpus-per-task"))

    @cached_property
    def seconds(self) -> float | None:
        text = self.value("walltime" if self.scheduler == "pbs" else "time")
        try:
            return sites.seconds(text) if text else None
        except UserError:
            return None

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """In order; not those of command substitutions or of scripts inside other steps."""
        return tuple(_steps(self.script))

    @cached_property
    def main_steps(self) -> tuple[Step, ...]:
        """The steps that are no helpers."""
        return tuple(step for step in self.steps if not self.helps(step))

    def helps(self, step: Step) -> bool:
        if (
            step.name in ("python", "python3")
            and len(step.program) > 1
            and step.program[1] in ("-c", "-V", "--version", "-")
        ):
            return True
        if step.name in ("bash", "sh"):
            inner = [entry for entry in self.script.commands if _owner(entry) is step.command]
            if inner:
                return all(entry.program in _HELPERS or _bare(entry.words) in _HELPERS for entry in inner)
        return step.name in _HELPERS or (not step.program and not step.opaque)

    def in_background(self, command: Command) -> bool:
        """Also where a function around it is called in the background."""
        if command.in_background:
            return True
        function = command.inside("function")
        calls = [entry for entry in self.script.commands if function and entry.program == function.name]
        return any(entry.in_background for entry in calls)


def _bare(words: tuple[str, ...]) -> str:
    """The program behind `exec`, `time`, ..."""
    rest = _unwrapped(words)[0]
    return PurePath(rest[0]).name if rest and rest[0] else ""


def _owner(command: Command) -> Command | None:
    nested = command.inside("nested")
    return nested.owner if nested else None


def _count(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d+", text) else None


# ---- directives ---------------------------------------------------------------------------------------------------


def split_options(words: list[str], sbatch: bool = True) -> tuple[list[tuple[str, str]], list[str]]:
    """Words of sbatch or srun -> (long name, value) pairs and the words from the first that is no option on."""
    found: list[tuple[str, str]] = []
    rest = list(words)
    while rest and rest[0].startswith("-") and rest[0] not in ("-", "--"):
        word = rest.pop(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = _long(name)
            flag = name in _FLAGS or (name == "wait" and sbatch)
            if not equals and not flag and rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            found.append((name, value))
            continue
        letters = word[1:]
        while letters:
            name = _SHORT.get(letters[0], letters[0])
            letters = letters[1:]
            if name == "wait" and sbatch:
                found.append((name, ""))
            elif name in _FLAGS:
                digits = re.match(r"\d*", letters)
                value = digits[0] if digits and name in ("kill-on-bad-exit", "immediate") else ""
                letters = letters[len(value) :]
                found.append((name, value))
            else:
                found.append((name, letters if letters or not rest else rest.pop(0)))
                letters = ""
    return found, rest[1:] if rest[:1] == ["--"] else rest


def _long(name: str) -> str:
    """getopt's unambiguous abbreviations, written out."""
    candidates = [full for full in OPTIONS if full.startswith(name)]
    return name if name in OPTIONS or len(candidates) != 1 else candidates[0]


_PBS = {"A": "account", "N": "job-name", "q": "queue", "o": "output", "e": "error", "r": "rerun", "W": "attributes"}


def _pbs_options(words: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    found, stray, rest = list[tuple[str, str]](), list[str](), list(words)
    while rest:
        word = rest.pop(0)
        if not re.match(r"-[a-zA-Z]", word):
            stray.append(word)
            continue
        letter, value = word[1], word[2:]
        if not value and letter not in "VXzhfI" and rest:
            value = rest.pop(0)
        if letter == "l":
            # select=2:ncpus=4,walltime=1:00:00: a comma before name= separates resources
            for resource in re.split(r",(?=\w+=)", value):
                name, _, text = resource.partition("=")
                found.append((name, text))
        else:
            found.append((_PBS.get(letter, letter), value))
    return found, stray


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError:
        return text.split()


def _directives(script: Script, scheduler: str) -> tuple[list[DirectiveLine], list[Directive]]:
    mark = "#PBS" if scheduler == "pbs" else "#SBATCH"
    lines, found = list[DirectiveLine](), list[Directive]()
    for line, text in script.comments:
        if not text.startswith(mark) or scheduler == "none":
            continue
        rest = text[len(mark) :]
        words = _words(rest)
        if scheduler == "pbs":
            pairs, stray = _pbs_options(words)
        else:
            pairs, stray = _all_options(words)
        late = 0 < script.first_command < line
        lines.append(DirectiveLine(line, rest.strip(), tuple(words), tuple(stray), late))
        if not late:
            found += [Directive(name, value, line) for name, value in pairs]
    return lines, found


def _all_options(words: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Options also behind stray words, so that one slip does not hide the rest of a line."""
    found, stray, rest = list[tuple[str, str]](), list[str](), list(words)
    while rest:
        pairs, rest = split_options(rest)
        found += pairs
        if rest:
            stray.append(rest.pop(0))
    return found, stray


# ---- steps --------------------------------------------------------------------------------------------------------


def _unwrapped(words: tuple[str, ...]) -> tuple[tuple[str, ...], bool, dict[str, str]]:
    """Words without what goes before a program (`exec`, `time`, `timeout 1h`, `env A=1`); whether by exec; A=1."""
    rest, replaces, prefix = list(words), False, dict[str, str]()
    while rest:
        name = PurePath(rest[0]).name if rest[0] else ""
        if name in ("exec", "time", "nohup", "command", "eval", "builtin", "setsid"):
            replaces = replaces or name == "exec"
            rest.pop(0)
        elif name in ("timeout", "stdbuf", "nice", "numactl", "taskset", "ionice"):
            rest.pop(0)
            while rest and rest[0].startswith("-"):
                rest.pop(0)
            if name in ("timeout", "taskset") and rest:
                rest.pop(0)
        elif name == "env":
            rest.pop(0)
            while rest and ("=" in rest[0] or rest[0].startswith("-")):
                key, _, value = rest.pop(0).partition("=")
                prefix[key] = value
        else:
            break
    return tuple(rest), replaces, prefix


def _steps(script: Script) -> Iterator[Step]:
    for command in script.commands:
        if command.inside("substitution") or command.inside("nested"):
            continue
        words, replaces, prefix = _unwrapped(script.expanded(command))
        if starts_program(words):
            yield _step(command, words, replaces, prefix)
        # a program that starts another: supervise.py ... -- srun ... train.py
        if "--" in words and not _starts(words, _LAUNCHERS):
            inner = words[words.index("--") + 1 :]
            if starts_program(inner):
                yield _step(command, inner, replaces, prefix)


def _starts(words: tuple[str, ...], programs: Collection[str]) -> bool:
    return bool(words and words[0]) and PurePath(words[0]).name in programs


def starts_program(words: tuple[str, ...]) -> bool:
    """Whether they begin with a launcher, or with a program such as python."""
    return _starts(words, _LAUNCHERS | _PROGRAMS)


def _step(command: Command, words: tuple[str, ...], replaces_shell: bool, prefix: Mapping[str, str]) -> Step:
    name = PurePath(words[0]).name
    launcher = name if name in _LAUNCHERS else ""
    options, program = dict[str, str](), words
    if name == "srun":
        pairs, rest = split_options(list(words[1:]), sbatch=False)
        options, program = dict(pairs), tuple(rest)
    elif launcher:
        options, program = _mpi_options(words[1:])
    opaque = bool(launcher and program) and re.fullmatch(r"\$\w+|\$\{\w+(\[[@*]\])?[^}]*\}", program[0]) is not None
    inner, _, more = _unwrapped(program)
    return Step(command, launcher, options, inner, opaque, replaces_shell, {**dict(command.prefix), **prefix, **more})


def _mpi_options(words: tuple[str, ...]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Roughly, as flavours differ: options with their next word, and the program from the first other word on."""
    options, rest = dict[str, str](), list(words)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        if word in _MPI_PAIRS:
            options.setdefault(word, " ".join(rest[:2]))
            del rest[:2]
        elif not _MPI_SWITCHES.fullmatch(word):
            value = rest.pop(0) if rest else ""
            options[word] = f"{options[word]} {value}" if word == "-x" and word in options else value
        else:
            name, _, value = word.partition("=")
            options[name] = value
    return options, tuple(rest)


def sources_unknown(command: Command) -> bool:
    """Whether it reads a file of shell code that may set more than an environment's own variables."""
    if command.program not in ("source", ".") or len(command.words) < 2:
        return False
    return not re.search(
        r"(/bin/activate|^activate|conda\.sh|/etc/profile(\.d/.*)?|\.bashrc|lmod/.*|/init/bash)$", command.words[1]
    )


# ---- traps --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trap:
    """`trap HANDLER SIGNAL...` of the batch shell."""

    line: int
    signals: tuple[str, ...]
    commands: tuple[Command, ...]
    """What the handler runs."""


def traps(script: Script) -> list[Trap]:
    result = []
    for command in script.commands:
        if command.program != "trap" or len(command.words) < 3 or command.inside("nested"):
            continue
        handler, *names = [word for word in command.words[1:] if word != "--"]
        if handler in ("", "-"):
            continue
        inner = read(handler).commands
        called = {entry.program for entry in inner}
        inside = [entry for entry in script.commands if (block := entry.inside("function")) and block.name in called]
        result.append(Trap(command.line, tuple(map(signal_name, names)), (*inner, *inside)))
    return result


# ---- which machine ------------------------------------------------------------------------------------------------


def scheduler_of(script: Script) -> str:
    """slurm, pbs or none, by its directives and commands."""
    texts = [text for _, text in script.comments]
    if any(re.match(r"\s*#+\s*SBATCH\b", text) for text in texts):
        return "slurm"
    if any(text.startswith("#PBS") for text in texts):
        return "pbs"
    return "slurm" if any(command.program in ("srun", "sbcast") for command in script.commands) else "none"


def read_job(text: str, site: Site | None = None) -> Job:
    """Read a script. site: the machine it is for; None: found out, if it can be."""
    script = read(text)
    scheduler = scheduler_of(script)
    if scheduler == "none" and site is not None:
        scheduler = site.scheduler
    lines, directives = _directives(script, scheduler)
    job = Job(script, scheduler, site, tuple(lines), tuple(directives))
    return job if site is not None else Job(script, scheduler, likely_site(job), job.lines, job.directives)


def likely_site(job: Job) -> Site | None:
    """The one known machine that the script's shape and paths fit; None if none or several do."""
    scores = [(fits(job, site), site) for site in _machines(job)]
    most = max((score for score, _ in scores), default=0)
    best = [site for score, site in scores if score == most >= 5]
    return best[0] if len(best) == 1 else None


@functools.cache
def _known() -> tuple[Site, ...]:
    return tuple(site for site in map(sites.read, sites.sites()) if site.queues)


def _machines(job: Job) -> list[Site]:
    return [site for site in _known() if site.scheduler == job.scheduler]


def fits(job: Job, site: Site) -> int:
    """How well a script's shape (not its comments) fits a machine: 2 for each number or queue, 3 for each mark."""
    if site.scheduler != job.scheduler:
        return 0
    option = job.option("partition", "qos", "queue")
    named = {entry.value for entry in job.directives if entry.name in ("partition", "qos", "queue")}
    code = "\n".join(row for row in job.script.text.splitlines() if not re.match(r"\s*#(?!SBATCH|PBS)", row))
    marks = sum(bool(re.search(mark, code, re.MULTILINE)) for mark in site.facts.get("lint", {}).get("marks", ()))
    ranks = job.tasks_per_node if (job.tasks_per_node or 1) > 1 else job.gpus_per_node
    numbers = (ranks is not None and ranks == site.ranks_per_node) + (
        job.cpus_per_task is not None and job.cpus_per_task == site.cores_per_rank
    )
    queues = option is not None and any(queue.name in named and queue.option in _options(job) for queue in site.queues)
    return 3 * marks + 2 * numbers + 2 * queues


def _options(job: Job) -> set[str]:
    return {entry.name for entry in job.directives}


def named_in_comments(job: Job) -> dict[str, int]:
    """Machines that comments name -> line."""
    found: dict[str, int] = {}
    for site in _machines(job):
        words = site.facts.get("lint", {}).get("names", ())
        pattern = re.compile(r"\b(?:" + "|".join(map(re.escape, words)) + r")\b", re.IGNORECASE)
        hits = [line for line, text in job.script.comments if words and pattern.search(text) and "SBATCH" not in text]
        if hits:
            found[site.name] = hits[0]
    return found
