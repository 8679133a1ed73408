"""What is known to be wrong with how job scripts start programs. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gdyn.lint import request
from gdyn.lint.findings import OLCF_TORCH, PRACTICE, SLURM_SEEN, Finding, Rule, error, warning
from gdyn.lint.request import Job, Step
from gdyn.lint.script import Block, Command


def _several(job: Job, step: Step) -> bool:
    """Whether an srun has more than one task, or may have."""
    tasks = step.count("ntasks")
    if tasks is not None:
        return tasks > 1
    per_node = step.count("ntasks-per-node") or job.tasks_per_node
    nodes = step.count("nodes") or job.nodes
    return (per_node or 1) * (nodes or 1) > 1 or any(
        "$" in step.options.get(name, "") for name in ("ntasks", "nodes", "ntasks-per-node")
    )


def cores_not_inherited(job: Job) -> Iterator[Finding]:
    option = job.option("cpus-per-task")
    if option is None or _set_anywhere(job, "SRUN_CPUS_PER_TASK"):
        return
    for step in _sruns(job):
        if "cpus-per-task" not in step.options and "cpus-per-gpu" not in step.options:
            yield warning(
                step.command.line,
                "cores-not-inherited",
                f"since Slurm 22.05 srun does not inherit --cpus-per-task={option.value}: tasks may get one core.",
                "Repeat it: `srun -c $SLURM_CPUS_PER_TASK ...`, or export SRUN_CPUS_PER_TASK.",
                "Slurm release notes, 22.05",
            )


def _sruns(job: Job) -> list[Step]:
    """Main steps by srun, whose options are known."""
    return [step for step in job.main_steps if step.launcher == "srun" and not step.opaque]


def _set_anywhere(job: Job, name: str) -> bool:
    return job.script.assigned(name) is not None


def kill_on_bad_exit(job: Job) -> Iterator[Finding]:
    if job.script.assigned("SLURM_KILL_BAD_EXIT") is not None or any(
        "no-kill" in step.options for step in job.main_steps
    ):
        return
    for step in _sruns(job):
        value = step.options.get("kill-on-bad-exit")
        if _several(job, step) and (value is None or value == "0"):
            yield warning(
                step.command.line,
                "kill-on-bad-exit",
                "when one task fails the others go on and hang in their next collective until the limit.",
                "Add --kill-on-bad-exit=1 to srun (some clusters set it for all).",
                f"{SLURM_SEEN}; PyTorch issue 76287",
            )
            return


def mpi_flavour(job: Job) -> Iterator[Finding]:
    cray = any(
        entry.program in ("module", "ml") and re.search(r"PrgEnv-|cray-mpich|craype|\bcpe/", " ".join(entry.words))
        for entry in job.script.commands
    )
    mpi4py = "mpi4py" in job.script.text
    for step in _sruns(job):
        flavour = step.options.get("mpi")
        if flavour in ("pmix", "pmi2", "openmpi") and cray:
            what = f"--mpi={flavour} does not serve HPE Cray MPICH, whose modules this script loads"
            cure = "Use --mpi=cray_shasta, or leave the option out where it is the default."
        elif flavour == "none" and mpi4py and _several(job, step):
            what = (
                "--mpi=none makes every task of an MPI program rank 0 of 1: so many separate models, without an error"
            )
            cure = "Use the flavour of the MPI behind mpi4py: --mpi=pmix for Open MPI, cray_shasta for Cray MPICH."
        else:
            continue
        yield warning(step.command.line, "mpi-flavour", f"{what}.", cure, SLURM_SEEN)


def nested_launcher(job: Job) -> Iterator[Finding]:
    for step in job.main_steps:
        if step.launcher != "srun" or not step.torch_launcher or step.opaque:
            continue
        per_node, nodes = step.count("ntasks-per-node"), step.count("nodes") or job.nodes
        total = step.count("ntasks")
        if per_node is None and total is not None and nodes:
            per_node = -(-total // nodes)
        per_node = per_node if per_node is not None else job.tasks_per_node
        words = " ".join(step.program)
        single = re.search(r"--nproc[_-]per[_-]node[= ]1\b", words)
        if per_node is not None and per_node > 1 and not single:
            yield error(
                step.command.line,
                "nested-launcher",
                f"srun starts {per_node} tasks a node, each {step.name} with all workers: {per_node} times too many.",
                f"One task a node (`srun --ntasks-per-node=1 {step.name} ...`), or srun alone with one task a GPU.",
                OLCF_TORCH,
            )
        elif (
            "cpus-per-task" not in step.options
            and not _set_anywhere(job, "SRUN_CPUS_PER_TASK")
            and "exclusive" not in step.options
        ):
            yield warning(
                step.command.line,
                "nested-launcher",
                f"{step.name} inside srun without -c: all its workers share one core, over ten times slower.",
                "Give the task the node's cores (`srun -c ...`), or start one task a GPU with srun alone.",
                OLCF_TORCH,
            )


def hidden_exit_code(job: Job) -> Iterator[Finding]:
    script = job.script
    pipefail = any(entry.words[0] == "set" and "pipefail" in entry.words for entry in script.commands)
    status = "PIPESTATUS" in script.text
    for step in job.main_steps:
        if step.command.after in ("|", "|&") and not pipefail and not status:
            yield warning(
                step.command.line,
                "hidden-exit-code",
                "the pipe's exit code is that of its last command: the job succeeds when the program fails.",
                "`set -o pipefail` before it.",
                "bash manual, pipelines",
            )


def halved_power(job: Job) -> Iterator[Finding]:
    """A "largest power of two" that halves exact powers of two. Two usual forms are known; nothing is executed."""
    for loop in job.script.blocks:
        conditions = [entry for entry in job.script.commands if _condition_of(entry, loop)]
        if loop.kind != "loop" or not conditions:
            continue
        bound = _squeezed(" ".join(conditions[0].words)).replace("-lt", "<")
        after = _squeezed("".join(job.script.text.splitlines(keepends=True)[loop.lines[0] - 1 : loop.lines[1] + 3]))
        for name in sorted(_doubled(job, loop)):
            below = rf"(?<!\w)({name}\*2|2\*{name}|{name}<<1)\)*<(?![=<])"
            up_to = rf"(?<![\w*<]){name}\)*<(?![=<])"
            halved = re.search(rf"(?<!\w){name}(/2|>>1)(?!\d)", after)
            if re.search(below, bound) or (re.search(up_to, bound) and halved):
                yield error(
                    conditions[0].line,
                    "halved-power",
                    f"this doubling of {name} stops below its bound: an exact power of two is halved, 8 gives 4.",
                    "Compare with <= (-le).",
                    PRACTICE,
                )
                break


def _condition_of(command: Command, loop: Block) -> bool:
    condition = command.inside("condition")
    return condition is not None and condition.parent is loop


def _squeezed(text: str) -> str:
    """Without blanks, quotes and $, so that spellings of one expression look alike."""
    return re.sub(r"[\s$\"{}]", "", text)


def _doubled(job: Job, loop: Block) -> set[str]:
    """Variables that are doubled in a loop's lines."""
    first, last = loop.lines
    texts = [f"{entry.name}={entry.value}" for entry in job.script.assignments if first <= entry.line <= last]
    texts += [word for entry in job.script.commands if first <= entry.line <= last for word in entry.words[1:]]
    pattern = re.compile(r"(\w+)(?:\*=2|<<=1|=\(*(?:\1\*2|2\*\1|\1<<1)\)*)")
    return {found[1] for text in texts if (found := pattern.fullmatch(_squeezed(text)))}


def nothing_runs(job: Job) -> Iterator[Finding]:
    """A command that is put together in a variable and never run."""
    if job.steps or not job.directives:
        return
    used = {use.name for use in job.script.uses}
    for entry in job.script.assignments:
        first = entry.value.split(" ")[0]
        if entry.name not in used and not entry.exported and request.starts_program((first,)) and " " in entry.value:
            yield error(
                entry.line,
                "nothing-runs",
                f"{entry.name} holds a command, and nothing runs it: the job ends at once, successfully.",
                f"Start it: `srun ${entry.name}`.",
                PRACTICE,
            )


RULES: tuple[Rule, ...] = (
    cores_not_inherited,
    kill_on_bad_exit,
    mpi_flavour,
    nested_launcher,
    hidden_exit_code,
    halved_power,
    nothing_runs,
)
