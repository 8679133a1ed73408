"""Rank-sharded, seeded, resumable batches: whole windows for training, every sample exactly once for evaluation.

The order of an epoch is a function of seed and epoch alone. Window w is the next `window_size` samples of that order,
cut into micro-batches and dealt to the ranks, so the *set* of samples in a window does not depend on how many ranks
share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader

from gdyn.engine import Dataset
from gdyn.errors import UserError

if TYPE_CHECKING:
    from gdyn.ranks import RankContext

Batch = dict[str, torch.Tensor]


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

    @property
    def window_size(self) -> int:
        """Samples of one optimizer step, over all ranks."""
        return self.micro_batch * self.accumulation * self.here.world_size

    @property
    def windows_per_epoch(self) -> int:
        limits = [limit for limit in (self.limit_windows, self.overfit_windows) if limit is not None]
        return min([len(self.dataset) // self.window_size, *limits])

    @property
    def samples_per_epoch(self) -> int:
        return self.windows_per_epoch * self.window_size

    @property
    def remainder(self) -> int:
        """Samples an epoch leaves out because they do not fill a window; others in every epoch."""
        return len(self.dataset) % self.window_size

    def check(self) -> None:
        """Raises: UserError if the data set does not fill one window."""
        if len(self.dataset) < self.window_size:
            raise UserError(
                f"the training set has {len(self.dataset)} samples, one optimizer step takes {self.window_size} "
                "(micro-batch "
                f"{self.micro_batch} x accumulation {self.accumulation} x {self.here.world_size} ranks); lower the "
                "batch size or "
                "the number of ranks."
            )

    def windows(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each window of an epoch, from the `start`-th sample of its order on."""
        if self.overfit_windows is not None:
            epoch = 0
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
        end = self.samples_per_epoch
        pieces = []
        for window in range(start, end - self.window_size + 1, self.window_size):
            for micro in range(self.accumulation):
                first = window + (micro * self.here.world_size + self.here.rank) * self.micro_batch
                pieces.append(np.sort(order[first : first + self.micro_batch]))
        batches = self._fetch(pieces)
        for _ in range(len(pieces) // self.accumulation):
            yield [next(batches) for _ in range(self.accumulation)]

    def shard(self) -> Iterator[tuple[Batch, bool]]:
        """This rank's contiguous part of the data set, in order, nothing dropped and nothing twice. All ranks get the
        same number of batches, as sharded models need; a rank that has run out gets a filler marked False, which must
        not count."""
        n, world = len(self.dataset), self.here.world_size
        if self.limit_windows is not None:
            n = min(n, self.limit_windows * self.window_size)  # the same samples for any number of ranks
        bounds = np.arange(world + 1) * n // world
        first, last = bounds[self.here.rank], bounds[self.here.rank + 1]
        rounds = -(-int(np.diff(bounds).max()) // self.micro_batch)
        starts = [first + i * self.micro_batch for i in range(rounds)]
        real = [start < last for start in starts]
        pieces = [
            np.arange(start, min(start + self.micro_batch, last)) if counts else np.array([min(first, n - 1)])
            for start, counts in zip(starts, real, strict=True)
        ]
        yield from zip(self._fetch(pieces), real, strict=True)

    def _fetch(self, pieces: list[np.ndarray]) -> Iterator[Batch]:
        if not self.workers:
            return (self.dataset[piece] for piece in pieces)
        return self._fetch_ahead(pieces)

    def _fetch_ahead(self, pieces: list[np.ndarray]) -> Iterator[Batch]:
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
