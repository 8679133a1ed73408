"""Losses of the denoiser per draw and complex, and those of the program this engine replaces.

Legend: d draws, B complexes, n atoms (padded), D latent features. `noise` is what `LatentDiffusion.denoise` returns,
`decoded` what `LatentDiffusion.reconstruct` does.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gdyn.engines.diffusion import layout
from gdyn.engines.diffusion.autoencoder import original_loss
from gdyn.nn.noise import NoiseSchedule


def l2(noise: dict[str, Tensor], atoms_b: Tensor) -> Tensor:
    """|noise - found|^2 / 2 per atom and dimension, (d, B): the variational bound with unit weights (Ho et al. 2020,
    arXiv:2006.11239, eq. 14), the same in training and in validation. About 0.5 where nothing is found."""
    dimensions = noise["noise_x"].shape[-1] + noise["noise_h"].shape[-1]
    return 0.5 * squared_error(noise) / (dimensions * atoms_b)


def vlb(noise: dict[str, Tensor], atoms_b: Tensor, schedule: NoiseSchedule) -> Tensor:
    """An estimate of the variational bound on -ln p of the latents, (d, B), nats (Kingma et al. 2021, arXiv:2107.00630;
    Hoogeboom et al. 2022, arXiv:2203.17003): the prior's KL divergence, (T + 1) times the term of the drawn t of
    0 .. T, which for t = 0 is the likelihood of the latents given z_0, and that likelihood's constant."""
    t = noise["t"]
    before = (t - 1).clamp_min(0)
    weights = torch.where(t > 0, schedule.snr_weight(before, t), 1.0)
    steps = 0.5 * (schedule.timesteps + 1) * weights * squared_error(noise)
    dimensions_b = 3 * (atoms_b - 1) + noise["noise_h"].shape[-1] * atoms_b
    first, last = torch.zeros_like(t[0]), torch.full_like(t[0], schedule.timesteps)
    squares_b = noise["z_x"].square().sum((1, 2)) + noise["z_h"].square().sum((1, 2))
    variance = schedule.sigma(last).square()
    prior_b = 0.5 * (schedule.alpha(last).square() * squares_b + dimensions_b * (variance - 1 - variance.log()))
    width = schedule.sigma(first) / schedule.alpha(first)
    constant_b = dimensions_b * (0.5 * math.log(2 * math.pi) + width.log())
    return steps + prior_b + constant_b


def without_prediction(noise: dict[str, Tensor]) -> dict[str, Tensor]:
    """As if the denoiser had said zero."""
    return noise | {name: torch.zeros_like(noise[name]) for name in ("found_x", "found_h")}


def squared_error(noise: dict[str, Tensor]) -> Tensor:
    """|noise - found|^2, (d, B)."""
    errors = (noise[f"noise_{part}"] - noise[f"found_{part}"] for part in ("x", "h"))
    x, h = (error.square().sum((-1, -2)) for error in errors)
    return x + h


ORIGINAL_SLOTS = {"ligand": 50, "protein": 350}
"""Atoms to which the original pads every ligand and pocket."""
CARBON = layout.ELEMENTS.index(6)


def original_reconstruction(
    part: str, decoded: dict[str, Tensor], features: dict[str, Tensor], x_bn3: Tensor, mask_bn: Tensor
) -> Tensor:
    """`original_loss` per molecule (B,), of "ligand" or "protein", padded as the original pads. It has no class for the
    unknown: an unknown element is carbon, an unknown residue none; its charge is always 0."""
    kinds = {"element": len(layout.ELEMENTS), "residue": len(layout.RESIDUES)}
    logits, one_hot = [], []
    for name in ("element", "aromatic") if part == "ligand" else ("element", "backbone", "residue"):
        if name in kinds:
            classes = features[name]
            classes = torch.where(classes == kinds[name], CARBON, classes) if name == "element" else classes
            logits.append(decoded[name][..., : kinds[name]])
            one_hot.append(F.one_hot(classes, kinds[name] + 1)[..., : kinds[name]])
        else:
            logits.append(decoded[name][..., 1:])
            one_hot.append(features[name].unsqueeze(-1))
    behind = max(0, ORIGINAL_SLOTS[part] - mask_bn.shape[1])

    def padded(tensor: Tensor) -> Tensor:
        return F.pad(tensor.masked_fill(~mask_bn.unsqueeze(-1), 0), (0, 0, 0, behind))

    mask = F.pad(mask_bn, (0, behind))
    charge = torch.zeros_like(mask, dtype=decoded["positions"].dtype)
    return original_loss(
        padded(decoded["positions"]),
        padded(torch.cat(logits, -1)),
        charge,
        padded(x_bn3),
        padded(torch.cat(one_hot, -1)),
        charge,
        padded(decoded["z_x"]),
        padded(decoded["z_h"]),
        mask,
    )


def original_l2(noise: dict[str, Tensor]) -> Tensor:
    """`l2` as the original has it, (d, B): the padding counts, so 0.5 becomes about 0.5 n / 50."""
    return l2(noise, torch.tensor(ORIGINAL_SLOTS["ligand"]))
