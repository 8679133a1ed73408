"""What is known to be wrong with the folders and files of job scripts. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from gdyn.lint.findings import BASH, OLCF, PRACTICE, Finding, Rule, error, warning
from gdyn.lint.request import Job
from gdyn.lint.script import Block, Command

_LOCAL = re.compile(
    r"(/tmp|/var/tmp|/dev/shm|/mnt/bb|/local/scratch|/local_scratch|/scratch/local|\$\{?TMPDIR\}?)(/|$)"
)


_EVERYWHERE = {"srun", "pdsh", "mpiexec", "mpirun", "clush", "pbsdsh", "parallel-ssh", "aprun"}


def one_node_directory(job: Job) -> Iterator[Finding]:
    if (job.nodes or 1) < 2:
        return
    script = job.script
    made_everywhere = " ".join(
        script.resolve(word, command.line)
        for command in script.commands
        if _EVERYWHERE & {command.program, *_owners(command)}
        for word in command.words
    )
    for command in script.commands:
        if command.program != "mkdir" or command.inside("nested") or command.inside("substitution"):
            continue
        for word in command.words[1:]:
            path = script.resolve(word, command.line)
            if word.startswith("-") or not _LOCAL.match(path) or path in made_everywhere:
                continue
            user = _user_of(job, path, word)
            if user:
                yield error(
                    command.line,
                    "one-node-directory",
                    f"{word} is node-local and mkdir runs on the first node only, but {user} on all {job.nodes} nodes.",
                    f"Make it on every node: srun -N $SLURM_JOB_NUM_NODES --ntasks-per-node=1 mkdir -p {word}"
                    if job.scheduler == "slurm"
                    else f"Make it on every node: mpiexec -ppn 1 mkdir -p {word}",
                    f"{PRACTICE}; {OLCF}",
                )


def _owners(command: Command) -> set[str]:
    """Programs of the commands that run the script strings around it."""
    return {block.owner.program for block in command.block.chain() if block.owner is not None}


def _user_of(job: Job, path: str, word: str) -> str:
    """What uses a path on all nodes, as "X is used"; empty if nothing does."""
    for entry in job.script.assignments:
        if entry.exported and _within(job.script.resolve(entry.value, entry.line), path):
            return f"{entry.name} is read"
    exported = {entry.name for entry in job.script.assignments if entry.exported and not entry.has_value}
    for entry in job.script.assignments:
        if entry.name in exported and _within(job.script.resolve(entry.value, entry.line), path):
            return f"{entry.name} is read"
    for step in job.main_steps:
        words = (job.script.resolve(part, step.command.line) for part in step.command.words)
        if step.launcher and any(_within(part.partition("=")[2] or part, path) for part in words):
            return f"the step of line {step.command.line} uses it"
    return ""


def _within(text: str, path: str) -> bool:
    return text == path or text.startswith(path.rstrip("/") + "/")


def unchecked_sbcast(job: Job) -> Iterator[Finding]:
    script = job.script
    errexit = _errexit(job)
    for index, command in enumerate(script.commands):
        if command.program != "sbcast" and not (command.program == "srun" and "--bcast" in " ".join(command.words[:1])):
            continue
        reaction, kind = _reaction(job, index)
        if kind == "ends" or (kind == "none" and errexit):
            continue
        what = {
            "none": "nothing looks at sbcast's exit code: a failed copy leaves half a file or none, and all goes on",
            "breaks": f"a failed sbcast ends the loop in line {reaction}, and the script goes on as if all was there",
            "goes on": f"a failed sbcast is noticed in line {reaction}, and the script goes on all the same",
        }[kind]
        yield error(
            command.line, "unchecked-sbcast", f"{what}.", "End the job: `sbcast ... || exit 1`.", f"{OLCF}, sbcast"
        )


def _errexit(job: Job) -> bool:
    """Whether `set -e` is in force."""
    shebang = job.script.text.partition("\n")[0]
    if re.match(r"#!.*sh\s+-\w*e", shebang):
        return True
    for command in job.script.commands:
        words = command.words
        if words[0] == "set" and (
            any(re.fullmatch(r"-[a-df-z]*e\w*", word) for word in words[1:]) or "errexit" in words[1:]
        ):
            return True
    return False


def _reaction(job: Job, index: int) -> tuple[int, Literal["none", "ends", "breaks", "goes on"]]:
    """What the script does when a command fails: (line, kind)."""
    commands = job.script.commands
    command = commands[index]
    condition = command.inside("condition")
    if command.after == "||":
        following = _after(commands, command)
    elif condition is not None:
        following = _branch_after(commands, index, condition)
        if command.before != "!":  # if sbcast; then ...; else ...; fi: the failure is the last branch's
            branches = {id(entry.block) for entry in following}
            following = (
                [entry for entry in following if id(entry.block) == id(following[-1].block)]
                if len(branches) > 1
                else []
            )
    else:
        rest = commands[index + 1 :]
        check = next((entry for entry in rest[:2] if re.search(r"\$\{?\?", " ".join(entry.words))), None)
        if check is None:
            kept = [entry for entry in job.script.assignments if entry.value == "$?" and entry.line >= command.line]
            return (kept[0].line, "ends") if kept and kept[0].line <= command.line + 2 else (0, "none")
        if check.after == "||" or check.after == "&&":
            following = _after(commands, check)
        else:
            inside = check.inside("condition")
            following = _branch_after(commands, commands.index(check), inside) if inside else []
    if not following:
        return (0, "none") if command.after != "||" and condition is None else (command.line, "goes on")
    if any(_ends(job, entry) for entry in following):
        return following[0].line, "ends"
    broken = [entry for entry in following if entry.program == "break"]
    return (broken[0].line, "breaks") if broken else (following[0].line, "goes on")


def _after(commands: list[Command], command: Command) -> list[Command]:
    """The commands on the right of an `||` or `&&`: one, or those of a group."""
    index = next(i for i, entry in enumerate(commands) if entry is command)
    following = commands[index + 1 : index + 2]
    if following and following[0].block is not command.block:
        inner = following[0].block
        return [entry for entry in commands[index + 1 :] if any(block is inner for block in entry.block.chain())]
    return following


def _branch_after(commands: list[Command], index: int, condition: Block) -> list[Command]:
    """The commands of the branches (or the loop) that a condition belongs to, after it."""
    whole = condition.parent
    return [
        entry
        for entry in commands[index + 1 :]
        if any(block is whole for block in entry.block.chain()) and not any(b is condition for b in entry.block.chain())
    ]


def _ends(job: Job, command: Command) -> bool:
    """Whether a command ends the script or its function with a failure, or is a function that does."""
    if command.program in ("exit", "return"):
        return command.words[1:2] != ("0",)
    if command.program == "false":
        return True
    inside = [
        entry
        for entry in job.script.commands
        if (block := entry.inside("function")) is not None and block.name == command.program
    ]
    return any(entry.program in ("exit", "kill", "scancel") for entry in inside)


def other_machines_path(job: Job) -> Iterator[Finding]:
    """Paths under the software tree or the file systems of a machine that is not this one."""
    own = job.site.name if job.site else ""
    seen: set[str] = set()
    for line, text in _values(job):
        found = re.search(r"/(?:ccs/)?sw/(crusher|summit|andes|spock|borg|frontier|peak|rhea|titan)\b", text)
        if found and found[1] != own and found[0] not in seen:
            seen.add(found[0])
            yield error(
                line,
                "other-machine",
                f"{found[0]} is the software tree of {found[1].capitalize()}, another machine.",
                "Use this machine's own: load its module (rccl-net-plugin on Frontier) or build it.",
                f"{PRACTICE}; {OLCF}",
            )


def _values(job: Job) -> Iterator[tuple[int, str]]:
    yield from ((entry.line, entry.value) for entry in job.script.assignments)
    yield from ((entry.line, " ".join(entry.words)) for entry in job.script.commands)


def unchecked_cd(job: Job) -> Iterator[Finding]:
    """A cd that may fail, before something that deletes by a relative path."""
    if _errexit(job):
        return
    shell = [entry for entry in job.script.commands if not entry.inside("substitution") and not entry.inside("nested")]
    for command in shell:
        target = job.script.resolve(command.words[1], command.line) if len(command.words) > 1 else ""
        if command.program != "cd" or command.tested or re.match(r"[-.]|$", target):
            continue
        for later in shell:
            relative = [word for word in later.words[1:] if not word.startswith(("/", "-", "$", "~"))]
            if later.program in ("rm", "mv") and later.line > command.line and relative:
                yield warning(
                    command.line,
                    "unchecked-cd",
                    f"if {command.words[1]} is not there, line {later.line} runs {later.program} in another folder.",
                    "`set -euo pipefail` at the top, or `cd ... || exit 1`.",
                    f"{BASH}, set -e",
                )
                return


RULES: tuple[Rule, ...] = (
    one_node_directory,
    unchecked_sbcast,
    other_machines_path,
    unchecked_cd,
)
