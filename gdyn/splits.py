"""Splits of a data set that depend on the samples' names alone."""

from __future__ import annotations

import hashlib
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from gdyn.errors import UserError


class Named(Protocol):
    """A data set whose samples have names and sizes."""

    identifiers: list[str]
    sizes: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray) -> dict[str, torch.Tensor]: ...


T = TypeVar("T", bound=Named)


class Part(Generic[T]):
    """Some samples of a data set, as a data set."""

    def __init__(self, whole: T, chosen: np.ndarray):
        self.whole, self.chosen = whole, chosen
        self.sizes = whole.sizes[chosen]
        self.identifiers = [whole.identifiers[i] for i in chosen]

    @classmethod
    def split(cls, whole: T, share: float) -> tuple[Part[T], Part[T]]:
        """(the rest, about a `share` of all samples, chosen by their names alone and so for ever).

        Raises: UserError if one of them would be empty.
        """
        held_out = np.array([stable_key(name) < share * 2**63 for name in whole.identifiers])
        if held_out.all() or not held_out.any():
            raise UserError(
                f"engine.validation names no file, and a validation_share of {share} of {len(whole)} samples leaves "
                "nothing for one of training and validation; name a file, or change the share."
            )
        return cls(whole, np.flatnonzero(~held_out)), cls(whole, np.flatnonzero(held_out))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """As the whole data set does."""
        return self.whole[self.chosen[indices]]


def stable_key(identifier: str, *contents: bytes) -> int:
    """0..2^63 - 1, the same in every process, for ever. contents: to tell apart samples of one name."""
    digest = hashlib.blake2b(identifier.encode(), digest_size=8)
    for content in contents:
        digest.update(content)
    return int.from_bytes(digest.digest(), "little") >> 1
