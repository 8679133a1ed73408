"""The baseline: the network of gdyn.engines.vamp.lobes on edge lists, in plain PyTorch Geometric, the way the original
trainer (abhijeetdhakane/gdy_pl) does it: one graph object per frame with the Gaussian features made in the dataset,
message passing with a softmax over each atom's edges, graphs joined into batches by the stock loader.

Parameters carry gdyn's names, so `lobe.load_state_dict(gdyn_lobe.state_dict())` makes both networks the same function.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import softmax


class FrameGraphPairs(torch.utils.data.Dataset):
    """Item t: graphs of frames t and t + tau of a trajectory directory; gdyn.engines.vamp.frames names its files."""

    def __init__(self, directory: Path, tau: int, cutoff: float, gaussians: int):
        arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("nbr_lists", "nbr_dists")}
        self.lists, self.dists = arrays["nbr_lists"], arrays["nbr_dists"]
        self.atom_types = torch.from_numpy(np.load(directory / "atom_types.npy")).long()
        self.target_index = torch.from_numpy(np.load(directory / "target_index.npy")).long()
        directions = directory / "atom_directions.npy"
        self.directions = np.load(directions, mmap_mode="r") if directions.exists() else None
        self.tau = tau
        self.centres = torch.linspace(0.0, cutoff, gaussians)

    def __len__(self) -> int:
        return len(self.lists) - self.tau

    def __getitem__(self, t: int) -> tuple[Data, Data]:
        return self.graph(t), self.graph(t + self.tau)

    def graph(self, t: int) -> Data:
        """edge_index[0] is the centre of an edge. PyG offsets `target_index` in batches, as every name with `index`."""
        lists = torch.from_numpy(np.array(self.lists[t])).long()
        distances = torch.from_numpy(np.array(self.dists[t]))
        atoms, neighbours = lists.shape
        width = self.centres[1] - self.centres[0]
        return Data(
            x=self.atom_types,
            edge_index=torch.stack([torch.arange(atoms).repeat_interleave(neighbours), lists.flatten()]),
            edge_attr=torch.exp(-((distances.flatten()[:, None] - self.centres) ** 2) / (2 * width**2)),
            target_index=self.target_index,
            directions=None if self.directions is None else torch.from_numpy(np.array(self.directions[t])),
        )


class EdgeConvolution(MessagePassing):
    """z = [h_i, h_j, e_ij] of every edge in full; h_i <- ReLU(norm(mean_j alpha_ij ReLU(norm(W_c z + b_c))) + h_i)."""

    def __init__(self, features: int, gaussians: int, norm: type[nn.Module]):
        super().__init__(aggr="mean", flow="target_to_source")
        self.core = nn.Linear(2 * features + gaussians, features)
        self.score = nn.Linear(2 * features + gaussians, 1)
        self.norm_edges, self.norm_atoms = norm(features), norm(features)

    def forward(self, h: torch.Tensor, edge_index: torch.Tensor, edge_attr: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm_atoms(self.propagate(edge_index, x=h, edge_attr=edge_attr)) + h)

    def message(
        self, x_i: torch.Tensor, x_j: torch.Tensor, edge_attr: torch.Tensor, index: torch.Tensor, size_i: int | None
    ) -> torch.Tensor:
        z = torch.cat([x_i, x_j, edge_attr], dim=-1)
        return softmax(self.score(z), index, num_nodes=size_i) * F.relu(self.norm_edges(self.core(z)))


class EdgeListLobe(nn.Module):
    """The constructor's arguments are those of gdyn's Lobe."""

    def __init__(
        self, states: int, features: int, convolutions: int, cutoff: float, gaussians: int, norm: str, ferro: bool
    ):
        super().__init__()
        kind = nn.LayerNorm if norm == "atom" else nn.BatchNorm1d
        self.embedding = nn.Embedding(100, features)
        self.directions = nn.Linear(3, features) if ferro else None
        self.convolutions = nn.ModuleList(EdgeConvolution(features, gaussians, kind) for _ in range(convolutions))
        self.hidden = nn.Linear(features, features)
        self.readout = nn.Linear(features, states)

    def forward(self, graphs: Batch) -> torch.Tensor:
        """Returns (graphs x targets, states) probabilities, frame-major."""
        h = self.embedding(graphs.x)
        if self.directions is not None:
            h = h + self.directions(graphs.directions)
        for convolution in self.convolutions:
            h = convolution(h, graphs.edge_index, graphs.edge_attr)
        h = F.relu(self.hidden(F.relu(h[graphs.target_index])))
        return self.readout(h).softmax(-1)
