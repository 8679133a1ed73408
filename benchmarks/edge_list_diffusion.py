"""The diffusion engine's networks on edge lists, in plain PyTorch: gdyn's network with every EGNN and every cross
attention replaced by the same function, written as EDM and its descendants write it."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.edge_list_egnn import EdgeListEGNN
from gdyn.engines.diffusion.denoiser import STEP, CrossAttention
from gdyn.nn.egnn import EGNN, SUM_DIVISOR


def on_edge_lists(network: nn.Module, padded_to: int | None = None) -> nn.Module:
    """The same function, of parameters that have the same names and values."""
    twin = copy.deepcopy(network)
    for path, module in network.named_modules():
        replacement: nn.Module
        if isinstance(module, EGNN):
            replacement = PaddedEGNN(module, padded_to)
        elif isinstance(module, CrossAttention):
            replacement = EdgeListCrossAttention(module)
        else:
            continue
        parent, _, name = path.rpartition(".")
        if path.startswith("denoiser_average"):
            continue  # holds buffers, and is not asked in training
        setattr(twin.get_submodule(parent), name, replacement)
    return twin


class PaddedEGNN(EdgeListEGNN):
    """Outputs as gdyn's, zero at padding."""

    def __init__(self, egnn: EGNN, padded_to: int | None = None):
        """padded_to: have edges between as many atoms of each molecule, real or not, and multiply those of padding by
        zero, as the programs do whose edges are made once for a whole data set."""
        embedding, readout = egnn.embedding, egnn.readout
        sizes = embedding.in_features, embedding.out_features, readout.out_features
        super().__init__(*sizes, len(egnn.blocks), len(egnn.blocks[0].messages))
        self.load_state_dict(egnn.state_dict())
        self.padded_to = padded_to

    def forward(self, h_bnc: Tensor, x_bn3: Tensor, mask_bn: Tensor) -> tuple[Tensor, Tensor]:
        if self.padded_to is not None:
            return self.with_padded_edges(h_bnc, x_bn3, mask_bn, self.padded_to)
        h, x = super().forward(h_bnc, x_bn3, mask_bn)
        outputs = h_bnc.new_zeros(*mask_bn.shape, h.shape[1]), x_bn3.new_zeros(x_bn3.shape)
        padded_h, padded_x = (o.index_put((mask_bn,), rows) for o, rows in zip(outputs, (h, x), strict=True))
        return padded_h, padded_x

    def with_padded_edges(self, h: Tensor, x: Tensor, mask: Tensor, n: int) -> tuple[Tensor, Tensor]:
        longer = (0, 0, 0, n - mask.shape[1])
        wide = F.pad(mask, longer[2:])
        real = (wide.unsqueeze(2) & wide.unsqueeze(1)).view(-1, 1).to(h.dtype)
        h, x = super().forward(F.pad(h, longer), F.pad(x, longer), torch.ones_like(wide), real)
        h, x = (t.view(*wide.shape, -1)[:, : mask.shape[1]] * mask.unsqueeze(-1) for t in (h, x))
        return h, x


class EdgeListCrossAttention(nn.Module):
    """With edges between ligand and pocket atoms closer than the cutoff."""

    def __init__(self, layer: CrossAttention):
        super().__init__()
        self.cutoff = layer.cutoff
        for name, module in layer.named_children():
            setattr(self, name, copy.deepcopy(module))

    def forward(
        self, h: Tensor, x: Tensor, mask_bn: Tensor, pocket_h: Tensor, pocket_x: Tensor, pocket_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        ligand, pocket = edges_within(self.cutoff, x, mask_bn, pocket_x, pocket_mask)
        shapes = h.shape, x.shape
        h, x, pocket_h, pocket_x = (t.flatten(0, 1) for t in (h, x, pocket_h, pocket_x))
        differences = x.index_select(0, ligand) - pocket_x.index_select(0, pocket)
        squares = differences.square().sum(1, keepdim=True)
        of_pocket = torch.cat([pocket_h.index_select(0, pocket), squares], dim=1)
        of_both = torch.cat([h.index_select(0, ligand), of_pocket], dim=1)
        gates = self.gate_out(F.silu(self.gate(of_both))).sigmoid()
        values = self.value_out(F.silu(self.value(of_pocket)))
        steps = self.step_out(F.silu(self.step(of_both))).tanh()
        moves = STEP * steps * differences / (squares + 1e-8).sqrt()
        h = h + torch.zeros_like(h).index_add(0, ligand, gates * values) / SUM_DIVISOR
        x = x + torch.zeros_like(x).index_add(0, ligand, moves) / SUM_DIVISOR
        return h.view(shapes[0]), x.view(shapes[1])


@torch.no_grad()
def edges_within(
    cutoff: float, x_bn3: Tensor, mask_bn: Tensor, pocket_x: Tensor, pocket_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Of pairs of real atoms, by their rows in tensor.flatten(0, 1)."""
    squares = (x_bn3.unsqueeze(2) - pocket_x.unsqueeze(1)).square().sum(-1)
    near = (squares < cutoff**2) & mask_bn.unsqueeze(2) & pocket_mask.unsqueeze(1)
    b, i, p = near.nonzero(as_tuple=True)
    return b * x_bn3.shape[1] + i, b * pocket_x.shape[1] + p
