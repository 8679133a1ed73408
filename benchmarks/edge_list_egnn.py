"""The E(n)-equivariant network on edge lists, in plain PyTorch: what gdyn's is measured against.

Written after EDM's program: an edge for every pair of real atoms, [h_i, h_j, e_ij] of every edge in full, sums by
index_add. Rows are gathered by index_select, which is faster on a CPU than h[index], forward and backward.
Parameters carry gdyn's names, so `network.load_state_dict(egnn.state_dict())` makes both the same function.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdyn.nn.egnn import SUM_DIVISOR


class EdgeListEGNN(nn.Module):
    def __init__(self, in_features: int, hidden: int, out_features: int, blocks: int, sublayers: int = 2):
        super().__init__()
        self.embedding = nn.Linear(in_features, hidden)
        self.blocks = nn.ModuleList(Block(hidden, sublayers) for _ in range(blocks))
        self.readout = nn.Linear(hidden, out_features)

    def forward(
        self, h_bnc: Tensor, x_bn3: Tensor, mask_bn: Tensor, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As gdyn's, but returns the real atoms only, (atoms, out) and (atoms, 3). real: (edges, 1), by which messages
        and steps are multiplied."""
        rows, columns = edge_list(mask_bn)
        h, x = self.embedding(h_bnc[mask_bn]), x_bn3[mask_bn]
        initial = squares(x.index_select(0, rows) - x.index_select(0, columns))
        for block in self.blocks:
            h, x = block(h, x, rows, columns, initial, real)
        return self.readout(h), x


def edge_list(mask_bn: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of real atoms of a molecule, by their rows in tensor[mask_bn]."""
    molecules, i, j = (mask_bn.unsqueeze(2) & mask_bn.unsqueeze(1)).nonzero(as_tuple=True)
    place = mask_bn.flatten().cumsum(0) - 1
    n = mask_bn.shape[1]
    return place[molecules * n + i], place[molecules * n + j]


def squares(differences: Tensor) -> Tensor:
    return differences.square().sum(1, keepdim=True)


class Block(nn.Module):
    def __init__(self, hidden: int, sublayers: int):
        super().__init__()
        self.messages = nn.ModuleList(MessageLayer(hidden) for _ in range(sublayers))
        self.steps = CoordinateStep(hidden)

    def forward(
        self, h: Tensor, x: Tensor, rows: Tensor, columns: Tensor, initial: Tensor, real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        differences = x.index_select(0, rows) - x.index_select(0, columns)
        distances = squares(differences)
        edges = torch.cat([distances, initial], dim=1)
        for layer in self.messages:
            h = layer(h, edges, rows, columns, real)
        directions = differences / (distances + 1e-8).sqrt()
        steps = directions * self.steps(h, edges, rows, columns, real)
        return h, x + torch.zeros_like(x).index_add(0, rows, steps) / SUM_DIVISOR


class EdgeNetwork(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.first, self.second = nn.Linear(2 * hidden + 2, hidden), nn.Linear(hidden, hidden)

    def features(self, h: Tensor, edges: Tensor, rows: Tensor, columns: Tensor, real: Tensor | None) -> Tensor:
        z = torch.cat([h.index_select(0, rows), h.index_select(0, columns), edges], dim=1)
        m = F.silu(self.second(F.silu(self.first(z))))
        return m if real is None else m * real


class MessageLayer(EdgeNetwork):
    def __init__(self, hidden: int):
        super().__init__(hidden)
        self.update = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, h: Tensor, edges: Tensor, rows: Tensor, columns: Tensor, real: Tensor | None) -> Tensor:
        messages = self.features(h, edges, rows, columns, real)
        sums = torch.zeros_like(h).index_add(0, rows, messages) / SUM_DIVISOR
        return h + self.update(torch.cat([h, sums], dim=1))


class CoordinateStep(EdgeNetwork):
    def __init__(self, hidden: int):
        super().__init__(hidden)
        self.last = nn.Linear(hidden, 1, bias=False)

    def forward(self, h: Tensor, edges: Tensor, rows: Tensor, columns: Tensor, real: Tensor | None) -> Tensor:
        return self.last(self.features(h, edges, rows, columns, real))
