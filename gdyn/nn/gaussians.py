"""Distances as Gaussian features."""

from __future__ import annotations

import torch


def expand_distances(distances: torch.Tensor, cutoff: float, count: int) -> torch.Tensor:
    """exp(-(d - mu)^2 / (2 delta^2)) with `count` centres mu evenly spaced by delta from 0 to cutoff, both included.

    distances (...) and cutoff in Å; returns (..., count) float32. No envelope: a distance beyond the cutoff fades out.
    """
    delta = cutoff / (count - 1)
    centres = torch.arange(count, device=distances.device, dtype=torch.float32) * delta
    # e^-30 is below what fp32 resolves beside 1. Smaller values would make denormal products in later matrix
    # multiplications, which CPUs compute ten times slower.
    exponent = (distances.float().unsqueeze(-1) - centres).square_().mul_(-0.5 / delta**2)
    return exponent.clamp_min_(-30.0).exp_()
