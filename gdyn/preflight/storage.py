"""How fast the run's own data can be read, and how fast its folder written."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from gdyn.errors import UserError
from gdyn.loader import Batch, Loader
from gdyn.preflight.limits import MIB


@dataclass(frozen=True)
class Rate:
    """So many bytes in so many seconds."""

    nbytes: int
    seconds: float

    @property
    def mb_s(self) -> float:
        """MB/s (10^6 bytes)."""
        return self.nbytes / 1e6 / max(self.seconds, 1e-9)


def read_windows(loader: Loader, seconds: float, nbytes: int) -> tuple[Rate, list[Batch]]:
    """This rank's first windows of the first epoch, as training reads them, until `seconds` have passed or `nbytes` are
    there; also the first window itself. Bytes are those of the batches. What the operating system has in its cache
    makes it look faster than the storage is: the beginning of every file is there, since it was checked at the start.

    Raises: UserError, OSError for data that cannot be read.
    """
    first: list[Batch] = []
    began, total = time.perf_counter(), 0
    for window in replace(loader, workers=0).windows(0):
        total += sum(tensor.nbytes for batch in window for tensor in batch.values())
        first = first or window
        if total >= nbytes or time.perf_counter() - began >= seconds:
            break
    return Rate(total, time.perf_counter() - began), first


def write_file(folder: Path, seconds: float, nbytes: int) -> Rate:
    """Write up to `nbytes` for up to `seconds` to a file in `folder`, and fsync it. The file has no name, or loses it
    at once, so that nothing stays, whatever ends this process.

    Raises: UserError if that cannot be done.
    """
    block = os.urandom(min(4 * MIB, nbytes))  # a file system may compress zeros away
    written, began = 0, time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".preflight.", buffering=0) as file:
            while written < nbytes and time.perf_counter() - began < seconds:
                written += file.write(block[: nbytes - written])
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}).") from None
    return Rate(written, time.perf_counter() - began)
