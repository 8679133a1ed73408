"""Sums over ranks, with the gradient scale written down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

_alone = False


def ranks_are_joined() -> bool:
    return not _alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def alone() -> Iterator[None]:
    """Sums over ranks in the block are this rank's own."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all ranks, without a gradient. Every rank must call this. Alone: `values` itself."""
    if not ranks_are_joined():
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


class SumOverRanks(torch.autograd.Function):
    """Sum over ranks in both directions: d(sum_r L_r)/dx where every rank's loss L_r depends on the reduced value.
    Every rank must call forward and backward. If the ranks' losses add up to the objective, as `gdyn.engine.Step.loss`
    promises, the gradient is exact."""

    @staticmethod
    def forward(ctx: object, values: torch.Tensor) -> torch.Tensor:
        return sum_over_ranks(values)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return sum_over_ranks(gradient.contiguous())


def differentiable_sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """`SumOverRanks` as a function. Alone: `values` itself."""
    result: torch.Tensor = SumOverRanks.apply(values) if ranks_are_joined() else values
    return result
