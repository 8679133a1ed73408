"""Exponential moving averages of a network's parameters (Polyak & Juditsky 1992; as diffusion models use them)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Average(nn.Module):
    """A copy of a network whose parameters are buffers: saved with the weights, trained by nobody, float32 whatever
    the network's type is."""

    updates: Tensor
    """() int64"""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = copy.deepcopy(network)
        for module in self.network.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach().float())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, *args: Any) -> Any:
        """What the network with averaged parameters makes of these arguments."""
        return self.network(*args)

    @torch.no_grad()
    def update(self, network: nn.Module, decay: float) -> None:
        """Move by 1 - decay towards the network's parameters; faster in the first updates, by TensorFlow's rule
        (1 + k) / (10 + k) after k of them, so that the initial weights are soon forgotten."""
        done = int(self.updates)
        weight = 1 - min(decay, (1 + done) / (10 + done))
        averages = dict(self.network.named_buffers())
        for name, parameter in network.named_parameters():
            averages[name].lerp_(parameter.float(), weight)
        self.updates += 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A model that is cast to half precision takes averages to its device only: their steps are smaller than that
        # precision.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
