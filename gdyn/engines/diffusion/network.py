"""The network as a whole: two autoencoders, the denoiser in the ligand's latent space, and the noise that it learns on.

All noise is a function of (complex, step, purpose, atom): it does not depend on ranks, micro-batches, padding or the
order of a batch, and a resumed run draws what an uninterrupted one would.

Legend: B complexes, n ligand atoms and m pocket atoms of the largest one (padded), D latent features, T diffusion
steps, d draws.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gdyn.engines.diffusion.autoencoder import LIGAND_CLASSES, POCKET_CLASSES, Autoencoder
from gdyn.engines.diffusion.denoiser import Denoiser
from gdyn.engines.diffusion.latents import Cache, Latents
from gdyn.nn import counters
from gdyn.nn.average import Average
from gdyn.nn.egnn import centred, mean_position
from gdyn.nn.noise import NoiseSchedule

Prediction = Literal["velocity", "noise"]
LIGAND, POCKET, LATENT, TIME, DRAWS = 0, 2, 4, 6, 7
"""Streams of random numbers: noise of the posteriors (two streams each, coordinates and features), where the times
begin, and from here on three of each draw: its noise, and whether the pocket is dropped."""
EVALUATION = -1
"""The step whose noise every evaluation has, so that its scores can be compared from epoch to epoch."""


class Atoms(NamedTuple):
    """Of ligands or pockets."""

    features: dict[str, Tensor]
    """Property -> (B, n) int64 classes."""
    positions: Tensor
    mask: Tensor


class Window(NamedTuple):
    """What a micro-batch needs to know of its optimizer step."""

    step: int
    """Optimizer steps that are finished; the noise depends on it."""
    draws: int
    """Times and noises per complex."""
    averaged: bool
    """Denoise with the averaged weights."""
    counts: dict[str, Tensor]
    """Of all ranks and micro-batches, what the losses are divided by: complexes, ligand_atoms, protein_atoms."""


class LatentDiffusion(nn.Module):
    """Both autoencoders, the denoiser and its average.

    ligand_sizes: (S,) int64, entry k says how many training ligands have k atoms; it travels with the weights, because
    samples are drawn from it.
    """

    ligand_sizes: Tensor
    steps_done: Tensor
    """() int64, finished optimizer steps."""

    def __init__(
        self,
        ligand_vae: Autoencoder,
        protein_vae: Autoencoder,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        ligand_sizes: Tensor,
        posterior_sigma: float,
        guidance_dropout: float,
        prediction: Prediction,
        cache_bytes: int,
    ):
        super().__init__()
        self.ligand_vae, self.protein_vae, self.denoiser = ligand_vae, protein_vae, denoiser
        self.denoiser_average = Average(denoiser)
        self.schedule = schedule
        self.posterior_sigma, self.guidance_dropout = posterior_sigma, guidance_dropout
        self.prediction = prediction
        self.frozen_latents = Cache(cache_bytes)
        """Of the phase denoiser, for which the trainer makes a network of its own."""
        self.register_load_state_dict_post_hook(lambda network, _: network.frozen_latents.clear())
        self.register_buffer("ligand_sizes", ligand_sizes)
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))
        self.evaluating = False
        """Whether windows begun now are of an evaluation: averaged weights, the evaluation's noise."""

    def forward(self, batch: dict[str, Tensor], objective: str, window: Window) -> dict[str, dict[str, Tensor]]:
        """What the objective's losses are made of: "ligand", "protein" (see `reconstruct`), "noise" (see `denoise`)."""
        result = {}
        if objective in ("ligand_vae", "joint"):
            result["ligand"] = self.reconstruct(self.ligand_vae, ligand_of(batch), batch["keys"], window.step, LIGAND)
        if objective in ("protein_vae", "joint"):
            result["protein"] = self.reconstruct(self.protein_vae, pocket_of(batch), batch["keys"], window.step, POCKET)
        if objective == "joint":
            ligand, pocket = ((result[part]["z_x"], result[part]["z_h"]) for part in ("ligand", "protein"))
            result["noise"] = self.denoise(batch, window, *ligand, *pocket)
        if objective == "denoiser":
            with torch.no_grad():
                latents = self.frozen_latents.latents(batch, self.encode)
            result["noise"] = self.denoise(batch, window, *latents)
        return result

    def encode(self, batch: dict[str, Tensor]) -> Latents:
        """Both latent means."""
        return *self.encode_ligand(batch), *self.encode_pocket(batch)

    def encode_ligand(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Latent means (B, n, 3), Å, in the pocket's frame, and (B, n, D)."""
        return self.ligand_vae.encode(*ligand_of(batch))

    def encode_pocket(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Latent means (B, m, 3), Å, and (B, m, D)."""
        return self.protein_vae.encode(*pocket_of(batch))

    def decode_ligand(self, z_x: Tensor, z_h: Tensor, ligand_mask: Tensor) -> dict[str, Tensor]:
        """positions (B, n, 3), Å, and logits of element, aromatic, charge."""
        return self.ligand_vae.decode(z_x, z_h, ligand_mask)

    def reconstruct(self, vae: Autoencoder, atoms: Atoms, keys: Tensor, step: int, stream: int) -> dict[str, Tensor]:
        """Latent means z_x, z_h, and what is decoded from a sample of the posterior: positions and logits."""
        features, x, mask = atoms
        z_x, z_h = vae.encode(features, x, mask)
        noisy_x, noisy_h = self.posterior(z_x, z_h, mask, keys, step, stream)
        return {"z_x": z_x, "z_h": z_h, **vae.decode(noisy_x, noisy_h, mask)}

    def posterior(
        self, z_x: Tensor, z_h: Tensor, mask: Tensor, keys: Tensor, step: int, stream: int
    ) -> tuple[Tensor, Tensor]:
        """A sample of the posterior with these means; its noise does not move the ligand."""
        noise_x, noise_h = normal_like(z_x, z_h, mask, keys, step, stream)
        return z_x + self.posterior_sigma * noise_x, z_h + self.posterior_sigma * noise_h

    def denoise(
        self,
        batch: dict[str, Tensor],
        window: Window,
        z_x: Tensor,
        z_h: Tensor,
        pocket_x: Tensor,
        pocket_h: Tensor,
    ) -> dict[str, Tensor]:
        """For each draw a time, noise, and the noise that is found: t (d, B) int64, noise_x and found_x (d, B, n, 3),
        noise_h and found_h (d, B, n, D); z_x centred and z_h as they were before the noise."""
        keys, mask, step = batch["keys"], batch["ligand_mask"], window.step
        z_x, z_h = self.posterior(z_x, z_h, mask, keys, step, LATENT)
        centre = mean_position(z_x, mask)
        start_b = counters.uniform(keys, step, TIME)
        draws = []
        for draw in range(window.draws):
            stream = DRAWS + 3 * draw
            # Spread evenly over all times, which makes the mean of the draws less noisy.
            t_b = ((start_b + draw / window.draws) % 1.0 * (self.schedule.timesteps + 1)).long()
            noise_x, noise_h = normal_like(z_x, z_h, mask, keys, step, stream)
            keep_b = counters.uniform(keys, step, stream + 2) >= self.guidance_dropout
            noisy = self.add_noise(t_b, z_x, z_h, noise_x, noise_h, centre, mask)
            pocket = pocket_x, pocket_h, batch["pocket_mask"]
            found = self.predict_noise(t_b, *noisy, mask, *pocket, keep_b, window.averaged)
            draws.append((t_b, noise_x, noise_h, *found))
        names = ("t", "noise_x", "noise_h", "found_x", "found_h")
        stacked = (torch.stack(values) for values in zip(*draws, strict=True))
        return dict(zip(names, stacked, strict=True)) | {"z_x": centred(z_x, mask), "z_h": z_h}

    def add_noise(
        self, t_b: Tensor, z_x: Tensor, z_h: Tensor, noise_x: Tensor, noise_h: Tensor, centre: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """alpha_t z + sigma_t noise, for coordinates about the ligand's centre (B, 1, 3), which stays where it is."""
        alpha, sigma = self.alpha_sigma(t_b, z_x.dtype)
        x = alpha * (z_x - centre) + sigma * noise_x + centre
        return x.masked_fill(~mask.unsqueeze(-1), 0.0), alpha * z_h + sigma * noise_h

    def predict_noise(
        self,
        t_b: Tensor,
        z_x: Tensor,
        z_h: Tensor,
        ligand_mask: Tensor,
        pocket_x: Tensor,
        pocket_h: Tensor,
        pocket_mask: Tensor,
        keep_b: Tensor,
        averaged: bool,
    ) -> tuple[Tensor, Tensor]:
        """t_b int64, 0 .. T; z_x in the pocket's frame; keep_b bool, false: without the pocket. averaged: with the
        average of the weights. Returns noise (B, n, 3), of mean zero, and (B, n, D).

        The denoiser's outputs are velocities v = alpha eps - sigma z_0, from which eps = alpha v + sigma z_t (Salimans
        & Ho 2022, arXiv:2202.00512): near t = T, where z_t is noise but for a hundredth, its error is not multiplied by
        a hundred in what is sampled. prediction "noise": eps itself.
        """
        network = self.denoiser_average if averaged else self.denoiser
        t_b1 = (t_b / self.schedule.timesteps).unsqueeze(-1).float()
        x, h = network(t_b1, z_x, z_h, ligand_mask, pocket_x, pocket_h, pocket_mask, keep_b)
        if self.prediction == "noise":
            return x, h
        alpha, sigma = self.alpha_sigma(t_b, z_x.dtype)
        h = alpha * h + sigma * z_h.masked_fill(~ligand_mask.unsqueeze(-1), 0.0)
        return alpha * x + sigma * centred(z_x, ligand_mask), h

    def alpha_sigma(self, t_b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B, 1, 1) each."""
        alpha, sigma = (table(t_b).to(dtype).view(-1, 1, 1) for table in (self.schedule.alpha, self.schedule.sigma))
        return alpha, sigma


def ligand_of(batch: dict[str, Tensor]) -> Atoms:
    return _atoms(batch, "ligand", LIGAND_CLASSES)


def pocket_of(batch: dict[str, Tensor]) -> Atoms:
    return _atoms(batch, "pocket", POCKET_CLASSES)


def _atoms(batch: dict[str, Tensor], part: str, classes: dict[str, int]) -> Atoms:
    features = {name: batch[f"{part}_{name}"] for name in classes}
    return Atoms(features, batch[f"{part}_positions"], batch[f"{part}_mask"])


def normal_like(z_x: Tensor, z_h: Tensor, mask: Tensor, keys: Tensor, step: int, stream: int) -> tuple[Tensor, Tensor]:
    """Standard normal noise for coordinates (in the space of mean zero) and features, of this stream and the next;
    zero at padding."""
    noise_x = counters.normal(keys, step, stream, tuple(z_x.shape[1:])).to(z_x.dtype)
    noise_h = counters.normal(keys, step, stream + 1, tuple(z_h.shape[1:])).to(z_h.dtype)
    return centred(noise_x, mask), noise_h.masked_fill(~mask.unsqueeze(-1), 0.0)


def network_of(model: Any) -> LatentDiffusion:
    """DeepSpeed's engine has names of its own, which the network's must not meet."""
    network: LatentDiffusion = getattr(model, "module", model)
    return network
