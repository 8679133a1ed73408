"""Losses of the monodecoder as sums, in float32, never means: whoever calls divides by the counts of the whole window.

What counts and what is summed is decided in one place, `masks`. Sums over nothing are zero.

Legend: B structures, R residues of all of them, P pairs, D dimensions of the codes, c classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gdyn.engines.monodecoder.pairs import Pairs

BOUNDARIES = tuple(torch.linspace(5, 50, 7).tolist())
"""CA-CA distances, Å, between the 8 bins of the distogram."""
ANGLE_BETA = 0.5
"""Radians, below which an error of an angle counts quadratically."""


class Masks(NamedTuple):
    """What is known well enough to be learned; all bool."""

    amino_acids: Tensor
    """(R,)"""
    secondary: Tensor
    """(R,)"""
    angles: Tensor
    """(R, 3)"""
    pairs: Tensor
    """(P,)"""
    foldx: Tensor
    """(B, 23), or (0,) if the batch has none."""


def masks(batch: dict[str, Tensor], pairs: Pairs, plddt_threshold: float | None = None) -> Masks:
    """Rows of zeros are unknown classes, a zero an undefined angle, NaN a missing energy. With a threshold, secondary
    structure and angles count for residues whose pLDDT (0..1) reaches it, and pairs of two such residues."""
    trusted = confident(batch, plddt_threshold)
    foldx = batch.get("foldx", batch["plddt"][:0])
    return Masks(
        amino_acids=batch["amino_acids"].any(1),
        secondary=batch["secondary"].any(1) & trusted,
        angles=(batch["angles"] != 0) & trusted[:, None],
        pairs=trusted[pairs.index].all(0),
        foldx=~foldx.isnan(),
    )


def confident(batch: dict[str, Tensor], plddt_threshold: float | None) -> Tensor:
    """(R,) bool: whether a residue's pLDDT (0..1) reaches the threshold; None: all do."""
    return batch["plddt"] >= (-math.inf if plddt_threshold is None else plddt_threshold)


class Counts(NamedTuple):
    """How many terms the sums have, float64 scalars: `torch.stack(counts)` adds up over micro-batches and ranks, and
    `Counts(*total)` names the sums again."""

    structures: Tensor
    residues: Tensor
    amino_acids: Tensor
    secondary: Tensor
    angles: Tensor
    contacts: Tensor
    others: Tensor
    """Pairs without contact."""
    foldx: Tensor


def counts(batch: dict[str, Tensor], pairs: Pairs, plddt_threshold: float | None = None) -> Counts:
    """Of a batch, without a forward pass."""
    known = masks(batch, pairs, plddt_threshold)
    every = torch.ones_like
    terms = (
        every(batch["lengths"]),
        every(batch["plddt"]),
        known.amino_acids,
        known.secondary,
        known.angles,
        known.pairs & pairs.contact,
        known.pairs & ~pairs.contact,
        known.foldx,
    )
    return Counts(*(term.sum(dtype=torch.float64) for term in terms))


def classes(logits_rc: Tensor, target_rc: Tensor, mask_r: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of cross entropies with class probabilities, number of rows whose likeliest class is right)."""
    logits, target = logits_rc[mask_r].float(), target_rc[mask_r].float()
    right = logits.argmax(1) == target.argmax(1)
    return F.cross_entropy(logits, target, reduction="sum"), right.sum()


def angles(predicted_r3: Tensor, target_r3: Tensor, mask_r3: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of smooth L1 of the differences, sum of their absolute values in radians), differences within ±π."""
    difference = predicted_r3[mask_r3].float() - target_r3[mask_r3].float()
    wrapped = torch.remainder(difference + math.pi, 2 * math.pi) - math.pi
    return _smooth_l1(wrapped, ANGLE_BETA), wrapped.detach().abs().sum()


def contacts(logits_p: Tensor, pairs: Pairs, mask_p: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of (-log p over contacts, -log(1 - p) over the others), p = sigmoid(logit)."""
    logits = logits_p.float()
    # By softplus, because a p that was rounded to 0 or 1 has no logarithm.
    others = F.softplus(logits[mask_p & ~pairs.contact]).sum()
    return F.softplus(-logits[mask_p & pairs.contact]).sum(), others


def distances(logits_p8: Tensor, coordinates_r3: Tensor, pairs: Pairs, mask_p: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the cross entropies of the distance bins over (contacts, others)."""
    bins = distance_bins(coordinates_r3, pairs.index)

    def over(chosen: Tensor) -> Tensor:
        return F.cross_entropy(logits_p8[chosen].float(), bins[chosen], reduction="sum")

    return over(mask_p & pairs.contact), over(mask_p & ~pairs.contact)


def distance_bins(coordinates_r3: Tensor, index_2p: Tensor) -> Tensor:
    """(P,) int64, 0..7: how many of the BOUNDARIES the distance of each pair exceeds."""
    first, second = coordinates_r3.float()[index_2p]
    boundaries = torch.tensor(BOUNDARIES, device=first.device).square()
    return torch.bucketize((first - second).square().sum(1), boundaries)


def spectrum(predicted_bs: Tensor, target_bs: Tensor) -> Tensor:
    """Sum of smooth L1."""
    return _smooth_l1(predicted_bs.float() - target_bs.float())


def foldx(predicted_b23: Tensor, target_b23: Tensor, mask_b23: Tensor) -> Tensor:
    """Sum of smooth L1 of the energies that are there."""
    return _smooth_l1(predicted_b23[mask_b23].float() - target_b23[mask_b23].float())


def quantization(encoded_rd: Tensor, quantized_rd: Tensor) -> tuple[Tensor, Tensor]:
    """(codebook, commitment) terms: sums over residues of the mean squared distance from the code, whose gradients move
    only the codes and only the encoded vectors (van den Oord et al., NeurIPS 2017)."""
    encoded, quantized = encoded_rd.float(), quantized_rd.float()

    def term(moving: Tensor, fixed: Tensor) -> Tensor:
        return (moving - fixed.detach()).square().mean(1).sum()

    return term(quantized, encoded), term(encoded, quantized)


def _smooth_l1(difference: Tensor, beta: float = 1.0) -> Tensor:
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), beta=beta, reduction="sum")
