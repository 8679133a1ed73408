"""The graphs that scripts written for the original data sets expect."""

import torch
from torch_geometric.loader import DataLoader

from gdyn.engines.vamp.pyg import PyGMDStackGen_vanilla
from tests.data import write_trajectory


def test_the_seeds_snippet_gives_two_graphs(tmp_path):
    folder = write_trajectory(tmp_path / "train", frames=40, atoms=6)
    dataset = PyGMDStackGen_vanilla(fnames=[str(folder)], tau=10, cutoff=6.0, num_gaussians=50)
    now, later = dataset[3]
    assert len(dataset) == 30
    assert (int(now.indc), int(later.indc)) == (3, 13)
    assert now.edge_index.shape[1] == now.edge_attr.shape[0]
    assert now.edge_attr.shape[1] == 50


def test_targets_are_offset_when_graphs_are_batched(tmp_path):
    folder = write_trajectory(tmp_path / "train", frames=40, atoms=6)
    dataset = PyGMDStackGen_vanilla([str(folder)], tau=10)
    targets = dataset[0][0].target_index
    now, _ = next(iter(DataLoader(dataset, batch_size=2)))
    assert torch.equal(now.target_index, torch.cat([targets, targets + 6]))
