"""Latent clouds from noise: diffusion in reverse, with the noise eps that a network finds in z_t.

    ancestral  z_s = (z_t - sigma_{t|s}^2 / sigma_t eps) / alpha_{t|s} + sigma_{t|s} sigma_s / sigma_t eta
    ddim       z_s = (z_t - sigma_t eps) / alpha_{t|s} + sigma_s eps

eta is new noise. Kingma et al. 2021 (arXiv:2107.00630) have the first as EDM samples, Song, Meng & Ermon 2021
(arXiv:2010.02502) the second, which adds no noise. Either may leave out times. Pure mathematics: no network, no files.

Legend: B samples, n atoms of the largest one (padded), D latent features of an atom, T the schedule's last time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from gdyn.nn.counters import normal
from gdyn.nn.egnn import centred
from gdyn.nn.noise import NoiseSchedule

Kind = Literal["ancestral", "ddim"]
Cloud = tuple[Tensor, Tensor]
"""Coordinates (B, n, 3) and features (B, n, D)."""
Predict = Callable[[Tensor, Tensor, Tensor], Cloud]
"""t_b (B,) int64, x and h of z_t -> the noise in them."""
Noise = Callable[[int], Cloud]
"""A time -> the noise that is added on arrival there; the data are at -1."""

COORDINATES, FEATURES = 0, 1
"""Streams of random numbers."""
DATA = -1
"""The time after 0."""


def draw(
    predict: Predict,
    schedule: NoiseSchedule,
    noise: Noise,
    mask_bn: Tensor,
    centre_b3: Tensor,
    times: Sequence[int],
    kind: Kind = "ancestral",
) -> Cloud:
    """Latents of new ligands, zero at padding. The mean of a ligand's atoms is its `centre`, to rounding: what is
    diffused are coordinates about it, though `predict` is given them with it. times: see `descending`."""
    centre_b13, padding_bn1 = centre_b3.unsqueeze(1), ~mask_bn.unsqueeze(-1)

    def masked(x: Tensor, h: Tensor) -> Cloud:
        return centred(x, mask_bn), h.masked_fill(padding_bn1, 0.0)

    def placed(x: Tensor) -> Tensor:
        return (x + centre_b13).masked_fill(padding_bn1, 0.0)

    x, h = masked(*noise(times[0]))
    for t, s in zip(times, [*times[1:], DATA], strict=True):
        t_b = torch.full((len(x),), t, device=x.device)
        eps_x, eps_h = predict(t_b, placed(x), h)
        keep, change, spread = coefficients(schedule, t, s, kind)
        x, h = keep * x + change * eps_x, keep * h + change * eps_h
        if spread:
            eta_x, eta_h = noise(s)
            x, h = x + spread * eta_x, h + spread * eta_h
        x, h = masked(x, h)
    return placed(x), h


def coefficients(schedule: NoiseSchedule, t: int, s: int, kind: Kind) -> tuple[float, float, float]:
    """Of z_t, of the predicted noise and of new noise in z_s; s < t. The data are z_0 without its noise and, if
    ancestral, with new noise of the size sigma_0 / alpha_0."""
    now, then = torch.tensor(t), torch.tensor(s)
    alpha_t, sigma_t = schedule.alpha(now).item(), schedule.sigma(now).item()
    if s == DATA:
        return 1 / alpha_t, -sigma_t / alpha_t, sigma_t / alpha_t if kind == "ancestral" else 0.0
    alpha, sigma_s = schedule.alpha_given(then, now).item(), schedule.sigma(then).item()
    if kind == "ddim":
        return 1 / alpha, sigma_s - sigma_t / alpha, 0.0
    variance = schedule.sigma2_given(then, now).item()
    return 1 / alpha, -variance / (alpha * sigma_t), variance**0.5 * sigma_s / sigma_t


def descending(timesteps: int, steps: int) -> list[int]:
    """steps + 1 times from T to 0, as evenly as whole numbers can be; 1 <= steps <= T."""
    assert 1 <= steps <= timesteps
    return [round(timesteps * (steps - k) / steps) for k in range(steps + 1)]


def counted_noise(keys_b: Tensor, mask_bn: Tensor, features: int) -> Noise:
    """Noise that depends on a sample's key, its atoms and the time, not on who else is in the batch. That of
    coordinates has mean zero over real atoms. keys_b: (B,) int64."""
    n = mask_bn.shape[1]

    def noise(time: int) -> Cloud:
        x_bn3 = normal(keys_b, time, COORDINATES, (n, 3))
        h_bnd = normal(keys_b, time, FEATURES, (n, features))
        return centred(x_bn3, mask_bn), h_bnd.masked_fill(~mask_bn.unsqueeze(-1), 0.0)

    return noise


def guided(conditioned: Predict, null: Predict, scale: float) -> Predict:
    """v_null + s (v_conditioned - v_null), classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598). s = 0 and
    s = 1 need one of the two only."""
    if scale == 0:
        return null
    if scale == 1:
        return conditioned

    def predict(t_b: Tensor, x: Tensor, h: Tensor) -> Cloud:
        with_x, with_h = conditioned(t_b, x, h)
        without_x, without_h = null(t_b, x, h)
        return without_x + scale * (with_x - without_x), without_h + scale * (with_h - without_h)

    return predict
