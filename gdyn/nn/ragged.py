"""Samples of different lengths, one after the other in the rows of one tensor.

Legend: B samples, R rows in all, L rows of the longest sample, c channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def owners(lengths_b: Tensor) -> Tensor:
    """(R,) int64: to which sample each row belongs."""
    return torch.repeat_interleave(torch.arange(len(lengths_b), device=lengths_b.device), lengths_b)


def places(lengths_b: Tensor) -> Tensor:
    """(R,) int64: the place of each row in its sample, from 0."""
    starts = lengths_b.cumsum(0) - lengths_b
    return torch.arange(int(lengths_b.sum()), device=lengths_b.device) - starts[owners(lengths_b)]


def pad(rows_rc: Tensor, lengths_b: Tensor) -> tuple[Tensor, Tensor]:
    """(rows as (B, L, c) with zeros behind each sample, mask (B, L) bool that is true where a row is real)."""
    longest = int(lengths_b.max())
    mask = torch.arange(longest, device=rows_rc.device) < lengths_b[:, None]
    padded = rows_rc.new_zeros(*mask.shape, *rows_rc.shape[1:])
    padded[mask] = rows_rc
    return padded, mask


def sum_samples(rows_rc: Tensor, lengths_b: Tensor) -> Tensor:
    """Sums over the rows of each sample, (B, c)."""
    total = rows_rc.new_zeros(len(lengths_b), *rows_rc.shape[1:])
    return total.index_add(0, owners(lengths_b), rows_rc)
