"""What is known to be wrong with how job scripts take signals and requeue. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gdyn.lint import request
from gdyn.lint.findings import SLURM_SEEN, Finding, Rule, error, warning
from gdyn.lint.request import Job


def _signal(job: Job) -> tuple[int, bool, str, float] | None:
    """(line, whether only the batch shell gets it, name, seconds before the end) of --signal."""
    option = job.option("signal")
    found = re.fullmatch(r"(?:([RB]+):)?(\w+)(?:@(\d+))?", option.value) if option else None
    if option is None or found is None:
        return None
    return option.line, "B" in (found[1] or ""), request.signal_name(found[2]), float(found[3] or 60)


def foreground_step(job: Job) -> Iterator[Finding]:
    signal = _signal(job)
    if signal is None or not signal[1]:
        return
    line, _, name, _ = signal
    caught = [trap for trap in request.traps(job.script) if name in trap.signals]
    exec_steps = [step for step in job.main_steps if step.replaces_shell]
    execs = [entry for entry in job.script.commands if entry.words[0] == "exec" and len(entry.words) > 1]
    if not caught:
        ignored = any(
            entry.program == "trap" and name in map(request.signal_name, entry.words) for entry in job.script.commands
        )
        hidden = any(request.sources_unknown(entry) for entry in job.script.commands)
        if not exec_steps and not execs and not ignored and not hidden:
            yield error(
                line,
                "signal-without-trap",
                f"--signal=B:{name} goes to the batch shell alone, which has no trap for it: {name} ends the job.",
                "Add a trap that passes it on, start the program with exec, or drop `B:`.",
                SLURM_SEEN,
            )
        return
    first = min(trap.line for trap in caught)
    for step in job.main_steps:
        if step.command.line >= first and not step.replaces_shell and not job.in_background(step.command):
            yield error(
                step.command.line,
                "foreground-step",
                f"bash runs the trap of line {first} only when this command has returned: {name} is lost, and the job "
                "is killed at its limit.",
                "Start it in the background and wait: `srun ... & pid=$!; wait $pid`.",
                SLURM_SEEN,
            )


def wait_returns_early(job: Job) -> Iterator[Finding]:
    signal = _signal(job)
    if signal is None or not signal[1]:
        return
    name = signal[2]
    caught = [trap for trap in request.traps(job.script) if name in trap.signals]
    last_words = {"wait", "exit", "scancel", "exec"}
    handled = any(entry.program in last_words for trap in caught for entry in trap.commands)
    requeues = any("requeue" in entry.words for trap in caught for entry in trap.commands)
    if not caught or handled or requeues or not any(job.in_background(step.command) for step in job.main_steps):
        return
    waits = [entry for entry in job.script.commands if entry.program == "wait" and not entry.inside("substitution")]
    if len(waits) == 1 and not waits[0].inside("loop"):
        yield error(
            waits[0].line,
            "wait-returns-early",
            f"when {name} arrives, `wait` returns at once (its code is above 128): the script ends, and the job with "
            "it, before the step has saved anything.",
            'Wait until it has ended: `while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done`.',
            SLURM_SEEN,
        )


def requeue_and_exit_zero(job: Job) -> Iterator[Finding]:
    if job.option("requeue") is None:
        return
    for trap in request.traps(job.script):
        programs = [entry.program for entry in trap.commands]
        requeued = any("requeue" in entry.words or entry.program == "sbatch" for entry in trap.commands)
        zero = [entry for entry in trap.commands if entry.program == "exit" and entry.words[1:2] == ("0",)]
        if (
            zero
            and not requeued
            and "exec" not in programs
            and set(trap.signals) & {"USR1", "USR2", "TERM", "INT", "CONT"}
        ):
            yield error(
                trap.line,
                "requeue-exits-zero",
                "the handler exits 0: the job counts as completed. --requeue puts a job back when a node fails or when "
                "it is preempted, not when its script ends.",
                "Call `scontrol requeue $SLURM_JOB_ID` in the handler.",
                SLURM_SEEN,
            )


def append_mode(job: Job) -> Iterator[Finding]:
    requeue = job.option("requeue")
    calls = [entry for entry in job.script.commands if entry.program == "scontrol" and "requeue" in entry.words]
    if job.scheduler != "slurm" or (requeue is None and not calls):
        return
    output = job.value("output")
    if job.value("open-mode") != "append" and not re.search(r"%r", output):
        yield warning(
            requeue.line if requeue else calls[0].line,
            "append-mode",
            "the job may be requeued, and without --open-mode=append its next start empties the log.",
            "Add `#SBATCH --open-mode=append`.",
            SLURM_SEEN,
        )


def warning_time(job: Job) -> Iterator[Finding]:
    signal = _signal(job)
    if signal is None:
        return
    line, _, name, before = signal
    if job.seconds is not None and before >= job.seconds > 0:
        yield error(
            line,
            "warning-time",
            f"{name} is sent {before:.0f} s before the end of a job of {job.seconds:.0f} s: as it starts.",
            "Warn later, or ask for more time.",
            "sbatch manual, Slurm 22.05",
        )
    elif before < 120 and (job.nodes or 1) > 0 and job.main_steps:
        yield warning(
            line,
            "warning-time",
            f"{name} is sent {before:.0f} s before the end; a step, an agreement of all ranks and a checkpoint on disk "
            "rarely fit.",
            "Ask for twice the time a checkpoint takes, 300 s to begin with: --signal=B:USR2@300.",
            "practice of checkpointing trainers, 2026-11; Slurm counts in whole minutes",
        )


def signal_usr1(job: Job) -> Iterator[Finding]:
    signal = _signal(job)
    if signal is None or signal[2] != "USR1":
        return
    line, batch_only, _, _ = signal
    if batch_only:
        handled = [trap for trap in request.traps(job.script) if "USR1" in trap.signals]
        words = {
            request.signal_name(word.lstrip("-")) for trap in handled for entry in trap.commands for word in entry.words
        }
        if "USR1" not in words:
            return
    if not any(step.name.startswith(("python", "torchrun", "gdyn", "deepspeed")) for step in job.main_steps):
        return
    yield warning(
        line,
        "signal-usr1",
        "USR1 reaches the ranks, and NCCL may catch it.",
        "Use USR2.",
        "submitit, core/job_environment.py, 2025-12",
    )


RULES: tuple[Rule, ...] = (
    foreground_step,
    wait_returns_early,
    requeue_and_exit_zero,
    append_mode,
    warning_time,
    signal_usr1,
)
