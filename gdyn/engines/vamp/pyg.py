"""Frames as torch-geometric graphs, under the names of the original GDyNet data sets, for scripts that use them.

Training does not go through here: dense tensors carry the same data at a fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset
from torch_geometric.data import Data

from gdyn.engines.vamp.frames import FramePairs, Trajectory
from gdyn.nn.gaussians import expand_distances


class PyGMDStackGen_vanilla(Dataset):
    """Pairs of frames (t, t + tau) of one trajectory as two graphs.

    Raises: MissingFile, UserError as `Trajectory` and `FramePairs` do.
    """

    ferro = False

    def __init__(self, fnames: Sequence[str], tau: int, cutoff: float = 6.0, num_gaussians: int = 50):
        self.trajectory = Trajectory(list(fnames), self.ferro)
        self.pairs = FramePairs([self.trajectory], tau)
        self.tau, self.cutoff, self.num_gaussians = tau, cutoff, num_gaussians

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Data, Data]:
        return self._graph(index), self._graph(index + self.tau)

    def _graph(self, frame: int) -> Data:
        """N nodes `x` (atomic numbers), N M edges from centre (row 0) to neighbour (row 1) with Gaussian `edge_attr`
        (N M, G); `target_index` is offset when graphs are batched; `indc` is the frame's number."""
        arrays = self.trajectory.frames(np.array([frame]))
        neighbours = arrays["nbr_lists"][0].long()
        n, m = neighbours.shape
        return Data(
            x=torch.from_numpy(self.trajectory.atom_types),
            edge_index=torch.stack([torch.arange(n).repeat_interleave(m), neighbours.flatten()]),
            edge_attr=expand_distances(arrays["nbr_dists"][0].flatten(), self.cutoff, self.num_gaussians),
            target_index=torch.from_numpy(self.trajectory.target_index),
            indc=torch.tensor([frame]),
            atom_directions=arrays["atom_directions"][0] if self.ferro else None,
        )


class PyGMDStackGen_ferro(PyGMDStackGen_vanilla):
    """With `atom_directions` (N, 3)."""

    ferro = True
