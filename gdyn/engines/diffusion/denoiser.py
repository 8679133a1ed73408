"""The denoiser: what noise is in a ligand's latent cloud, given the pocket's (with classifier-free guidance, Ho &
Salimans 2022, arXiv:2207.12598).

Latents arrive as they are diffused: whoever scales the features undoes it before decoding.

Legend: B complexes, n ligand atoms and m pocket atoms of the largest one (padded), H hidden features, D latent features
of the ligand, P of the pocket; i ligand, p pocket, k pocket atoms near to a ligand atom.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from gdyn.nn.egnn import (
    EGNN,
    SUM_DIVISOR,
    Normalization,
    at_least_float32,
    centred,
    length,
    mean_position,
    squared_lengths,
)

STEP = 0.1
"""Å; the most by which one pocket atom moves a ligand atom, before the divisor."""


class Denoiser(nn.Module):
    """Cross attention to the pocket, then an EGNN of the ligand atoms."""

    def __init__(
        self,
        latent: int = 32,
        pocket_features: int = 32,
        hidden: int = 256,
        blocks: int = 3,
        sublayers: int = 2,
        cross_attentions: int = 2,
        cutoff: float = 8.0,
        attention: bool = False,
        tanh: bool = False,
        norm_constant: float = 0.0,
        normalization: Normalization = "sum",
        checkpoint: bool = False,
    ):
        """cutoff: Å, pairs of ligand and pocket atoms that see each other; the rest as of EGNN."""
        super().__init__()
        self.checkpoint = checkpoint
        self.time = nn.Sequential(nn.Linear(1, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.embedding = nn.Linear(latent + hidden, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.null_pocket = nn.Parameter(0.01 * torch.randn(pocket_features))
        self.cross_attentions = nn.ModuleList(
            CrossAttention(hidden, pocket_features, cutoff) for _ in range(cross_attentions)
        )
        self.egnn = EGNN(
            hidden, hidden, latent, blocks, sublayers, attention, tanh, norm_constant, normalization, checkpoint
        )

    def forward(
        self,
        t_b1: Tensor,
        z_x: Tensor,
        z_h: Tensor,
        ligand_mask: Tensor,
        pocket_x: Tensor,
        pocket_h: Tensor,
        pocket_mask: Tensor,
        keep_b: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """t_b1: t / T in [0, 1]; z_x (B, n, 3) and pocket_x (B, m, 3), Å; z_h (B, n, D); pocket_h (B, m, P); masks and
        keep_b bool. A sample that is not kept sees, in place of its pocket, one learned atom at the ligand's mean.

        Returns the noise (B, n, 3), which has mean zero as the noise of coordinates has, and (B, n, D); float32 or
        more, zero at padding.
        """
        dtype = self.embedding.weight.dtype
        padding_bn1 = ~ligand_mask.unsqueeze(-1)
        start = x = at_least_float32(z_x)
        pocket_x, pocket_h, pocket_mask = self.drop_pockets(
            keep_b, mean_position(x, ligand_mask), pocket_x, pocket_h.to(dtype), pocket_mask
        )
        time_bnh = self.time(t_b1.to(dtype)).unsqueeze(1).expand(-1, z_h.shape[1], -1)
        h = self.embedding(torch.cat([z_h.to(dtype).masked_fill(padding_bn1, 0.0), time_bnh], dim=-1))
        h = self.norm(h)
        for layer in self.cross_attentions:
            inputs = (h, x, ligand_mask, pocket_h, pocket_x, pocket_mask)
            if self.checkpoint and torch.is_grad_enabled():
                h, x = recompute(layer, *inputs, use_reentrant=False)
            else:
                h, x = layer(*inputs)
        noise_h, x = self.egnn(h, x, ligand_mask)
        return centred(x - start, ligand_mask), at_least_float32(noise_h)

    def drop_pockets(
        self, keep_b: Tensor, mean_b13: Tensor, pocket_x: Tensor, pocket_h: Tensor, pocket_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        keep_b11 = keep_b.view(-1, 1, 1)
        only_first = torch.arange(pocket_mask.shape[1], device=keep_b.device) == 0
        return (
            torch.where(keep_b11, at_least_float32(pocket_x), mean_b13),
            torch.where(keep_b11, pocket_h, self.null_pocket),
            torch.where(keep_b.unsqueeze(1), pocket_mask, only_first),
        )


class CrossAttention(nn.Module):
    """Ligand atoms look at pocket atoms closer than the cutoff, with gates in (0, 1) that need not add up to 1:

        h_i + sum_p a_ip v_ip / 100,  a_ip = sigmoid(MLP [h_i, h_p, d_ip^2]), v_ip = MLP [h_p, d_ip^2]
        x_i + 0.1 sum_p tanh(MLP [h_i, h_p, d_ip^2]) (x_i - x_p) / d_ip / 100

    Only the pocket atoms near to each ligand atom are computed, a seventh of all pairs. The last linear map of v comes
    after the sum, so the matrix products of pairs are those of the few features of pocket atoms.
    """

    def __init__(self, hidden: int, pocket_features: int, cutoff: float):
        super().__init__()
        self.cutoff = cutoff
        self.gate, self.gate_out = nn.Linear(hidden + pocket_features + 1, hidden), nn.Linear(hidden, 1)
        self.value, self.value_out = nn.Linear(pocket_features + 1, hidden), nn.Linear(hidden, hidden)
        self.step, self.step_out = nn.Linear(hidden + pocket_features + 1, hidden), nn.Linear(hidden, 1)

    def forward(
        self, h: Tensor, x: Tensor, mask_bn: Tensor, pocket_h: Tensor, pocket_x: Tensor, pocket_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """h (B, n, H), x (B, n, 3), pocket_h (B, m, P), pocket_x (B, m, 3). What padding holds does not matter."""
        x = x.masked_fill(~mask_bn.unsqueeze(-1), 0.0)
        pocket_x, pocket_h = (t.masked_fill(~pocket_mask.unsqueeze(-1), 0.0) for t in (pocket_x, pocket_h))
        index_bnk, near_bnk = neighbours(self.cutoff, x, mask_bn, pocket_x, pocket_mask)
        batch_b11 = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        differences = x.unsqueeze(2) - pocket_x[batch_b11, index_bnk]
        squares = squared_lengths(differences)

        pairs = torch.cat([pocket_h[batch_b11, index_bnk], squares.to(h.dtype).unsqueeze(-1)], dim=-1)
        gates = self.gate_out(hidden_of_pairs(self.gate, h, pairs)).squeeze(-1).sigmoid()
        gates = gates.masked_fill(~near_bnk, 0.0) / SUM_DIVISOR
        sums = (gates.unsqueeze(2) @ F.silu(self.value(pairs))).squeeze(2)
        # The bias of the last map counts once per pair, as if it came before the sum.
        values = F.linear(sums, self.value_out.weight) + gates.sum(2).unsqueeze(-1) * self.value_out.bias

        steps = self.step_out(hidden_of_pairs(self.step, h, pairs)).squeeze(-1).tanh().to(x.dtype)
        scale = STEP / SUM_DIVISOR * steps.masked_fill(~near_bnk, 0.0) / length(squares)
        return h + values, x + (scale.unsqueeze(-1) * differences).sum(2)


@torch.no_grad()
def neighbours(
    cutoff: float, x_bn3: Tensor, mask_bn: Tensor, pocket_x: Tensor, pocket_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The nearest pocket atoms of each ligand atom, (B, n, k), where k is the most that an atom has within the cutoff;
    and which of them are within it. Waits for the device."""
    squares = squared_lengths(x_bn3.unsqueeze(2) - pocket_x.unsqueeze(1))
    near = (squares < cutoff**2) & mask_bn.unsqueeze(2) & pocket_mask.unsqueeze(1)
    most = max(1, int(near.sum(2).amax()))
    index = squares.masked_fill(~near, torch.inf).topk(most, dim=2, largest=False).indices
    return index, near.gather(2, index)


def hidden_of_pairs(linear: nn.Linear, h_bnh: Tensor, pairs_bnkc: Tensor) -> Tensor:
    """SiLU(linear [h_i, pairs_ip]), (B, n, k, H). Both parts of the weight are applied before they are added."""
    w_own, w_pairs = linear.weight.split([h_bnh.shape[-1], pairs_bnkc.shape[-1]], dim=1)
    return F.silu(F.linear(pairs_bnkc, w_pairs, linear.bias) + F.linear(h_bnh, w_own).unsqueeze(2))
