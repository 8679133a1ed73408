"""Random numbers that are a function of who asks, not of when: of (key, step, stream, element) alone.

A sample's noise then does not depend on ranks, micro-batches, the order of a batch or its padding. The generator is
splitmix64 (Steele, Lea & Flood, OOPSLA 2014) in int64 arithmetic, which wraps and is the same on every device. Floating
point may differ between devices in the last digit.

Shapes: keys_b (B,) int64, one per sample; step an integer or (B,) int64, what is counted (a training step, a diffusion
step); stream an integer, one per purpose. Results are (B, *shape), and the element index counts within `shape` in
row-major order: entry [b, i, c] of shape (n, 3) is the same number for every n > i.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""Splitmix64's increment, as a signed integer; so are its two multipliers."""
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def uniform(keys_b: Tensor, step: int | Tensor, stream: int, shape: tuple[int, ...] = ()) -> Tensor:
    """In [0, 1), float64, multiples of 2^-53."""
    return _shift(bits(keys_b, step, stream, shape), 11).double() * 2.0**-53


def normal(keys_b: Tensor, step: int | Tensor, stream: int, shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normal, float32, by Box & Muller (1958) in float64."""
    radius_b2, angle_b2 = uniform(keys_b, step, stream, (*shape, 2)).unbind(-1)
    # 1 - u is in (0, 1]
    return ((-2.0 * torch.log1p(-radius_b2)).sqrt() * (2.0 * math.pi * angle_b2).cos()).float()


def integers(keys_b: Tensor, step: int | Tensor, stream: int, high: int, shape: tuple[int, ...] = ()) -> Tensor:
    """0 .. high, both included, int64. The bias is high / 2^63."""
    return _shift(bits(keys_b, step, stream, shape), 1) % (high + 1)


def bits(keys_b: Tensor, step: int | Tensor, stream: int, shape: tuple[int, ...] = ()) -> Tensor:
    """64 random bits each, int64."""
    seeds_b = splitmix64(splitmix64(splitmix64(keys_b) + step) + stream)
    elements = torch.arange(math.prod(shape), device=keys_b.device)
    return output(seeds_b.unsqueeze(-1), elements).view(len(keys_b), *shape)


def output(seed: Tensor, n: Tensor) -> Tensor:
    """Output number n = 0, 1, ... of the generator with this seed, int64."""
    return splitmix64(seed + n * GOLDEN)


def splitmix64(state: Tensor) -> Tensor:
    """The output of the generator in this state, int64."""
    z = state + GOLDEN
    z = (z ^ _shift(z, 30)) * FIRST
    z = (z ^ _shift(z, 27)) * SECOND
    return z ^ _shift(z, 31)


def _shift(z: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (z >> by) & (2 ** (64 - by) - 1)
