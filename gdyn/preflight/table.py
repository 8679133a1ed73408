"""What a person sees of a preflight: one row per node; of many nodes, those with a finding and the quantiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from gdyn.preflight.bandwidth import Fabric, Link
from gdyn.preflight.facts import Report
from gdyn.preflight.judge import clock_offsets

GB = 1e9


@dataclass(frozen=True)
class Row:
    """One node. None: not measured."""

    node: str
    ranks: int
    device: str
    device_free_gb: float | None
    """GB = 10^9 bytes; of the rank with the least."""
    device_total_gb: float | None
    host_free_gb: float
    host_total_gb: float
    clock_s: float
    """Against rank 0's node."""
    window_gb: float | None
    """Peak of one window; of the rank with the most."""
    within_gb_s: float | None
    """Per rank and direction."""
    links_gb_s: tuple[float, ...]
    """With its neighbours."""
    read_mb_s: float | None
    """Of all its ranks together; the operating system's cache included."""
    write_mb_s: float | None


def rows(reports: Sequence[Report], fabric: Fabric) -> list[Row]:
    links: dict[str, list[Link]] = {}
    for link in fabric.links:
        for name in set(link.nodes):
            links.setdefault(name, []).append(link)
    nodes: dict[str, list[tuple[Report, float]]] = {}
    for report, offset in zip(reports, clock_offsets(reports), strict=True):
        nodes.setdefault(report.node, []).append((report, offset))
    return [_row([report for report, _ in of], of[0][1], links.get(node, [])) for node, of in nodes.items()]


def _row(reports: list[Report], offset: float, links: list[Link]) -> Row:
    first = reports[0]
    free = [report.device_free for report in reports if report.device_free is not None]
    peaks = [report.trial.peak for report in reports if report.trial is not None]
    reads = [report.read.mb_s for report in reports if report.read is not None]
    writes = [report.write.mb_s for report in reports if report.write is not None]
    return Row(
        node=first.node,
        ranks=len(reports),
        device=first.device,
        device_free_gb=min(free) / GB if free else None,
        device_total_gb=first.device_total / GB if first.device_total is not None else None,
        host_free_gb=min(report.host_free for report in reports) / GB,
        host_total_gb=first.host_total / GB,
        clock_s=offset,
        window_gb=max(peaks) / GB if peaks else None,
        within_gb_s=next((link.gb_s for link in links if link.inside), None),
        links_gb_s=tuple(link.gb_s for link in links if not link.inside),
        read_mb_s=sum(reads) if reads else None,
        write_mb_s=sum(writes) if writes else None,
    )


HEADER = tuple("node,ranks,device,free GB,host GB,clock s,window GB,within,links GB/s,read MB/s,write MB/s".split(","))


def text(found: Sequence[Row], fabric: Fabric, singled_out: Iterable[str], limit: int) -> str:
    """The table, and a line on each kind of link. Of more than `limit` nodes only those `singled_out` have a row, at
    most `limit` of them."""
    named = set(singled_out)
    listed = [row for row in found if len(found) <= limit or row.node in named][:limit]
    cells = [HEADER, *map(_cells, listed)]
    if len(found) > limit:
        cells += [(f"{name} of {len(found)}", *_quantile(found, share)) for name, share in QUANTILES.items()]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([*lines, *summary(fabric)])


QUANTILES = {"least": 0.0, "10 %": 0.1, "median": 0.5, "most": 1.0}


def summary(fabric: Fabric) -> list[str]:
    """One line for each kind of link."""
    lines = []
    for title, inside in (("within nodes", True), ("between nodes", False)):
        links = [link for link in fabric.links if link.inside == inside]
        if links:
            rates, times = [link.gb_s for link in links], [1e6 * link.latency_s for link in links]
            lines.append(
                f"{title}: {len(links)} measured, {min(rates):.3g} to {max(rates):.3g} GB/s per rank and direction "
                f"(median {median(rates):.3g}), {min(times):.0f} to {max(times):.0f} µs (median {median(times):.0f})"
            )
    if fabric.all_reduce is not None:
        whole = fabric.all_reduce
        lines.append(
            f"all-reduce over {whole.rank_pairs} ranks: bus bandwidth {whole.gb_s:.3g} GB/s, a small one "
            f"{1e6 * whole.latency_s:.0f} µs"
        )
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.node,
        str(row.ranks),
        row.device if len(row.device) <= 28 else row.device[:27] + "…",
        _of(row.device_free_gb, row.device_total_gb),
        _of(row.host_free_gb, row.host_total_gb),
        f"{row.clock_s:+.2f}",
        _number(row.window_gb),
        _number(row.within_gb_s),
        ", ".join(map(_number, row.links_gb_s)) or "-",
        _number(row.read_mb_s),
        _number(row.write_mb_s),
    )


def _quantile(found: Sequence[Row], share: float) -> tuple[str, ...]:
    """Of every column by itself."""

    def at(values: Iterable[float | None]) -> str:
        known = sorted(value for value in values if value is not None)
        return _number(known[round(share * (len(known) - 1))]) if known else "-"

    return (
        at(row.ranks for row in found),
        "",
        at(row.device_free_gb for row in found),
        at(row.host_free_gb for row in found),
        at(row.clock_s for row in found),
        at(row.window_gb for row in found),
        at(row.within_gb_s for row in found),
        at(rate for row in found for rate in row.links_gb_s),
        at(row.read_mb_s for row in found),
        at(row.write_mb_s for row in found),
    )


def _of(free: float | None, total: float | None) -> str:
    return "-" if free is None or total is None else f"{free:.1f}/{total:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
