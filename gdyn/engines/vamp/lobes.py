"""The graph networks of GDyNet (Xie et al., Nat. Commun. 10 (2019) 2667): frames in, state probabilities of target
atoms out.

Written with dense neighbour tensors: frames x atoms x neighbours, no graph objects and no scatter in the forward pass.
W [h_i, h_j, e_ij] is computed as W1 h_i + (W2 h)_j + W3 e_ij, which needs a quarter of the multiplications.

Legend: B frames, N atoms, M neighbours, n targets, A features, G Gaussians, k states; h_bna atom features.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from gdyn.engines.vamp.edges import attend_edges
from gdyn.engines.vamp.frames import MAX_ATOM_TYPE
from gdyn.nn.gaussians import expand_distances
from gdyn.nn.norm import BatchNorm

Norm = Literal["atom", "batch"]


def make_norm(norm: Norm, features: int) -> nn.Module:
    return nn.LayerNorm(features) if norm == "atom" else BatchNorm(features)


class Convolution(nn.Module):
    """One crystal-graph convolution with attention: for an edge i <- j, z = [h_i, h_j, e_ij];
    h_i <- ReLU(norm(mean_j softmax_j(w_f z + b_f) ReLU(norm(W_c z + b_c))) + h_i).

    The mean on top of a softmax, an extra factor 1/M, is the original's.
    """

    def __init__(self, features: int, gaussians: int, norm: Norm):
        super().__init__()
        self.core = nn.Linear(2 * features + gaussians, features)
        self.score = nn.Linear(2 * features + gaussians, 1)
        self.norm_edges = make_norm(norm, features)
        self.norm_atoms = make_norm(norm, features)
        for linear in (self.core, self.score):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, h_bna: torch.Tensor, nbr: torch.Tensor, gaussians: torch.Tensor, centres: torch.Tensor | None
    ) -> torch.Tensor:
        """h_bna (B, N, A); nbr (B, C M) int, rows of h_bna.view(B N, A); gaussians (B, C, M, G). C centres: all N atoms
        in order, or those indexed by `centres` (C,). Returns (B, C, A)."""
        b, n, a = h_bna.shape
        own = h_bna if centres is None else h_bna[:, centres]
        w_own, w_nbr, w_edge = self.core.weight.split([a, a, gaussians.shape[-1]], 1)
        # What h_i adds to the scores is the same for all its edges and cancels in the softmax. So does the bias, which
        # must have a gradient for DeepSpeed, but an exact zero: Adam would make full steps of rounding noise.
        _, s_nbr, s_edge = self.score.weight[0].split([a, a, gaussians.shape[-1]])
        aggregate = attend_edges(
            nbr.reshape(-1),
            gaussians,
            F.linear(own, w_own, self.core.bias),
            F.linear(h_bna, w_nbr).view(b * n, a),
            F.linear(h_bna, s_nbr[None], 0 * self.score.bias).view(-1),
            w_edge,
            s_edge,
            self.norm_edges,
        )
        return F.relu(self.norm_atoms(aggregate) + own)


class Lobe(nn.Module):
    """Frames to state probabilities: embedding, convolutions, readout at the targets."""

    def __init__(
        self, states: int, features: int, convolutions: int, cutoff: float, gaussians: int, norm: Norm, ferro: bool
    ):
        super().__init__()
        self.cutoff, self.gaussians, self.norm = cutoff, gaussians, norm
        self.embedding = nn.Embedding(MAX_ATOM_TYPE + 1, features)
        self.directions = nn.Linear(3, features) if ferro else None
        self.convolutions = nn.ModuleList(Convolution(features, gaussians, norm) for _ in range(convolutions))
        self.hidden = nn.Linear(features, features)
        self.readout = nn.Linear(features, states)

    def forward(self, frames: dict[str, torch.Tensor]) -> torch.Tensor:
        """`frames` as `gdyn.engines.vamp.frames` makes them. Returns (B, n, k) float32 probabilities."""
        lists, targets = frames["nbr_lists"], frames["target_index"]
        b, n, m = lists.shape
        h = self.embedding(frames["atom_types"]).expand(b, -1, -1)
        if self.directions is not None:
            h = h + self.directions(frames["atom_directions"].to(h.dtype))
        # Rows of the flattened (B N, A) feature table.
        nbr = lists + n * torch.arange(b, device=lists.device, dtype=lists.dtype)[:, None, None]
        gaussians = expand_distances(frames["nbr_dists"], self.cutoff, self.gaussians).to(h.dtype)
        last = len(self.convolutions) - 1
        for i, convolution in enumerate(self.convolutions):
            # Only the targets are read out, so the last layer is evaluated there alone. Batch statistics are taken over
            # all atoms and need them.
            if i == last and self.norm == "atom":
                h = convolution(h, nbr[:, targets].flatten(1), gaussians[:, targets], targets)
            else:
                h = convolution(h, nbr.flatten(1), gaussians, None)
        if self.norm != "atom" or last < 0:
            h = h[:, targets]
        h = F.relu(self.hidden(F.relu(h)))
        return self.readout(h).float().softmax(-1)


class Lobes(nn.Module):
    """The two ends of a lag: lobe_0 sees frames t, lobe_t frames t + tau. They start equal; `shared` keeps them one
    network."""

    def __init__(self, lobe: Lobe, shared: bool):
        super().__init__()
        self.lobe_0 = lobe
        self.shared = shared
        if not shared:
            self.lobe_t = copy.deepcopy(lobe)

    def forward(self, pairs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """2 B frames, first those at t. Returns two (B, n, k)."""
        if self.shared:
            first, second = self.lobe_0(pairs).chunk(2)
            return first, second
        per_frame = {name for name in pairs if name not in ("atom_types", "target_index")}
        ends = [
            {name: tensor.chunk(2)[side] if name in per_frame else tensor for name, tensor in pairs.items()}
            for side in (0, 1)
        ]
        return self.lobe_0(ends[0]), self.lobe_t(ends[1])
