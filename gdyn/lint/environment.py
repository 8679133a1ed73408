"""What is known to be wrong with the variables that job scripts set and use. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gdyn.lint import request, variables
from gdyn.lint.findings import OLCF, PRACTICE, Finding, Rule, error, warning
from gdyn.lint.request import Job, Step


def misspelt_variable(job: Job) -> Iterator[Finding]:
    names = {entry.name: entry.line for entry in reversed(job.script.assignments)}
    uses = {use.name: use.line for use in reversed(job.script.uses) if use.name not in names}
    for name, line in {**uses, **names}.items():
        known = variables.meant(name)
        if known and known not in names:
            yield error(
                line,
                "misspelt-variable",
                f"{name} is no variable that any library reads; {known} is. The setting has no effect, silently.",
                f"Write {known}.",
                f"{PRACTICE}; names from the libraries' manuals",
            )


def valueless_variable(job: Job) -> Iterator[Finding]:
    given = {entry.name for entry in job.script.assignments if entry.has_value} | job.script.defined.keys()
    for entry in job.script.assignments:
        if not entry.name.startswith(variables.FAMILIES) or not entry.exported:
            continue
        if entry.has_value and not entry.value and not variables.MAY_BE_EMPTY.fullmatch(entry.name):
            what = f"{entry.name} is exported with an empty value"
        elif not entry.has_value and entry.name not in given and not variables.ALWAYS.fullmatch(entry.name):
            what = f"{entry.name} is exported but set nowhere in the script"
        else:
            continue
        cure = f"Give it a value, or `unset {entry.name}` if none is meant."
        yield warning(entry.line, "valueless-variable", f"{what}.", cure, PRACTICE)


def bad_value(job: Job) -> Iterator[Finding]:
    for entry in job.script.assignments:
        values = variables.VALUES.get(variables.meant(entry.name) or entry.name)
        value = job.script.resolve(entry.value, entry.line)
        if entry.name == "FI_MR_CACHE_MONITOR" and value == "memhooks":
            yield error(
                entry.line,
                "bad-value",
                "FI_MR_CACHE_MONITOR=memhooks makes RCCL and NCCL over libfabric hang.",
                "Use kdreg2, the default on Slingshot since 2025, or userfaultfd.",
                f"{OLCF}; olcf-user-docs issue 947",
            )
        elif values and value and not re.search(r"[$`]", value) and not values.test(value):
            yield error(
                entry.line,
                "bad-value",
                f'{entry.name} is "{value}"; it takes {values.words}.',
                "Give it one of those.",
                "the manual of the library that reads it",
            )


def network_pair(job: Job) -> Iterator[Finding]:
    if job.scheduler != "slurm":
        return
    asked = [
        entry
        for entry in job.script.assignments
        if (variables.meant(entry.name) or entry.name) == "FI_CXI_RDZV_PROTO" and entry.value == "alt_read"
    ]
    flags = [job.value("network"), *(step.options.get("network", "") for step in job.main_steps)]
    has_flag = any("disable_rdzv_get" in flag for flag in flags)
    hidden = any(step.opaque for step in job.main_steps) or "SLURM_NETWORK" in {e.name for e in job.script.assignments}
    if asked and not has_flag and not hidden:
        yield error(
            asked[0].line,
            "needs-network-flag",
            "FI_CXI_RDZV_PROTO=alt_read works only together with --network=disable_rdzv_get, which is not here.",
            "Add `#SBATCH --network=disable_rdzv_get`.",
            OLCF,
        )
    option = job.option("network")
    if option and "disable_rdzv_get" in option.value and not asked:
        yield warning(
            option.line,
            "needs-network-flag",
            "--network=disable_rdzv_get is there for FI_CXI_RDZV_PROTO=alt_read, which nothing here sets.",
            "Add `export FI_CXI_RDZV_PROTO=alt_read`, or take the option away.",
            OLCF,
        )


def unset_variable(job: Job) -> Iterator[Finding]:
    script = job.script
    known = {entry.name for entry in script.assignments if entry.has_value} | script.defined.keys()
    guarded = {use.name for use in script.uses if use.guarded}
    modules = any(entry.program in ("module", "ml", "spack") for entry in script.commands)
    # Another file may set anything; what nobody else sets is still found.
    elsewhere = any(request.sources_unknown(command) for command in script.commands)
    seen: set[str] = set()
    for use in script.uses:
        name = use.name
        if name in known | guarded | seen or variables.ALWAYS.fullmatch(name) or variables.meant(name):
            continue
        seen.add(name)
        full = variables.unprefixed(name, job.scheduler) if job.scheduler != "none" else None
        if full:
            yield error(
                use.line,
                "unset-variable",
                f"{name} is set nowhere: the scheduler's variable is {full}. Every job gets an empty string here.",
                f"Write ${full}.",
                PRACTICE,
            )
        elif not elsewhere and not name.startswith(variables.FAMILIES):
            if modules and variables.BY_MODULES.fullmatch(name):
                continue
            yield warning(
                use.line,
                "unset-variable",
                f"{name} is used but set nowhere in the script; it depends on the shell that submits.",
                f'Set it, or state that it must be given: `: "${{{name}:?}}"`.',
                "bash manual, shell parameter expansion",
            )


def gpu_masks(job: Job) -> Iterator[Finding]:
    source = "OLCF Frontier User Guide, 2026-07 (Slurm sets ROCR_VISIBLE_DEVICES; masks compose)"
    script = job.script
    rocr = script.assigned("ROCR_VISIBLE_DEVICES")
    for name in ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        mask = script.assigned(name)
        if mask is None:
            continue
        cure = "Set one of the two only; best none, and let srun's --gpus-per-task or --gpus-per-node decide."
        if rocr is not None and rocr.value and mask.value:
            left = _compose(script.resolve(rocr.value), script.resolve(mask.value))
            if left == "all":
                continue
            what = f"{name}={mask.value} counts within what ROCR_VISIBLE_DEVICES={rocr.value} leaves: it names {left}."
            yield error(mask.line, "gpu-masks", what, cure, source)
            continue
        one_each = [step for step in job.main_steps if _sees_one(job, step)]
        if re.search(r"SLURM_LOCALID|LOCAL_RANK", mask.value) and one_each:
            yield warning(
                mask.line,
                "gpu-masks",
                f"every task of line {one_each[0].command.line} sees one GPU, with index 0: {name}={mask.value} names "
                "no device but for the first task.",
                "Drop the mask, or --gpus-per-task and --gpu-bind.",
                source,
            )


def _compose(first: str, second: str) -> str:
    """What remains of two masks: "all" (of the second), "no device", "no device but for the first task", ..."""
    if "$" in first or "$" in second:
        one = re.fullmatch(r"\$\{?(SLURM_LOCALID|LOCAL_RANK)\}?", first)
        return "no device but for the first task" if one and "$" in second else "all"
    visible = [word for word in first.split(",") if word.strip()]
    wanted = [word.strip() for word in second.split(",") if word.strip()]
    if not all(word.isdigit() for word in wanted):
        return "all"
    # Both runtimes stop reading at the first index that does not exist.
    usable = 0
    while usable < len(wanted) and int(wanted[usable]) < len(visible):
        usable += 1
    return "all" if usable == len(wanted) else "no device" if usable == 0 else f"{usable} of {len(wanted)} devices"


def _sees_one(job: Job, step: Step) -> bool:
    bind = step.options.get("gpu-bind") or job.value("gpu-bind")
    per_task = step.options.get("gpus-per-task") or job.value("gpus-per-task")
    return bind != "none" if per_task == "1" else bind.startswith(("single:1", "per_task:1", "map_gpu"))


def fixed_port(job: Job) -> Iterator[Finding]:
    port = job.script.assigned("MASTER_PORT")
    cure = "Derive it from the job: MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)); or let rank 0 find a free one."
    what = "port 29500 is everybody's default: the second job on a node joins the first one's store, or cannot bind"
    source = "tried with torch 2.13, 2026-11; DeepSpeed issue 1923"
    if port and job.script.resolve(port.value) == "29500":
        yield warning(port.line, "fixed-port", f"MASTER_PORT: {what}.", cure, source)
        return
    for step in job.steps:
        text = " ".join((*step.program, *step.command.words))
        if re.search(r"--(master[_-]port|main_process_port)[= ]29500\b|--rdzv[_-]endpoint[= ]\S*:29500\b", text):
            yield warning(step.command.line, "fixed-port", f"{step.name}: {what}.", cure, source)
            return


def forwarded_variables(job: Job) -> Iterator[Finding]:
    """Variables that a launcher over ssh does not carry to the other nodes."""
    mine = re.compile(r"(FI|HSA|MIOPEN|OMP|NCCL|RCCL|ZE|CCL|TORCH|HIP|ROCR)_\w+")
    exported = {entry.name for entry in job.script.assignments if entry.exported and mine.fullmatch(entry.name)}
    for step in job.main_steps:
        words = step.command.words
        if step.launcher == "mpirun" and ("--hostfile" in words or "-hostfile" in words or "--host" in words):
            openmpi = {"-x", "--map-by", "--mca", "-mca"} & step.options.keys()
            listed = re.findall(r"[A-Z]\w+", step.options.get("-x", ""))
            missing = sorted(exported - set(listed))
            if openmpi and missing and "$" not in step.options.get("-x", ""):
                yield warning(
                    step.command.line,
                    "not-forwarded",
                    f"Open MPI's mpirun carries to other hosts what -x names only; not named: {', '.join(missing)}.",
                    " ".join(f"-x {name}" for name in missing[:8]),
                    "Open MPI 5.0 manual, mpirun",
                )
        if step.name == "deepspeed" and any(re.match(r"(--hostfile|-H)\b", word) for word in words):
            lost = sorted(name for name in exported if not name.startswith("NCCL_"))
            if lost and not any(word.startswith("--launcher") for word in words):
                yield warning(
                    step.command.line,
                    "not-forwarded",
                    f"deepspeed's pdsh does not carry {', '.join(lost)} to other hosts.",
                    "Write them to ~/.deepspeed_env, a NAME=value a line.",
                    "DeepSpeed 0.19.8, launcher/runner.py",
                )


RULES: tuple[Rule, ...] = (
    misspelt_variable,
    valueless_variable,
    bad_value,
    network_pair,
    unset_variable,
    gpu_masks,
    fixed_port,
    forwarded_variables,
)
