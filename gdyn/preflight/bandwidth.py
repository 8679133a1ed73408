"""Bandwidth and latency of a job's links, and which node is to blame for a slow one.

Nodes form a ring. Every node exchanges messages with both its neighbours, so a bad node has two bad links, its
neighbours one each, and they can be told apart. All ranks of two neighbouring nodes talk at once, each with its
counterpart, both ways, as in a ring all-reduce. Point-to-point messages only: no process group is made, and the number
of messages is proportional to the number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from operator import attrgetter
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gdyn.preflight.limits import Limits

if TYPE_CHECKING:
    from gdyn.ranks import RankContext

Pair = tuple[str, str]
"""Names of two nodes; the same name twice: within that node."""
REPEATS, LATENCY_REPEATS = 3, 20
MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Layout:
    """Which rank is on which node."""

    nodes: tuple[str, ...]
    """Names in the order of their lowest ranks."""
    node_of_rank: tuple[int, ...]
    """Index into `nodes`, by rank."""

    @classmethod
    def of(cls, names: Sequence[str]) -> Layout:
        """`names`: of each rank's node, by rank."""
        nodes = tuple(dict.fromkeys(names))
        index = {name: i for i, name in enumerate(nodes)}
        return cls(nodes, tuple(index[name] for name in names))

    @cached_property
    def ranks(self) -> dict[str, list[int]]:
        """By node."""
        found: dict[str, list[int]] = {name: [] for name in self.nodes}
        for rank, node in enumerate(self.node_of_rank):
            found[self.nodes[node]].append(rank)
        return found

    def partners(self, pairs: Iterable[Pair]) -> dict[int, int]:
        """Whom each rank talks to when these nodes do, each at most once. Ranks without a counterpart are absent."""
        found = {}
        for a, b in pairs:
            left, right = self.ranks[a], self.ranks[b]
            if a == b:
                left, right = left[0::2], left[1::2]
            for one, other in zip(left, right, strict=False):
                found[one], found[other] = other, one
        return found


@dataclass(frozen=True)
class Link:
    """What one pair of nodes, or one node within, achieved: of its rank pairs, which talked at once, the slowest."""

    nodes: Pair
    gb_s: float
    """GB/s per rank and direction."""
    latency_s: float
    """One small message each way."""
    rank_pairs: int = 1

    @property
    def inside(self) -> bool:
        return self.nodes[0] == self.nodes[1]


GB_S = attrgetter("gb_s")


@dataclass(frozen=True)
class Fabric:
    """All links of a job."""

    links: tuple[Link, ...] = ()
    again: tuple[Link, ...] = ()
    """The second look at nodes whose links were slow: within them once more, and each with a node above suspicion."""
    all_reduce: Link | None = None
    """All ranks at once: bus bandwidth 2 (n - 1) / n x bytes / s, and the time of a small one."""


def measure(here: RankContext, layout: Layout, limits: Limits) -> Fabric:
    """The links, on rank 0 (elsewhere an empty Fabric). Every rank must call this.

    Takes up to `link_seconds` for each of 3 to 7 rounds: within the nodes, the ring, perhaps a second look, all ranks.
    Raises: RuntimeError naming both nodes if a message between CPU processes is lost.
    """

    def links(rounds: list[list[Pair]]) -> tuple[Link, ...]:
        plans = [layout.partners(pairs) for pairs in rounds]
        mine = [_talk(here, layout, plan.get(here.rank), limits) for plan in plans]
        return join_links(layout, plans, here.collect(mine))

    first = links([[(name, name) for name in layout.nodes], *ring(layout.nodes)])
    again = links(here.broadcast(second_look(first, limits)))
    return Fabric(first, again, _all_reduce(here, layout, limits))


def ring(nodes: Sequence[str]) -> list[list[Pair]]:
    """The ring's links in two rounds, three for an odd number of nodes, so that no node is in two pairs of a round."""
    n = len(nodes)
    if n < 3:
        return [[(nodes[0], nodes[1])]] if n == 2 else []
    links = [(nodes[i], nodes[(i + 1) % n]) for i in range(n)]
    return [links[0 : n - 1 : 2], links[1::2]] if n % 2 == 0 else [links[0 : n - 1 : 2], links[1:n:2], links[n - 1 :]]


def join_links(
    layout: Layout, plans: Sequence[dict[int, int]], samples: Sequence[Sequence[Any]] | None
) -> tuple[Link, ...]:
    """Links from each rank's (GB/s, latency) in each round; None (not rank 0): no links."""
    found: dict[tuple[int, Pair], list[Any]] = {}
    for i, plan in enumerate(plans if samples is not None else ()):
        for one, other in plan.items():
            if one < other:
                a, b = sorted((layout.node_of_rank[one], layout.node_of_rank[other]))
                nodes = layout.nodes[a], layout.nodes[b]
                assert samples is not None
                found.setdefault((i, nodes), []).append(samples[one][i])
    return tuple(
        Link(nodes, min(rate for rate, _ in of), max(latency for _, latency in of), len(of))
        for (_, nodes), of in found.items()
    )


# Who is to blame. Pure.


def outlier_bound(rates: Sequence[float], limits: Limits) -> float:
    """Rates below it are outliers; 0 where there are too few to compare. Median and median absolute deviation, because
    outliers must not move the bound."""
    if len(rates) < limits.nodes_to_compare:
        return 0.0
    middle = median(rates)
    spread = MAD_TO_SIGMA * median(abs(rate - middle) for rate in rates)
    return max(0.0, min(limits.slow_share * middle, middle - limits.deviations * spread))


def best_of_nodes(links: Iterable[Link], inside: bool, rate: Callable[[Link], float] = GB_S) -> list[float]:
    """The best link of every node, within or to its neighbours. One bad node of four spoils half of the ring's links,
    but only its own best."""
    best: dict[str, float] = {}
    for link in links:
        for name in link.nodes if link.inside == inside else ():
            best[name] = max(best.get(name, 0.0), rate(link))
    return list(best.values())


def bounds(links: Sequence[Link], limits: Limits) -> dict[bool, float]:
    """GB/s below which a link is slow: {True: within a node, False: between nodes}."""
    found = {inside: outlier_bound(best_of_nodes(links, inside), limits) for inside in (True, False)}
    judged = all(link.inside for link in links)  # the floor is for what is between nodes, if there is anything
    return found | {judged: max(found[judged], limits.min_bandwidth)}


def slow(links: Iterable[Link], below: dict[bool, float]) -> list[Link]:
    return [link for link in links if link.gb_s < below[link.inside]]


def second_look(links: Sequence[Link], limits: Limits) -> list[list[Pair]]:
    """Rounds that tell whether a suspect is to blame. A node is one if it is slow within, or if all its links are slow:
    two bad nodes make their common neighbour look bad, too. Suspects between nodes meet nodes with a good link; where
    nobody is above suspicion, nobody is looked at again."""
    bad = slow(links, bounds(links, limits))
    good = above_suspicion(links, limits)
    suspects = dict.fromkeys(name for link in bad if not link.inside for name in link.nodes if name not in good)
    fine_within = any(link.inside and link not in bad for link in links)
    within = [link.nodes for link in bad if link.inside and fine_within]
    between = list(zip(suspects, sorted(good), strict=False))
    return [pairs for pairs in (within, between) if pairs]


def above_suspicion(links: Sequence[Link], limits: Limits) -> set[str]:
    """Nodes with a good link to a neighbour."""
    bad = slow(links, bounds(links, limits))
    return {name for link in links if not link.inside and link not in bad for name in link.nodes}


def at_fault(fabric: Fabric, limits: Limits) -> list[str]:
    """Names of the nodes that were slow in the second look, too."""
    again = slow(fabric.again, bounds(fabric.links, limits))
    good = above_suspicion(fabric.links, limits)
    return sorted({name for link in again for name in link.nodes if link.inside or name not in good})


# Measuring


def _talk(here: RankContext, layout: Layout, partner: int | None, limits: Limits) -> tuple[float, float] | None:
    """(GB/s, latency) with one rank; None without one. Every rank must call this, whether or not it has a partner."""
    here.barrier()
    if partner is None:
        return None
    timeout = timedelta(seconds=limits.answer_seconds)

    def swap(both: torch.Tensor) -> None:
        """Send the first row, receive the second."""
        sent, received = (dist.P2POp(op, row, partner) for op, row in zip((dist.isend, dist.irecv), both, strict=True))
        try:
            for work in dist.batch_isend_irecv([sent, received]):
                # On devices a timeout would make the wait a coarse poll.
                work.wait(timeout) if here.device.type == "cpu" else work.wait()
        except RuntimeError as error:
            a, b = (layout.nodes[layout.node_of_rank[rank]] for rank in (here.rank, partner))
            raise RuntimeError(
                f"rank {here.rank} on {a} and rank {partner} on {b} lost a message of {both[0].nbytes} bytes ({error})"
            ) from error

    def agree(flag: bool) -> bool:
        both = torch.tensor([[float(flag)], [0.0]], device=here.device)
        swap(both)
        return bool(both.sum().item())

    return _ladder(swap, agree, 2, here, limits)


def _all_reduce(here: RankContext, layout: Layout, limits: Limits) -> Link | None:
    """Every rank must call this. None for one rank."""
    if here.world_size == 1:
        return None
    rate, latency = _ladder(dist.all_reduce, here.any, 1, here, limits)
    share = 2 * (here.world_size - 1) / here.world_size
    return Link((layout.nodes[0], layout.nodes[-1]), share * rate, latency, here.world_size)


def _ladder(
    transfer: Callable[[torch.Tensor], Any],
    agree: Callable[[bool], bool],
    rows: int,
    here: RankContext,
    limits: Limits,
) -> tuple[float, float]:
    """(best GB/s of a row, best time of a small transfer), with growing messages, until the next would take too long
    for anyone. Those who take part must call this together; `agree`: whether the flag is true for any of them."""
    synchronize = torch.get_device_module(here.device).synchronize
    began, rate = time.perf_counter(), 0.0

    def seconds(numbers: int, repeats: int) -> float:
        tensor = torch.zeros(rows, numbers, device=here.device)
        times = []
        for _ in range(repeats + 1):  # the first makes connections and touches the pages
            synchronize()
            start = time.perf_counter()
            transfer(tensor)
            synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    latency = seconds(1, LATENCY_REPEATS)
    for size in limits.message_sizes(here.device.type):
        best = seconds(size // 4, REPEATS)
        rate = max(rate, size / best / 1e9)
        following = 8 * best * (REPEATS + 1)
        if agree(time.perf_counter() - began + following > limits.link_seconds):
            break
    return rate, latency
