"""Noise schedules of variance-preserving diffusion: z_t = alpha_t z + sigma_t eps with alpha^2 + sigma^2 = 1.

All follows from gamma_t = -ln(alpha_t^2 / sigma_t^2), t = 0 .. T (Kingma et al. 2021, arXiv:2107.00630).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["polynomial_2", "cosine"]


class NoiseSchedule(nn.Module):
    """Table of gamma; every method takes int64 times t (and s < t) of any shape, and returns float64 of that shape."""

    gamma: Tensor
    """(T + 1,) float64; not saved."""

    def __init__(self, kind: Kind = "polynomial_2", timesteps: int = 1000, precision: float = 1e-4):
        """precision: of polynomial_2, the least alpha^2 and sigma^2; cosine has none."""
        super().__init__()
        squares = polynomial(timesteps, 2, precision) if kind == "polynomial_2" else cosine(timesteps)
        self.timesteps = timesteps
        self.register_buffer("gamma", -torch.log(squares / (1 - squares)), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A model that is cast to half precision takes the table to its device only.
        self.gamma = self.gamma.to(fn(self.gamma).device)
        return self

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-self.gamma[t]).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(self.gamma[t]).sqrt()

    def snr_weight(self, s: Tensor, t: Tensor) -> Tensor:
        """SNR_s / SNR_t - 1, the weight of |eps|^2 in the variational bound."""
        return torch.expm1(self.gamma[t] - self.gamma[s])

    def alpha_given(self, s: Tensor, t: Tensor) -> Tensor:
        """alpha_{t|s} = alpha_t / alpha_s."""
        return (0.5 * (F.logsigmoid(-self.gamma[t]) - F.logsigmoid(-self.gamma[s]))).exp()

    def sigma2_given(self, s: Tensor, t: Tensor) -> Tensor:
        """sigma_{t|s}^2 = sigma_t^2 - alpha_{t|s}^2 sigma_s^2, the noise that z_t has beside that of z_s."""
        return -torch.expm1(F.softplus(self.gamma[s]) - F.softplus(self.gamma[t]))


def polynomial(timesteps: int, power: int, precision: float) -> Tensor:
    """alpha^2 = (1 - 2 s) (1 - (t / T)^p)^2 + s (EDM, arXiv:2203.17003), (T + 1,) float64. No step takes more than
    99.9 % of what is left."""
    t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    squares = torch.cat([t.new_ones(1), (1 - t**power).square()])
    ratios = (squares[1:] / squares[:-1]).clamp(0.001, 1.0)
    return (1 - 2 * precision) * ratios.cumprod(0) + precision


def cosine(timesteps: int, offset: float = 0.008) -> Tensor:
    """Nichol & Dhariwal (arXiv:2102.09672) with T + 2 knots, as EDM has it, (T + 1,) float64."""
    knots = torch.linspace(0, 1, timesteps + 2, dtype=torch.float64)
    squares = torch.cos((knots + offset) / (1 + offset) * math.pi / 2).square()
    return (squares[1:] / squares[:-1]).clamp_min(0.001).cumprod(0)
