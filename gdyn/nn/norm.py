"""Batch normalisation whose statistics belong to one micro-batch on all ranks."""

from __future__ import annotations

import torch
from torch import nn

from gdyn.collectives import differentiable_sum_over_ranks


class BatchNorm(nn.Module):
    """Batch normalisation over all but the last dimension (..., features), synchronised over ranks on any device.

    Running statistics move only where gradients are recorded, so that a no-grad pass over the same micro-batch (the
    first half of an exact window) does not count twice. In training every rank must call it equally often.
    """

    def __init__(self, features: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            scale = self.weight * (self.running_var.float() + self.eps).rsqrt().to(x.dtype)
            return x * scale + (self.bias - self.running_mean.to(x.dtype) * scale)
        rows = x.float().reshape(-1, x.shape[-1])
        count = rows.new_full((1,), rows.shape[0])
        sums = differentiable_sum_over_ranks(torch.cat([rows.sum(0), rows.square().sum(0), count]))
        total, squares, n = sums.split([x.shape[-1], x.shape[-1], 1])
        mean = total / n
        variance = (squares / n - mean.square()).clamp_min(0)
        if torch.is_grad_enabled():
            with torch.no_grad():
                unbiased = variance * n / (n - 1).clamp_min(1)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (x * scale + (self.bias - mean * scale)).to(x.dtype)
