"""Equivariant variational autoencoders of ligands and pockets: atoms to a cloud of latent points, three coordinates and
D invariant features for each atom, and back (GeoLDM, Xu et al., ICML 2023, arXiv:2305.01140).

Every loss is a sum over real atoms. Whoever calls divides by the atoms of the whole window.

Legend: B molecules, n atoms of the largest one (padded), D latent features; x_bn3 Å, z latent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdyn.engines.diffusion import layout
from gdyn.nn.egnn import EGNN, Normalization, at_least_float32, centred, mean_position

LIGAND_CLASSES = {"element": len(layout.ELEMENTS) + 1, "aromatic": 2, "charge": len(layout.CHARGES) + 1}
POCKET_CLASSES = {"element": len(layout.ELEMENTS) + 1, "backbone": 2, "residue": len(layout.RESIDUES) + 1}
"""Properties of an atom and their number of classes, the unknown one included."""


class Autoencoder(nn.Module):
    """One class for ligands and pockets, which differ in the properties of their atoms.

    Both networks see coordinates relative to the molecule's mean, which is added again at their end: a latent cloud has
    the mean of its atoms, so a ligand keeps its place in the pocket.
    """

    def __init__(
        self,
        classes: dict[str, int],
        hidden: int = 128,
        latent: int = 32,
        blocks: int = 3,
        sublayers: int = 2,
        attention: bool = False,
        tanh: bool = False,
        norm_constant: float = 0.0,
        normalization: Normalization = "sum",
        checkpoint: bool = False,
    ):
        super().__init__()
        self.classes = dict(classes)
        options = (blocks, sublayers, attention, tanh, norm_constant, normalization, checkpoint)
        self.encoder = EGNN(sum(classes.values()), hidden, hidden, *options)
        self.to_latent = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, latent))
        self.decoder = EGNN(latent, hidden, hidden, *options)
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, count) for name, count in classes.items()})

    def encode(self, features: dict[str, Tensor], x_bn3: Tensor, mask_bn: Tensor) -> tuple[Tensor, Tensor]:
        """Latent means (B, n, 3), Å, and (B, n, D), float32 or more, zero at padding. `features`: property -> (B, n)
        int64 classes; others than this autoencoder's are not read.

        The D features of an atom have mean square 1: what is diffused has the scale of its noise, and the decoder
        learns on what it will be given.
        """
        one_hot = torch.cat([F.one_hot(features[name], count) for name, count in self.classes.items()], dim=-1)
        h, z_x = about_mean(self.encoder, one_hot.to(self.encoder.embedding.weight.dtype), x_bn3, mask_bn)
        z_h = at_least_float32(self.to_latent(h))
        return z_x, F.rms_norm(z_h, z_h.shape[-1:]).masked_fill(~mask_bn.unsqueeze(-1), 0.0)

    def decode(self, z_x: Tensor, z_h: Tensor, mask_bn: Tensor) -> dict[str, Tensor]:
        """positions (B, n, 3), Å, zero at padding, and of each property its logits (B, n, classes), float32 or more."""
        h, positions = about_mean(self.decoder, z_h, z_x, mask_bn)
        logits = {name: at_least_float32(head(h)) for name, head in self.heads.items()}
        return {"positions": positions, **logits}


def about_mean(network: EGNN, h: Tensor, x_bn3: Tensor, mask_bn: Tensor) -> tuple[Tensor, Tensor]:
    """Features and coordinates of the network, whose output has the mean of its input."""
    x = at_least_float32(x_bn3)
    h, moved = network(h, centred(x, mask_bn), mask_bn)
    moved = centred(moved, mask_bn) + mean_position(x, mask_bn)
    return h, moved.masked_fill(~mask_bn.unsqueeze(-1), 0.0)


def reconstruction_sums(
    decoded: dict[str, Tensor], features: dict[str, Tensor], x_bn3: Tensor, mask_bn: Tensor
) -> dict[str, Tensor]:
    """Over real atoms: squared error of the positions (Å^2) and cross entropy of each property (nats)."""
    sums = {"positions": squared_errors(decoded, x_bn3, mask_bn).sum()}
    for name, logits in decoded.items():
        if name != "positions":
            sums[name] = F.cross_entropy(logits[mask_bn], features[name][mask_bn], reduction="sum")
    return sums


def kl_sum(z_x: Tensor, z_h: Tensor, mask_bn: Tensor) -> Tensor:
    """KL divergence to the unit normal prior of posteriors with these means and unit variance, as the original has it,
    summed over real atoms, nats. Coordinates count from their mean, so it does not change with the ligand's place."""
    z_h = z_h.masked_fill(~mask_bn.unsqueeze(-1), 0.0)
    return 0.5 * (centred(z_x, mask_bn).square().sum() + z_h.square().sum())


@torch.no_grad()
def accuracy_sums(
    decoded: dict[str, Tensor], features: dict[str, Tensor], x_bn3: Tensor, mask_bn: Tensor
) -> dict[str, Tensor]:
    """Real atoms whose class is right, for each property; and "rmsd", Å, summed over molecules."""
    sums = {
        name: ((logits.argmax(-1) == features[name]) & mask_bn).sum()
        for name, logits in decoded.items()
        if name != "positions"
    }
    mean_squares_b = squared_errors(decoded, x_bn3, mask_bn).sum(1) / mask_bn.sum(1).clamp_min(1)
    return sums | {"rmsd": mean_squares_b.sqrt().sum()}


def squared_errors(decoded: dict[str, Tensor], x_bn3: Tensor, mask_bn: Tensor) -> Tensor:
    """Of the positions, (B, n), Å^2; 0 at padding."""
    return (decoded["positions"] - x_bn3).square().sum(-1).masked_fill(~mask_bn, 0.0)


def original_loss(
    x_hat: Tensor,
    logits_bnc: Tensor,
    number_bn: Tensor,
    x_bn3: Tensor,
    categories_bnc: Tensor,
    target_number_bn: Tensor,
    z_x: Tensor,
    z_h: Tensor,
    mask_bn: Tensor,
) -> Tensor:
    """The loss per molecule (B,) that this engine's original reports, to compare with its logs.

    categories_bnc: all properties' one-hot classes side by side, zero at padding; number: a scalar property. One class
    is chosen over all properties, so the first always wins; padded atoms count in the cross entropy and in the divisor,
    but the KL term is not divided: the value changes with the padding.
    """
    b, n, c = categories_bnc.shape
    target = categories_bnc.argmax(-1).flatten()
    entropy_b = F.cross_entropy(logits_bnc.flatten(0, 1), target, reduction="none").view(b, n).sum(1)
    number_b = (number_bn - target_number_bn).square().sum(1)
    reconstruction_b = ((x_hat - x_bn3).square().sum((1, 2)) + entropy_b + number_b) / ((3 + c + 1) * n)
    means_b = z_x.square().sum((1, 2)) + (z_h * mask_bn.unsqueeze(-1)).square().sum((1, 2))
    return reconstruction_b + 0.01 * 0.5 * means_b
