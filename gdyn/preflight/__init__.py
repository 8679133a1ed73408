"""Preflight: is this job healthy, before it spends its node-hours?

Every rank says where it is; links, storage and memory are measured with the run's own data, model and folder, each for
a bounded time (`limits.Limits`); rank 0 judges. The same code runs as a program (`gdyn preflight`) and as the first
seconds of a job.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from gdyn import ds_config, rundir
from gdyn.errors import UserError
from gdyn.preflight import bandwidth, facts, memory, storage, table
from gdyn.preflight.bandwidth import Fabric, Layout
from gdyn.preflight.facts import Report
from gdyn.preflight.judge import SHOWN, Demand, Finding, judge, named
from gdyn.preflight.limits import Limits
from gdyn.preflight.memory import Trial
from gdyn.ranks import AgreedError

if TYPE_CHECKING:
    from gdyn.trainer import Trainer

log = logging.getLogger("gdyn")
T = TypeVar("T")


@dataclass(frozen=True)
class Verdict:
    """What came out: the same on every rank."""

    refusals: tuple[str, ...] = ()
    """Why the job should not go on; empty: go."""
    warnings: tuple[str, ...] = ()
    blamed: tuple[str, ...] = ()
    """Nodes at fault: without them the job may go on. Empty where the fault is the run's, or nobody's."""

    @property
    def go(self) -> bool:
        return not self.refusals

    def __str__(self) -> str:
        if self.go:
            return "preflight: go" + (f", with {len(self.warnings)} warnings" if self.warnings else "")
        lines = ["preflight: no go:", *self.refusals[:SHOWN]]
        if len(self.refusals) > SHOWN:
            lines.append(f"... and {len(self.refusals) - SHOWN} more, see preflight.json.")
        if self.blamed:
            lines.append(f"At fault: {named(self.blamed)}; start again without.")
        return "\n".join(lines)


def check(trainer: Trainer, limits: Limits | None = None) -> Verdict:
    """Measure, judge, log a table and the warnings, write preflight.json (rank 0). Every rank must call this, with a
    trainer that has not begun; training afterwards is as if nothing had happened.

    Raises: AgreedError on every rank if the job should not go on.
    """
    here, limits = trainer.here, limits or Limits()
    clock = Stopwatch()
    if here.main:
        _forget(trainer.run_dir)
    with clock("places"):
        layout = here.broadcast(_layout(here.collect(here.node)))
        place = facts.look(here)
    with clock("links"):
        fabric = bandwidth.measure(here, layout, limits)
    report = _with_run(trainer, layout, place, limits, clock)
    reports, verdict = here.collect(report), None
    if reports is not None:
        demand = _demand(trainer, reports)
        findings = judge(reports, fabric, demand, limits)
        verdict = _verdict(findings)
        rows = table.rows(reports, fabric)
        log.info("%s", table.text(rows, fabric, (name for f in findings for name in f.nodes), limits.rows))
        for warning in verdict.warnings:
            log.warning("preflight: %s", warning)
        document = _document(verdict, rows, reports, fabric, demand, limits, clock.seconds)
        verdict = _write(trainer.run_dir, document, verdict)
    verdict = here.broadcast(verdict)
    if not verdict.go:
        raise AgreedError(str(verdict))
    log.info("%s (%.1f s).", verdict, clock.total)
    return verdict


class Stopwatch:
    """Seconds of each step of this rank, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.began = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began

    @property
    def total(self) -> float:
        return time.perf_counter() - self.began


def _layout(names: list[str] | None) -> Layout | None:
    return None if names is None else Layout.of(names)


def _with_run(trainer: Trainer, layout: Layout, place: dict[str, Any], limits: Limits, clock: Stopwatch) -> Report:
    """This rank's whole report: data read, run folder written, one window tried. Every rank must call this."""
    here, problems = trainer.here, dict[str, str]()

    def attempt(step: str, measurement: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return measurement(*arguments)
        except (UserError, OSError) as error:
            problems[step] = str(error)
            return None

    here.barrier()  # the storage is asked by all at once, as in training
    with clock("read"):
        read = attempt("read", storage.read_windows, trainer.loader, limits.read_seconds, limits.read_bytes)
    rate, window = read or (None, [])
    here.barrier()
    write = None
    with clock("write"):
        if layout.ranks[place["node"]][0] == here.rank:
            share = limits.write_bytes_per_node(len(layout.nodes))
            write = attempt("write", storage.write_file, trainer.run_dir.path, limits.write_seconds, share)
    trial: Trial | None = None
    with clock("window"):
        if window:
            phases, values = trainer.plan.phases, trainer.ds_json
            trial = attempt("window", memory.try_window, trainer.engine, window, phases, values, here)
    return Report(**place, read=rate, write=write, trial=trial, problems=problems)


def _demand(trainer: Trainer, reports: list[Report]) -> Demand:
    """What the run needs, with the numbers of parameters that rank 0's window, or another's, has found."""
    values, loader, keep = trainer.ds_json, trainer.loader, trainer.config.checkpointing.keep
    trial = next((report.trial for report in reports if report.trial is not None), Trial())
    sizes = values, trial.parameters, trial.trainable
    # The newest, the best of each objective and of phases that restore it, the end of each phase, and one being
    # written; some are there already.
    best = len({phase.objective for phase in trainer.plan.phases})
    best += sum(phase.restore_best for phase in trainer.plan.phases)
    lying = keep + best + len(trainer.plan.phases) + 1
    try:
        free = shutil.disk_usage(trainer.run_dir.path).free
    except OSError:
        free = None
    return Demand(
        micro_batch=loader.micro_batch,
        accumulation=loader.accumulation,
        zero_stage=ds_config.zero_stage(values),
        states=memory.model_states(*sizes, trainer.here.world_size),
        checkpoint_bytes=memory.checkpoint_bytes(*sizes),
        checkpoints=max(1, lying - len(trainer.store.whole())),
        run_dir=str(trainer.run_dir.path),
        disk_free=free,
        size_key="" if loader.max_size is None else loader.size_key,
    )


def _verdict(findings: list[Finding]) -> Verdict:
    return Verdict(
        refusals=tuple(finding.text for finding in findings if finding.fatal),
        warnings=tuple(finding.text for finding in findings if not finding.fatal),
        blamed=tuple(sorted({name for finding in findings if finding.blames for name in finding.nodes})),
    )


def _document(
    verdict: Verdict,
    rows: list[table.Row],
    reports: list[Report],
    fabric: Fabric,
    demand: Demand,
    limits: Limits,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """What preflight.json holds."""
    first = asdict(reports[0])
    if first["trial"] and not math.isfinite(first["trial"]["loss"]):
        first["trial"]["loss"] = None  # JSON knows no NaN
    return {
        "verdict": "go" if verdict.go else "no go",
        **asdict(verdict),
        "time": time.strftime("%FT%T%z"),
        "world_size": len(reports),
        "nodes": [asdict(row) for row in rows],
        **asdict(fabric),
        "demand": asdict(demand),
        "rank_0": first,
        "seconds": seconds,
        "limits": asdict(limits),
    }


def _forget(run_dir: rundir.RunDir) -> None:
    """What an earlier start found says nothing about this one, should this one not come to an end."""
    try:
        run_dir.preflight_json.unlink(missing_ok=True)
    except OSError:  # it will be found again when the folder is written
        log.debug("%s stays", run_dir.preflight_json)


def _write(run_dir: rundir.RunDir, document: dict[str, Any], verdict: Verdict) -> Verdict:
    """The verdict, which is no go where the file cannot be written."""
    try:
        rundir.write_json(run_dir.preflight_json, document)
    except OSError as error:
        problem = f"{run_dir.preflight_json} cannot be written ({error.strerror})."
        return Verdict((*verdict.refusals, problem), verdict.warnings, verdict.blamed)
    return verdict
