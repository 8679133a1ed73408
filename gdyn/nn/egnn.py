"""E(n)-equivariant graph networks (Satorras, Hoogeboom & Welling, ICML 2021, arXiv:2102.09844) over all pairs of atoms.

Dense and masked: no edge lists and no scatter. W [h_i, h_j, e_ij] is computed as W_1 h_i + W_2 h_j + W_3 e_ij, which
leaves one matrix product per pair of the two. Molecules of like size are computed together, cut to the largest of them,
so that a batch of mixed sizes does not pay for its padding.

Legend: B molecules, n atoms of the largest one (padded), H features; in a group of like sizes g molecules, m atoms of
the largest one, and r of its rows at a time. i (rows) is the atom that receives, j the one that sends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint as recompute

Normalization = Literal["sum", "mean"]

SUM_DIVISOR = 100.0
"""What "sum" divides by (EDM, Hoogeboom et al. 2022, arXiv:2203.17003)."""
COORDS_RANGE = 15.0
"""Å; the most by which tanh lets one pair move an atom, all blocks together, before the divisor."""
PADDING = 1.125
"""The most that padded pairs are over real ones in a group of molecules."""
PAIRS = 2**17
"""Computed at a time, which bounds what is alive beside the kept activations."""
PAIRS_ON_CPU = 2**12
"""So many stay in a core's cache from one operation to the next."""


class EGNN(nn.Module):
    """Features and coordinates of molecules to features and coordinates: in each block, message layers (`sublayers`)
    and then one update of the coordinates.

    Features are invariant and coordinates equivariant under rotations, reflections and translations. Sums over pairs
    include i = j, as in EDM's descendants, and are divided by 100 (normalization "sum") or by the number of atoms
    ("mean"). attention: a gate in (0, 1) on every message. tanh: bounds the steps of coordinates. norm_constant, Å:
    added to the distance by which differences are divided. checkpoint: of each block only the inputs are kept, and the
    backward pass computes it again.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        blocks: int,
        sublayers: int = 2,
        attention: bool = False,
        tanh: bool = False,
        norm_constant: float = 0.0,
        normalization: Normalization = "sum",
        checkpoint: bool = False,
    ):
        super().__init__()
        self.normalization, self.checkpoint = normalization, checkpoint
        reach = COORDS_RANGE / blocks if tanh else None
        self.embedding = nn.Linear(in_features, hidden)
        self.blocks = nn.ModuleList(Block(hidden, sublayers, attention, reach, norm_constant) for _ in range(blocks))
        self.readout = nn.Linear(hidden, out_features)

    def forward(self, h_bnc: Tensor, x_bn3: Tensor, mask_bn: Tensor) -> tuple[Tensor, Tensor]:
        """h_bnc of any float type; x_bn3, Å; mask_bn bool. Returns (B, n, out) of the parameters' type and (B, n, 3)
        of at least float32. Both are zero at padding; what the inputs hold there does not matter."""
        padding_bn1 = ~mask_bn.unsqueeze(-1)
        x = at_least_float32(x_bn3).masked_fill(padding_bn1, 0.0)
        order_b, groups = group_by_size(mask_bn, self.normalization, x.dtype)
        x = x[order_b]
        h = h_bnc.to(self.embedding.weight.dtype).masked_fill(padding_bn1, 0.0)[order_b]
        h = self.embedding(h)
        initial = [squared_lengths(group.differences(x)) for group in groups]
        for block in self.blocks:
            if self.checkpoint and torch.is_grad_enabled():
                h, x = recompute(block, h, x, groups, initial, use_reentrant=False)
            else:
                h, x = block(h, x, groups, initial)
        restore_b = order_b.argsort()
        return self.readout(h)[restore_b].masked_fill(padding_bn1, 0.0), x[restore_b].masked_fill(padding_bn1, 0.0)


class Block(nn.Module):
    """Message layers, then one step of the coordinates, all with the distances at the block's start."""

    def __init__(self, hidden: int, sublayers: int, attention: bool, reach: float | None, norm_constant: float):
        super().__init__()
        self.messages = nn.ModuleList(MessageLayer(hidden, attention) for _ in range(sublayers))
        self.steps = CoordinateStep(hidden, reach, norm_constant)

    def forward(self, h: Tensor, x: Tensor, groups: list[Group], initial: list[Tensor]) -> tuple[Tensor, Tensor]:
        """h (B, n, H); x (B, n, 3); initial: d_ij^2 (g, m, m) of each group at the network's input."""
        differences = [group.differences(x) for group in groups]
        edges = [torch.stack([squared_lengths(d), d_0], dim=-1) for d, d_0 in zip(differences, initial, strict=True)]
        for layer in self.messages:
            h = layer(h, edges, groups)
        return h, x + self.steps(h, edges, groups, differences)


class MessageLayer(nn.Module):
    """h_i + MLP [h_i, sum_j m_ij] with m_ij = MLP [h_i, h_j, e_ij], times a gate if there is attention."""

    def __init__(self, hidden: int, attention: bool):
        super().__init__()
        self.first, self.second = nn.Linear(2 * hidden + 2, hidden), nn.Linear(hidden, hidden)
        self.gate = nn.Linear(hidden, 1) if attention else None
        self.update = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, h: Tensor, edges: list[Tensor], groups: list[Group]) -> Tensor:
        sums = map_pairs(self.first, self.second, h, edges, groups, self.aggregate)
        return h + self.update(torch.cat([h, join(sums, h.shape[1])], dim=-1))

    def aggregate(self, m_grmh: Tensor, weights_g1m: Tensor) -> Tensor:
        weights = weights_g1m.to(m_grmh.dtype).expand(m_grmh.shape[:-1])
        if self.gate is not None:
            weights = weights * self.gate(m_grmh).squeeze(-1).sigmoid()
        return (weights.unsqueeze(2) @ m_grmh).squeeze(2)


class CoordinateStep(nn.Module):
    """sum_j (x_i - x_j) / (d_ij + norm_constant) phi_ij with phi_ij = MLP [h_i, h_j, e_ij], which `reach` bounds by a
    tanh."""

    def __init__(self, hidden: int, reach: float | None, norm_constant: float):
        super().__init__()
        self.reach, self.norm_constant = reach, norm_constant
        self.first, self.second = nn.Linear(2 * hidden + 2, hidden), nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, 1, bias=False)
        # The network starts near the identity of the coordinates.
        nn.init.xavier_uniform_(self.last.weight, gain=0.001)

    def forward(self, h: Tensor, edges: list[Tensor], groups: list[Group], differences: list[Tensor]) -> Tensor:
        """differences: x_i - x_j (g, m, m, 3) of each group, Å. Returns (B, n, 3), Å."""
        phis = map_pairs(self.first, self.second, h, edges, groups, lambda m_grmh, _: self.last(m_grmh).squeeze(-1))
        steps = []
        for group, edge, d_gmm3, phi in zip(groups, edges, differences, phis, strict=True):
            phi_gmm = phi.to(d_gmm3.dtype)
            if self.reach is not None:
                phi_gmm = phi_gmm.tanh() * self.reach
            scale = phi_gmm * group.weights_g1m / (length(edge[..., 0]) + self.norm_constant)
            steps.append((d_gmm3 * scale.unsqueeze(-1)).sum(2))
        return join(steps, h.shape[1])


@dataclass(frozen=True)
class Group:
    """Molecules of like size, neighbours in a batch that is sorted by size."""

    molecules: slice
    atoms: int
    """m."""
    rows: int
    """r, so many atoms i at a time."""
    weights_g1m: Tensor
    """Of atom j in a sum: 0 for padding, else 1 over the divisor."""

    def cut(self, tensor: Tensor) -> Tensor:
        """(B, n, c) to (g, m, c)."""
        return tensor[self.molecules, : self.atoms]

    def differences(self, x_bn3: Tensor) -> Tensor:
        """x_i - x_j, (g, m, m, 3)."""
        x = self.cut(x_bn3)
        return x.unsqueeze(2) - x.unsqueeze(1)


def group_by_size(mask_bn: Tensor, normalization: Normalization, dtype: torch.dtype) -> tuple[Tensor, list[Group]]:
    """The order (B,) that sorts molecules by size, and the groups in that order, with weights of this type. Waits for
    the device."""
    # Up to the last real atom, and one at least: masks may have holes or be empty.
    numbers = torch.arange(1, mask_bn.shape[1] + 1, device=mask_bn.device)
    sizes_b, order_b = (mask_bn * numbers).amax(1).clamp_min(1).sort(stable=True)
    real_bn = mask_bn[order_b].to(dtype)
    divisor = real_bn.sum(1, keepdim=True).clamp_min(1) if normalization == "mean" else SUM_DIVISOR
    weights_bn = real_bn / divisor
    pairs = PAIRS_ON_CPU if mask_bn.device.type == "cpu" else PAIRS
    groups, sizes = [], sizes_b.tolist()
    for begin, end in cut_by_size(sizes, pairs):
        molecules, atoms = slice(begin, end), sizes[end - 1]
        rows = max(1, pairs // ((end - begin) * atoms))
        groups.append(Group(molecules, atoms, rows, weights_bn[molecules, None, :atoms]))
    return order_b, groups


def cut_by_size(sizes: list[int], pairs: int) -> list[tuple[int, int]]:
    """Ranges of ascending sizes with little padding, and at most `pairs` padded pairs if there are more than one."""
    begins, real = [0], 0
    for k, size in enumerate(sizes):
        padded = (k + 1 - begins[-1]) * size**2
        if k > begins[-1] and padded > min(PADDING * (real + size**2), pairs):
            begins.append(k)
            real = 0
        real += size**2
    return list(zip(begins, [*begins[1:], len(sizes)], strict=True))


def join(parts: list[Tensor], n: int) -> Tensor:
    """Groups (g, m, c) as one batch (B, n, c)."""
    return torch.cat([F.pad(part, (0, 0, 0, n - part.shape[1])) for part in parts])


def at_least_float32(x: Tensor) -> Tensor:
    """For coordinates: as bfloat16, atoms at 30 Å would be off by 0.1 Å."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_position(x_bn3: Tensor, mask_bn: Tensor) -> Tensor:
    """Of the real atoms, (B, 1, 3); 0 where there are none."""
    mask_bn1 = mask_bn.unsqueeze(-1)
    return x_bn3.masked_fill(~mask_bn1, 0.0).sum(1, keepdim=True) / mask_bn1.sum(1, keepdim=True).clamp_min(1)


def centred(x_bn3: Tensor, mask_bn: Tensor) -> Tensor:
    """Relative to the mean of the real atoms; 0 at padding."""
    return (x_bn3 - mean_position(x_bn3, mask_bn)).masked_fill(~mask_bn.unsqueeze(-1), 0.0)


def squared_lengths(differences: Tensor) -> Tensor:
    return differences.square().sum(-1)


def length(squares: Tensor) -> Tensor:
    """sqrt(d^2 + 1e-8), whose slope is finite at d = 0, Å."""
    return (squares + 1e-8).sqrt()


def map_pairs(
    first: nn.Linear,
    second: nn.Linear,
    h_bnh: Tensor,
    edges: list[Tensor],
    groups: list[Group],
    reduce: Callable[[Tensor, Tensor], Tensor],
) -> list[Tensor]:
    """reduce(m, weights) of each group, where m_ij = SiLU(second(SiLU(first [h_i, h_j, e_ij]))), (g, m, ...).

    `reduce` sees some rows at a time: m (g, r, m, H) and weights (g, 1, m).
    """
    hidden = h_bnh.shape[-1]
    w_own, w_other, w_edge = first.weight.split([hidden, hidden, edges[0].shape[-1]], dim=1)
    own, other = F.linear(h_bnh, w_own, first.bias), F.linear(h_bnh, w_other)
    # Autocast mixes types, which the fused form does not.
    features = plain_pairs if torch.is_autocast_enabled(h_bnh.device.type) else FusedPairs.apply
    results = []
    for group, edge in zip(groups, edges, strict=True):
        other_gmh = group.cut(other)
        strips = zip(group.cut(own).split(group.rows, 1), edge.to(own.dtype).split(group.rows, 1), strict=True)
        parts = [
            reduce(features(own_grh, other_gmh, edge_grmc, w_edge, second.weight, second.bias), group.weights_g1m)
            for own_grh, edge_grmc in strips
        ]
        results.append(torch.cat(parts, dim=1))
    return results


def plain_pairs(own: Tensor, other: Tensor, edges: Tensor, w_edge: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU(W SiLU(own_i + other_j + W_e e_ij) + b): own (g, r, H), other (g, m, H), edges (g, r, m, c) to
    (g, r, m, H)."""
    z = own.unsqueeze(2) + other.unsqueeze(1) + F.linear(edges, w_edge)
    return F.silu(F.linear(F.silu(z), weight, bias))


class FusedPairs(torch.autograd.Function):
    """`plain_pairs`, the same numbers, from one kept tensor (g, r, m, H) instead of three: what comes before the matrix
    product takes less time to compute again than its memory takes to get."""

    @staticmethod
    def forward(ctx, own, other, edges, w_edge, weight, bias):  # type: ignore[no-untyped-def]
        y = F.linear(F.silu(sum_of_pairs(own, other, edges, w_edge), inplace=True), weight, bias)
        ctx.save_for_backward(own, other, edges, w_edge, weight, y)
        return F.silu(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        own, other, edges, w_edge, weight, y = ctx.saved_tensors
        z = sum_of_pairs(own, other, edges, w_edge)
        d_y = torch.ops.aten.silu_backward(grad, y).view(-1, y.shape[-1])
        activated = F.silu(z).view(d_y.shape)
        d_weight, d_bias = d_y.t() @ activated, d_y.sum(0)
        d_z = torch.mm(d_y, weight, out=activated).view(z.shape)
        torch.ops.aten.silu_backward.grad_input(d_z, z, grad_input=d_z)
        rows = d_z.view(d_y.shape)
        # Transposed: BLAS is several times slower at products with two columns than at those with two rows.
        d_edges = (w_edge.t() @ rows.t()).t().view(edges.shape)
        d_w_edge = (edges.reshape(-1, edges.shape[-1]).t() @ rows).t()
        return d_z.sum(2), d_z.sum(1), d_edges, d_w_edge, d_weight, d_bias


def sum_of_pairs(own: Tensor, other: Tensor, edges: Tensor, w_edge: Tensor) -> Tensor:
    """own_i + other_j + W_e e_ij, (g, r, m, H)."""
    z = own.unsqueeze(2) + other.unsqueeze(1)
    z.view(-1, z.shape[-1]).addmm_(edges.reshape(-1, edges.shape[-1]), w_edge.t())
    return z
