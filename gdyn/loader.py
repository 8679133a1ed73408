"""Rank-sharded, seeded, resumable batches: whole windows for training, every sample exactly once for evaluation.

The order of an epoch is a function of seed and epoch alone. Window w is the next `window_size` samples of that order,
cut into micro-batches and dealt to the ranks, so the *set* of samples in a window does not depend on how many ranks
share it.

Where samples differ in size (`Dataset.sizes`), they are dealt so that the micro-batches of a window are about equally
large. Where an engine also bounds that size (`Engine.max_size`), a window ends before its samples cannot be dealt
within the bound: its samples then depend on the product of ranks and accumulation, not on how it is split.

Where an engine asks for `like_sizes`, the order of an epoch depends on the window size too: its stretches are sorted by
size, so that a window holds samples of like size and little padding.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader

from gdyn.engine import Dataset
from gdyn.errors import UserError

if TYPE_CHECKING:
    from gdyn.ranks import RankContext

Batch = dict[str, torch.Tensor]

STRETCH = 10
"""Windows that are sorted by size together, at most: with more, windows are more alike from epoch to epoch; with fewer,
their samples are less alike in size."""


@dataclass(frozen=True)
class Loader:
    """Batches of one data set for one rank."""

    dataset: Dataset
    micro_batch: int
    accumulation: int
    here: RankContext
    seed: int = 0
    workers: int = 0
    """Processes that read ahead; they are started fresh (forkserver), which is safe beside MPI and HDF5."""
    limit_windows: int | None = None
    """A quick run: at most so many windows per epoch, and as many samples of what is evaluated."""
    overfit_windows: int | None = None
    """A sanity check: the same few windows in every epoch."""
    max_size: int | None = None
    """The largest sum of sizes of a micro-batch; None: only `micro_batch` bounds it."""
    size_key: str = "max_size"
    """The key of the run file that sets `max_size`."""
    like_sizes: bool = False
    """Whether samples of like size are batched together."""

    @property
    def pieces(self) -> int:
        """Micro-batches of one optimizer step, over all ranks."""
        return self.accumulation * self.here.world_size

    @property
    def window_size(self) -> int:
        """Samples of one optimizer step, over all ranks; with a `max_size`, the most it can have."""
        return self.micro_batch * self.pieces

    def ends(self, epoch: int, start: int = 0) -> np.ndarray:
        """How many samples of the epoch's order are done after each of its windows, from the `start`-th sample on."""
        if self.overfit_windows is not None:
            epoch = 0
        limits = [limit for limit in (self.limit_windows, self.overfit_windows) if limit is not None]
        whole = self._ends(epoch, 0)[: min(limits, default=None)]
        if not start or not len(whole):
            return whole
        rest = self._ends(epoch, start)
        return rest[rest <= whole[-1]]

    def windows_per_epoch(self, epoch: int) -> int:
        """With a `max_size` it differs a little from epoch to epoch."""
        return len(self.ends(epoch))

    def samples_per_epoch(self, epoch: int) -> int:
        return int(self.ends(epoch)[-1]) if self.windows_per_epoch(epoch) else 0

    @property
    def samples_per_window(self) -> float:
        """Mean of the first epoch."""
        return self.samples_per_epoch(0) / max(1, self.windows_per_epoch(0))

    @property
    def remainder(self) -> int:
        """Samples an epoch (with a `max_size`: the first) leaves out because they do not fill a window; others in every
        epoch."""
        whole = self._ends(0, 0)
        return len(self.dataset) - (int(whole[-1]) if len(whole) else 0)

    def __str__(self) -> str:
        """The batch in a sentence."""
        split = f"x accumulation {self.accumulation} x {self.here.world_size} ranks"
        batch = f"global batch {self.window_size} = micro-batch {self.micro_batch} {split}"
        steps = f"{self.windows_per_epoch(0)} steps per epoch"
        if self.max_size is not None:
            batch = (
                f"global batch {self.samples_per_window:.0f} on average: micro-batches of at most {self.micro_batch} "
                f"samples and {self.size_key} {self.max_size} {split}"
            )
            steps = f"{self.windows_per_epoch(0)} steps in the first epoch"
        return f"{batch}; {steps}, {self.remainder} of {len(self.dataset)} samples left over."

    def check(self) -> None:
        """Raises: UserError if the data set does not fill one window, or a sample no micro-batch may hold."""
        self.check_sizes()
        if not len(self._ends(0, 0)):
            bound = "" if self.max_size is None else f" of at most {self.size_key} {self.max_size}"
            raise UserError(
                f"the training set has {len(self.dataset)} samples, one optimizer step takes {self.window_size} "
                f"(micro-batch {self.micro_batch}{bound} x accumulation {self.accumulation} x {self.here.world_size} "
                "ranks); lower the batch size or the number of ranks."
            )

    def check_sizes(self) -> None:
        """Raises: UserError naming the largest sample if it exceeds `max_size`."""
        if self.max_size is None:
            return
        sizes = self._sizes
        largest = int(sizes.argmax())
        if sizes[largest] > self.max_size:
            raise UserError(
                f"{self.name(largest)} has the size {sizes[largest]}, but "
                f"{self.size_key} = {self.max_size} bounds a micro-batch ({int((sizes > self.max_size).sum())} of "
                f"{len(sizes)} samples are larger); raise {self.size_key} to {sizes[largest]} or more, or leave these "
                "samples out of the data."
            )

    def windows(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each window of an epoch, from the `start`-th sample of its order on."""
        ends, order = self.ends(epoch, start), self._order(epoch)
        batches = self._fetch(
            piece for first, last in pairwise([start, *ends]) for piece in self._share(order[first:last])
        )
        for _ in ends:
            yield [next(batches) for _ in range(self.accumulation)]

    def samples(self, epoch: int, first: int, last: int) -> list[np.ndarray]:
        """What this rank's micro-batches hold in the window from `first` to `last` of an epoch's order."""
        return self._share(self._order(epoch)[first:last])

    def name(self, sample: int) -> str:
        """What messages call a sample."""
        names = getattr(self.dataset, "identifiers", None)
        return f"sample {sample}" if names is None else str(names[sample])

    def shard(self) -> Iterator[tuple[Batch, bool]]:
        """This rank's part of the data set, nothing dropped and nothing twice: contiguous and in order, or with
        `like_sizes` every so many-th batch in the order of size. All ranks get the same number of batches, as sharded
        models need; a rank that has run out gets a filler marked False, which must not count."""
        n, world = len(self.dataset), self.here.world_size
        if self.limit_windows is not None:
            n = min(n, self.limit_windows * self.window_size)  # the same samples for any number of ranks
        order = np.argsort(self._sizes[:n], kind="stable") if self.like_sizes else np.arange(n)
        if self.max_size is None:
            total = np.arange(n + 1)
        else:
            total = np.concatenate([[0], self._sizes[order].cumsum()])
        if self.like_sizes:
            pieces = self._cut(total, 0, n)
            cuts = [pieces[rank::world] for rank in range(world)]
        else:
            bounds = np.searchsorted(total, np.arange(world + 1) * total[-1] // world)
            bounds[-1] = n
            cuts = [self._cut(total, first, last) for first, last in pairwise(bounds)]
        mine = cuts[self.here.rank]
        fillers = max(map(len, cuts)) - len(mine)
        filled = [order[piece] for piece in mine] + [order[:1]] * fillers
        yield from zip(self._fetch(filled), [True] * len(mine) + [False] * fillers, strict=True)

    # -- which samples ------------------------------------------------------------------------------------------------

    @property
    def _sizes(self) -> np.ndarray:
        sizes: np.ndarray = self.dataset.sizes  # type: ignore[attr-defined]
        return sizes

    def _order(self, epoch: int) -> np.ndarray:
        epoch = 0 if self.overfit_windows is not None else epoch
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.dataset))
        return sort_stretches(order, self._sizes, self.window_size, random) if self.like_sizes else order

    @cached_property
    def _ends(self) -> Callable[[int, int], np.ndarray]:
        return lru_cache(maxsize=4)(self._plan)

    def _plan(self, epoch: int, start: int) -> np.ndarray:
        """`ends` without limits."""
        if self.max_size is None:
            return np.arange(start + self.window_size, len(self.dataset) + 1, self.window_size)
        sizes = self._sizes[self._order(epoch)]
        total = np.concatenate([[0], sizes.cumsum()])
        ends = [start]
        while (end := self._end(sizes, total, ends[-1])) is not None:
            ends.append(end)
        return np.array(ends[1:], dtype=np.int64)

    def _end(self, sizes: np.ndarray, total: np.ndarray, start: int) -> int | None:
        """Where the window that begins at `start` ends, so that no piece that `deal` makes exceeds `max_size`; None if
        the samples that are left do not fill it. sizes, total: of the epoch's order, and their sums."""
        assert self.max_size is not None
        least, most = start + self.pieces, start + self.window_size  # one sample each fits, as `check` has seen
        if least > len(sizes):
            return None
        held = self.pieces * self.max_size
        while True:
            end = int(np.searchsorted(total, total[start] + held, side="right")) - 1
            end = max(least, min(end, most))
            largest = _largest(sizes[start:end], self.pieces, self.micro_batch)
            if largest <= self.max_size or end == least:
                return None if end == len(sizes) < most else end
            # Two or three tries, where one sample fewer at a time would make it hundreds.
            held = int(total[end] - total[start])
            held = min(held - 1, held * self.max_size // largest)

    def _share(self, samples: np.ndarray) -> list[np.ndarray]:
        """This rank's micro-batches of a window, each in the order of the data set."""
        if self.like_sizes and self.max_size is None:
            by_size = samples[np.argsort(self._sizes[samples], kind="stable")]
            shares = []
            for together in by_size.reshape(self.accumulation, -1):  # one micro-batch of each rank
                owners = deal(self._sizes[together], self.here.world_size, self.micro_batch)
                shares.append(np.sort(together[owners == self.here.rank]))
            return shares
        if hasattr(self.dataset, "sizes"):
            owners = deal(self._sizes[samples], self.pieces, self.micro_batch)
            mine = range(self.here.rank, self.pieces, self.here.world_size)
            return [np.sort(samples[owners == piece]) for piece in mine]
        pieces = samples.reshape(self.accumulation, self.here.world_size, self.micro_batch)
        return list(np.sort(pieces[:, self.here.rank]))

    def _cut(self, total: np.ndarray, first: int, last: int) -> list[np.ndarray]:
        """Contiguous batches from `first` to `last`, as large as is allowed. total: sums of sizes."""
        pieces = []
        while first < last:
            end = min(first + self.micro_batch, last)
            if self.max_size is not None:
                fitting = int(np.searchsorted(total, total[first] + self.max_size, side="right")) - 1
                end = min(end, max(fitting, first + 1))
            pieces.append(np.arange(first, end))
            first = end
        return pieces

    # -- reading ------------------------------------------------------------------------------------------------------

    def _fetch(self, pieces: Iterable[np.ndarray]) -> Iterator[Batch]:
        if not self.workers:
            return (self.dataset[piece] for piece in pieces)
        return self._fetch_ahead(pieces)

    def _fetch_ahead(self, pieces: Iterable[np.ndarray]) -> Iterator[Batch]:
        batches: DataLoader[Batch] = DataLoader(
            self.dataset,  # type: ignore[arg-type]
            sampler=pieces,
            batch_size=None,
            num_workers=self.workers,
            # A forked child of a process that has initialised MPI may hang or crash.
            multiprocessing_context="forkserver",
        )
        try:
            yield from batches
        except UserError as error:
            # DataLoader puts the worker's traceback around the message.
            raise UserError(str(error).strip().rpartition(f"{UserError.__name__}: ")[2]) from None


def sort_stretches(order: np.ndarray, sizes: np.ndarray, window: int, random: np.random.Generator) -> np.ndarray:
    """The order with whole windows of samples of like size: of each stretch of at most STRETCH windows the samples are
    sorted by size and cut into windows, and these are shuffled. What fills no window stays behind them all."""
    whole = len(order) // window * window
    stretches = np.array_split(order[:whole].reshape(-1, window), max(1, -(-whole // (window * STRETCH))))
    ordered = (stretch.flat[np.argsort(sizes[stretch], axis=None, kind="stable")] for stretch in stretches)
    return np.concatenate([*(random.permutation(s.reshape(-1, window)).ravel() for s in ordered), order[whole:]])


def deal(sizes: np.ndarray, pieces: int, most: int) -> np.ndarray:
    """To which of `pieces` each sample goes, (n,): the largest first, each to the piece with the smallest sum of those
    that have fewer than `most` samples (Graham 1969, SIAM J. Appl. Math. 17, 416). n <= pieces * most."""
    order = np.argsort(-sizes, kind="stable")
    heap, dealt = [(0, 0, piece) for piece in range(pieces)], []
    for size in sizes[order].tolist():
        total, count, piece = heap[0]
        dealt.append(piece)
        if count + 1 < most:
            heapq.heapreplace(heap, (total + size, count + 1, piece))
        else:
            heapq.heappop(heap)
    owners = np.empty(len(sizes), np.int64)
    owners[order] = dealt
    return owners


def _largest(sizes: np.ndarray, pieces: int, most: int) -> int:
    """Sum of sizes of the largest piece that `deal` makes."""
    return int(np.bincount(deal(sizes, pieces, most), weights=sizes).max() if pieces > 1 else sizes.sum())
