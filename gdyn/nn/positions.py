"""Positional encodings."""

from __future__ import annotations

import torch
from torch import Tensor


def encode_positions(positions_r: Tensor, width: int, base: float) -> Tensor:
    """(R, width) float32: sin(p w_i) in even and cos(p w_i) in odd columns, w_i = base^(-2i/width) for i = 0, 1, ...
    (Vaswani et al. 2017, who take base 10000)."""
    exponents = torch.arange(0, width, 2, device=positions_r.device, dtype=torch.float64) / width
    phases = positions_r[:, None].double() * base**-exponents
    return torch.stack([phases.sin(), phases.cos()], dim=-1).flatten(1)[:, :width].float()
