"""Layers of the encoder and the decoders. In none does a structure see its batch mates, or padding count.

Legend: B structures, R residues of all of them one after the other, L of the longest, M neighbours of the residue that
has most, H heads, c channels.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch_geometric.nn import TransformerConv

from gdyn.engines.monodecoder.layout import POSITION_BASE, POSITION_WIDTH
from gdyn.nn.positions import encode_positions
from gdyn.nn.ragged import pad, places


def perceptron(*widths: int, bare: bool = True) -> nn.Sequential:
    """Linear maps from each width to the next, with GELU and LayerNorm behind each; behind the last only if not `bare`.

    Without the norms, which foldtree2 added later, each layer shrinks what tells residues apart to a half, and after a
    dozen of them little is learned.
    """
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), nn.GELU(), nn.LayerNorm(following)]
    return nn.Sequential(*layers[: -2 if bare else None])


def positions_of(lengths_b: Tensor) -> Tensor:
    """(R, 256) float32: the encoding of each residue's place in its chain."""
    # A row per place and not per residue: sines are dear, and the chains share them.
    table = encode_positions(torch.arange(int(lengths_b.max()), device=lengths_b.device), POSITION_WIDTH, POSITION_BASE)
    return table[places(lengths_b)]


def neighbours(edges_2e: Tensor, residues: int) -> tuple[Tensor, Tensor]:
    """The sources of each residue's edges: (indices (R, M) with zeros behind, mask (R, M) true where there is one)."""
    source, target = edges_2e
    index, mask = pad(source[target.argsort(stable=True)].unsqueeze(1), torch.bincount(target, minlength=residues))
    return index.squeeze(2), mask


def recompute(active: bool, layer: nn.Module, *inputs: Any) -> Any:
    """layer(*inputs); if active, its activations are computed again in the backward pass instead of kept."""
    if not (active and torch.is_grad_enabled()):
        return layer(*inputs)
    return torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False)


class ChainConvolutions(nn.Module):
    """Convolutions of width 3 along each chain, with zeros beyond its ends, GELU and LayerNorm of every residue behind
    each. As matrices on the rows [x_(r-1), x_r, x_(r+1)] they need no padding."""

    def __init__(self, *widths: int):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(3 * c_in, c_out) for c_in, c_out in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(c_out) for c_out in widths[1:])

    def forward(self, x_rc: Tensor, follows_r: Tensor) -> Tensor:
        """x (R, c_in); `follows_r` is false where a chain begins. Returns (R, c_out)."""
        follows_r1 = follows_r[:, None]
        for linear, norm in zip(self.linears, self.norms, strict=True):
            before = F.pad(x_rc[:-1], (0, 0, 1, 0)) * follows_r1
            behind = F.pad(x_rc[1:] * follows_r1[1:], (0, 0, 0, 1))
            x_rc = norm(F.gelu(linear(torch.cat([before, x_rc, behind], 1))))
        return x_rc


class GraphAttention(TransformerConv):
    """The graph transformer of Shi et al. (IJCAI 2021), heads averaged: PyTorch Geometric's TransformerConv without the
    biases of keys, which cancel in the softmax (Adam would make full steps of their rounding noise), and of values.

        h_i <- S x_i + b + 1/H sum_h V_h sum_j a_ijh x_j,   a_ijh = softmax_j((Q_h x_i + q_h) . K_h x_j / sqrt(c_out))

    It is evaluated in another order: keys meet the queries and attention mixes the neighbours before any matrix meets
    them, so nothing has edges x heads x channels numbers. Neighbours are padded, not scattered.
    """

    def __init__(self, c_in: int, c_out: int, heads: int, dropout: float):
        super().__init__(c_in, c_out, heads, concat=False, dropout=dropout)
        self.lin_key = nn.Linear(c_in, heads * c_out, bias=False)
        self.lin_value = nn.Linear(c_in, heads * c_out, bias=False)

    def forward(self, x_rc: Tensor, index_rm: Tensor, mask_rm: Tensor) -> Tensor:
        """x (R, c_in), neighbours as `neighbours` returns them. Returns (R, c_out)."""
        key, value, query = (
            linear.weight.unflatten(0, (self.heads, -1)) for linear in (self.lin_key, self.lin_value, self.lin_query)
        )
        # Q and K meet before any residue does, which saves a product with each residue.
        bias = self.lin_query.bias.unflatten(0, (self.heads, -1))
        query = F.linear(x_rc, (key.mT @ query).flatten(0, 1), (bias.unsqueeze(1) @ key).flatten())
        query = query.unflatten(1, (self.heads, -1))
        near = F.embedding(index_rm, x_rc).to(query.dtype)
        absent = ~mask_rm.unsqueeze(1)
        scores = (query @ near.mT).float().div(math.sqrt(self.out_channels))
        scores = scores.masked_fill(absent, torch.finfo(torch.float32).min)
        # The second mask is for residues without neighbours.
        weights = F.dropout(scores.softmax(2).masked_fill(absent, 0), self.dropout, self.training)
        mixed = weights.to(near.dtype) @ near
        # Not einsum, which would make heads x residues x channels numbers before it sums over the heads.
        values = value.transpose(1, 2).flatten(0, 1).to(mixed.dtype) / self.heads
        return mixed.flatten(1) @ values + self.lin_skip(x_rc)


class SelfAttention(nn.Module):
    """A post-norm transformer encoder layer (Vaswani et al. 2017) over each structure's residues.

    nn.TransformerEncoderLayer computes the same, but has a second implementation for evaluation, a bias of the keys
    (which cancels in the softmax: Adam would make full steps of its rounding noise), and feeds padding through every
    matrix. Here only attention itself is padded.
    """

    def __init__(self, width: int, heads: int, feed_forward: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)
        self.norm_attention, self.norm_feed_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, feed_forward), nn.ReLU(), nn.Dropout(dropout), nn.Linear(feed_forward, width)
        )

    def forward(self, x_rc: Tensor, lengths_b: Tensor) -> Tensor:
        """x (R, c). Returns (R, c)."""
        rows = torch.cat([self.query(x_rc), self.key(x_rc), self.value(x_rc)], 1)
        padded, mask = pad(rows, lengths_b)
        query, key, value = padded.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, mask[:, None, None], dropout)
        mixed = self.out(mixed.transpose(1, 2)[mask].flatten(1))
        x_rc = self.norm_attention(x_rc + F.dropout(mixed, self.dropout, self.training))
        return self.norm_feed_forward(x_rc + F.dropout(self.feed_forward(x_rc), self.dropout, self.training))
