"""From what the ranks reported to findings. Pure: no rank, no file and no clock is asked here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

from gdyn.preflight import bandwidth
from gdyn.preflight.bandwidth import Fabric, Link
from gdyn.preflight.facts import Report
from gdyn.preflight.limits import Limits
from gdyn.preflight.memory import ModelStates

SHOWN = 8  # nodes of a sentence, refusals of a verdict


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    text: str
    nodes: tuple[str, ...] = ()
    """Those it is about; empty: the run, or all."""
    fatal: bool = False
    """Whether the job should not go on."""
    blames: bool = False
    """Whether `nodes` are at fault, so that the job may go on without them."""


@dataclass(frozen=True)
class Demand:
    """What the run needs: the same on every rank."""

    micro_batch: int
    accumulation: int
    zero_stage: int
    states: ModelStates = field(default_factory=lambda: ModelStates(0, 0, 0))
    checkpoint_bytes: int = 0
    checkpoints: int = 1
    """How many more will lie in the run folder at the same time."""
    run_dir: str = ""
    disk_free: int | None = None
    """None: not known."""
    size_key: str = ""
    """The key that bounds the size of a micro-batch; empty: none does."""


@dataclass(frozen=True)
class Job:
    """All reports, by node."""

    reports: Sequence[Report]
    nodes: dict[str, list[Report]]

    @classmethod
    def of(cls, reports: Sequence[Report]) -> Job:
        nodes: dict[str, list[Report]] = {}
        for report in reports:
            nodes.setdefault(report.node, []).append(report)
        return cls(reports, nodes)

    def few(self, nodes: Iterable[str]) -> bool:
        """Whether these are less than half of all: then the fault is theirs, not the run's."""
        return 2 * len(set(nodes)) < len(self.nodes)


def judge(reports: Sequence[Report], fabric: Fabric, demand: Demand, limits: Limits) -> list[Finding]:
    """Every finding, refusals first."""
    job = Job.of(reports)
    topics = [
        _versions(job),
        _devices(job),
        _clocks(job, limits),
        _free_memory(job, limits),
        _links(fabric, limits),
        _problems(job),
        _disk(demand),
        _windows(job, demand),
        _demand(job, demand),
    ]
    return sorted((finding for topic in topics for finding in topic), key=lambda finding: not finding.fatal)


def clock_offsets(reports: Sequence[Report]) -> list[float]:
    """Of each rank's clock against the first report's, s."""
    first = reports[0].clock
    return [median([b - a for a, b in zip(first, r.clock, strict=True)] or [0.0]) for r in reports]


def named(nodes: Iterable[str]) -> str:
    """Names for a sentence; many are counted."""
    names = sorted(set(nodes))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _differing(job: Job, fact: Callable[[Report], Hashable]) -> tuple[Hashable, dict[Hashable, set[str]]]:
    """What most ranks have, and the nodes that have something else, by what they have."""
    common = Counter(fact(report) for report in job.reports).most_common(1)[0][0]
    others: dict[Hashable, set[str]] = {}
    for report in job.reports:
        if fact(report) != common:
            others.setdefault(fact(report), set()).add(report.node)
    return common, others


def _versions(job: Job) -> Iterator[Finding]:
    for name in sorted({name for report in job.reports for name in report.versions}):
        common, others = _differing(job, lambda report: report.versions.get(name, "none"))  # noqa: B023
        nodes = {node for found in others.values() for node in found}
        if nodes:
            kinds = "; ".join(f"{version} on {named(found)}" for version, found in others.items())
            yield Finding(
                f"{name} is {common} on most ranks, but {kinds}: start all ranks in one environment (staged copies may "
                "be old).",
                tuple(sorted(nodes)),
                fatal=True,
                blames=job.few(nodes),
            )


def _devices(job: Job) -> Iterator[Finding]:
    facts: list[tuple[str, str, Callable[[Report], Hashable]]] = [
        ("the device", "the slowest sets the pace", lambda report: report.device),
        ("the driver", "bugs may show on some nodes only", lambda report: report.driver or "unknown"),
        (
            "the device memory",
            "the smallest must hold a micro-batch",
            lambda report: f"{report.device_total / 1e9:.0f} GB" if report.device_total else "host memory",
        ),
    ]
    for what, so, fact in facts:
        common, others = _differing(job, fact)
        if others:
            kinds = "; ".join(f"{kind} on {named(found)}" for kind, found in others.items())
            nodes = tuple(sorted({node for found in others.values() for node in found}))
            yield Finding(f"{what} is {common} on most ranks, but {kinds}; {so}.", nodes)


def _clocks(job: Job, limits: Limits) -> Iterator[Finding]:
    off: dict[str, float] = {}
    for report, offset in zip(job.reports, clock_offsets(job.reports), strict=True):
        if abs(offset) > limits.clock_seconds:
            off[report.node] = offset
    if off:
        worst = max(off, key=lambda node: abs(off[node]))
        yield Finding(
            f"clocks differ from rank 0's by more than {limits.clock_seconds:g} s on {named(off)} (most on {worst}: "
            f"{off[worst]:+.1f} s); times in logs cannot be compared, and the newest checkpoint is told by its time.",
            tuple(sorted(off)),
        )


def _free_memory(job: Job, limits: Limits) -> Iterator[Finding]:
    kinds: list[tuple[str, float, Callable[[Report], int | None]]] = [
        ("device", limits.device_memory_share, lambda report: report.device_free),
        ("host", limits.host_memory_share, lambda report: report.host_free),
    ]
    for what, share, fact in kinds:
        free = {node: min(fact(report) or 0 for report in of) for node, of in job.nodes.items()}
        usual = median(free.values())
        low = {node: nbytes for node, nbytes in free.items() if nbytes < share * usual}
        if low:
            yield Finding(
                f"{named(low)} have less free {what} memory ({min(low.values()) / 1e9:.1f} GB) than the others "
                f"({usual / 1e9:.1f} GB); another process may be left there.",
                tuple(sorted(low)),
            )


def _links(fabric: Fabric, limits: Limits) -> Iterator[Finding]:
    bad = bandwidth.slow(fabric.links, bandwidth.bounds(fabric.links, limits))
    guilty = bandwidth.at_fault(fabric, limits)
    for node in guilty:
        seen = [link for link in (*bad, *fabric.again) if node in link.nodes]
        usual = median(bandwidth.best_of_nodes(fabric.links, seen[0].inside))
        rates = ", ".join(f"{link.gb_s:.3g} GB/s {_with(link, node)}" for link in seen)
        yield Finding(
            f"{node} is slow: {rates}; of most nodes the best link has {usual:.3g} GB/s.",
            (node,),
            fatal=True,
            blames=True,
        )
    unexplained = [link for link in bad if not set(link.nodes) & set(guilty)]
    for inside in (True, False):
        same = [link for link in fabric.links if link.inside == inside]
        low = [link for link in unexplained if link.inside == inside and link.gb_s < limits.min_bandwidth]
        less = [link for link in unexplained if link.inside == inside and link not in low]
        yield from _slow(low, same, f"the least allowed, {limits.min_bandwidth:g} GB/s", fatal=True)
        yield from _slow(less, same, "half of the usual", fatal=False)
        yield from _late(same, inside, limits)


def _with(link: Link, node: str) -> str:
    other = link.nodes[1] if link.nodes[0] == node else link.nodes[0]
    return "within" if link.inside else f"with {other}"


def _slow(links: Sequence[Link], same: Sequence[Link], than: str, fatal: bool) -> Iterator[Finding]:
    """Slow links of one kind, of whose nodes none could be blamed. `same`: all of that kind."""
    if links:
        worst = min(links, key=lambda link: link.gb_s)
        a, b = worst.nodes
        yield Finding(
            f"{len(links)} of {len(same)} links have less than {than}: the slowest {worst.gb_s:.3g} GB/s "
            + (f"within {a}." if worst.inside else f"between {a} and {b}; which side is at fault cannot be told."),
            tuple(sorted({name for link in links for name in link.nodes})),
            fatal=fatal,
        )


def _late(links: Sequence[Link], inside: bool, limits: Limits) -> Iterator[Finding]:
    """Links of one kind on which small messages take long."""
    swiftness = bandwidth.best_of_nodes(links, inside, lambda link: 1 / link.latency_s)
    least = bandwidth.outlier_bound(swiftness, limits)
    late = [link for link in links if 1 / link.latency_s < least]
    if late:
        nodes = tuple(sorted({name for link in late for name in link.nodes}))
        worst, usual = max(link.latency_s for link in late), median(link.latency_s for link in links)
        yield Finding(
            f"small messages take up to {1e6 * worst:.0f} µs {'within' if inside else 'on links of'} {named(nodes)}; "
            f"the median is {1e6 * usual:.0f} µs.",
            nodes,
        )


def _problems(job: Job) -> Iterator[Finding]:
    """What could not be done. The nodes are to blame where most others could do it."""
    found: dict[tuple[str, str], set[str]] = {}
    for report in job.reports:
        for step, message in report.problems.items():
            found.setdefault((step, message), set()).add(report.node)
    failed = {step: {n for (s, _), nodes in found.items() if s == step for n in nodes} for step, _ in found}
    for (step, message), nodes in found.items():
        where = "" if len(nodes) == len(job.nodes) else f"{named(nodes)}: "
        yield Finding(where + message, tuple(sorted(nodes)), fatal=True, blames=job.few(failed[step]))


def _disk(demand: Demand) -> Iterator[Finding]:
    free, one = demand.disk_free, demand.checkpoint_bytes
    if free is None or free >= demand.checkpoints * one:
        return
    yield Finding(
        f"{demand.run_dir} has {free / 1e9:.3g} GB free; a checkpoint takes about {one / 1e9:.3g} GB, and "
        f"{demand.checkpoints} more of them may lie there at a time. Free space, or lower checkpointing.keep.",
        fatal=free < one,
    )


def _windows(job: Job, demand: Demand) -> Iterator[Finding]:
    trials = [(report, report.trial) for report in job.reports if report.trial is not None]
    out = [(report, trial) for report, trial in trials if trial.out_of_memory]
    if out:
        nodes = {report.node for report, _ in out}
        report, trial = out[0]
        # The window was tried with whole weights and gradients, of which ZeRO holds a share.
        sharded = demand.zero_stage >= 2 and 10 * trial.weights > (report.device_total or report.host_total)
        yield Finding(
            f"one micro-batch does not fit into the memory of {named(nodes)} ({trial.out_of_memory}). "
            + (f"ZeRO {demand.zero_stage} may make room. " if sharded else "")
            + _smaller(demand),
            tuple(sorted(nodes)),
            fatal=not sharded,
            blames=not sharded and job.few(nodes),
        )
    nan = {report.node: t.loss for report, t in trials if not t.out_of_memory and not math.isfinite(t.loss)}
    if nan:
        yield Finding(
            f"the loss of the first window is {next(iter(nan.values()))} on {named(nan)}, with new weights: look for "
            "NaN in the data, or take a larger epsilon or another precision.",
            tuple(sorted(nan)),
            fatal=True,
            blames=job.few(nan),
        )


def _smaller(demand: Demand) -> str:
    if demand.size_key:
        return f"Lower {demand.size_key}, and raise gradient_accumulation_steps to keep the global batch."
    if demand.micro_batch % 2:
        return "Lower optimization.batch_size, and raise gradient_accumulation_steps to keep the global batch."
    return (
        f"Halve optimization.batch_size to {demand.micro_batch // 2} and double gradient_accumulation_steps to "
        f"{2 * demand.accumulation}: the global batch stays."
    )


def _demand(job: Job, demand: Demand) -> Iterator[Finding]:
    """Whether model states and activations fit together. A lower bound: buffers and fragments come on top."""
    short: dict[str, tuple[int, int, str]] = {}
    states = demand.states
    for node, reports in job.nodes.items():
        for report in reports:
            if report.trial is None or report.trial.out_of_memory:
                continue
            activations = max(0, report.trial.peak - report.trial.weights)
            if report.device_free is not None and states.on_device + activations > report.device_free:
                short[node] = states.on_device + activations, report.device_free, "a device"
            on_host = states.on_host + (states.on_device + activations if report.device_free is None else 0)
            if report.host_free and len(reports) * on_host > report.host_free:
                short.setdefault(node, (len(reports) * on_host, report.host_free, "the node"))
    if short:
        needed, free, what = max(short.values())
        yield Finding(
            f"weights ({states.parameters / 1e9:.3g} GB), gradients ({states.gradients / 1e9:.3g} GB), optimizer "
            f"({states.optimizer / 1e9:.3g} GB) and activations of a rank need {needed / 1e9:.3g} GB of {what}, of "
            f"which {free / 1e9:.3g} GB are free on {named(short)}. A higher ZeRO stage shares the first three. "
            + _smaller(demand),
            tuple(sorted(short)),
            fatal=True,
            blames=job.few(short),
        )
