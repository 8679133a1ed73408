"""Whole training steps of a graph network: gdyn against the same network on edge lists in plain PyTorch Geometric.

A step is data (gdyn's Loader on npy files; PyG's Dataset and DataLoader on the same files), two independent lobes,
VAMP-2, backward and Adam. The loss is gdyn's in both arms, so that they differ in network and data path only; both
start from equal weights. Each size is measured twice: as PyTorch comes, and with denormal numbers flushed to zero in
both arms. The tails of the Gaussians make the baseline's matrix products denormal, which is slow on many CPUs; gdyn's
tails end before that.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader

from benchmarks.edge_list import EdgeListLobe, FrameGraphPairs
from benchmarks.measure import Finding, finding, interleave, ratios
from benchmarks.workload import ALL_TARGETS, BATCH, LARGE, SMALL, Size, engine, vamp2_loss, write_trajectory
from gdyn.loader import Loader
from gdyn.ranks import ALONE

FLOOR = 2.5
FRAMES = 1024
GDYN_STEPS = 4
"""Per round, in which the baseline, several times slower, makes one."""


def run(rounds: int) -> list[Finding]:
    findings = []
    for size in (SMALL, LARGE, ALL_TARGETS):
        with Arms(size) as arms:
            arms.check()
            for flush in (False, True):
                torch.set_flush_denormal(flush)
                seconds = interleave({"baseline": arms.train_baseline, "gdyn": arms.train_gdyn}, rounds)
                baseline, gdyn = seconds["baseline"], [s / GDYN_STEPS for s in seconds["gdyn"]]
                speeds = [BATCH / statistics.median(steps) for steps in (gdyn, baseline)]
                findings.append(
                    finding(
                        f"{size}, {'denormals flushed' if flush else 'stock'}",
                        ratios(baseline, gdyn),
                        "x",
                        # Every atom a target and no denormals is the worst case: shown, not claimed.
                        floor=None if flush and size is ALL_TARGETS else FLOOR,
                        detail="{:.0f} : {:.0f} pairs per CPU-second".format(*speeds),
                    )
                )
            torch.set_flush_denormal(False)
    return findings


class Arms(AbstractContextManager["Arms"]):
    """Both networks with optimizers and data, which lie in a temporary folder."""

    def __init__(self, size: Size):
        self.folder = tempfile.TemporaryDirectory()
        directory = write_trajectory(Path(self.folder.name) / "data", FRAMES, size)
        torch.manual_seed(0)
        vamp = engine(directory)
        self.lobes = vamp.model()
        self.edge_lobes = torch.nn.ModuleList(
            EdgeListLobe(
                vamp.state_len, vamp.atom_fea_len, vamp.n_conv, vamp.cutoff, vamp.num_gaussians, vamp.norm, vamp.ferro
            )
            for _ in range(2)
        )
        for lobe in self.edge_lobes:
            lobe.load_state_dict(self.lobes.lobe_0.state_dict())
        self.optimizer = torch.optim.Adam(self.lobes.parameters(), 1e-4)
        self.edge_optimizer = torch.optim.Adam(self.edge_lobes.parameters(), 1e-4)
        self.pairs = vamp.datasets()["train"]
        self.graphs = FrameGraphPairs(directory, vamp.tau, vamp.cutoff, vamp.num_gaussians)
        self.batches = endless(Loader(self.pairs, BATCH, 1, ALONE))
        self.graph_batches = endless_graphs(self.graphs)

    def __exit__(self, *error: object) -> None:
        self.folder.cleanup()

    def train_gdyn(self) -> None:
        for _ in range(GDYN_STEPS):
            first, second = self.lobes(next(self.batches))
            self.optimizer.zero_grad()
            vamp2_loss(first.flatten(0, 1), second.flatten(0, 1)).backward()
            self.optimizer.step()

    def train_baseline(self) -> None:
        first, second = (lobe(graphs) for lobe, graphs in zip(self.edge_lobes, next(self.graph_batches), strict=True))
        self.edge_optimizer.zero_grad()
        vamp2_loss(first, second).backward()
        self.edge_optimizer.step()

    def check(self) -> None:
        """Outputs of both are equal within 1e-5, and parameter gradients within 1e-4 of the largest."""
        batch = self.pairs[np.arange(BATCH)]
        graphs = zip(*(self.graphs[t] for t in range(BATCH)), strict=True)
        ends = [Batch.from_data_list(list(end)) for end in graphs]
        ours = torch.cat([p.flatten() for p in self.lobes(batch)])
        theirs = torch.cat([lobe(end).flatten() for lobe, end in zip(self.edge_lobes, ends, strict=True)])
        weights = torch.linspace(-1, 1, len(ours))
        gradients = [
            torch.autograd.grad(outputs @ weights, list(lobes.parameters()))
            for outputs, lobes in ((ours, self.lobes), (theirs, self.edge_lobes))
        ]
        difference = float((ours - theirs).detach().abs().max())
        largest = max(float(g.abs().max()) for g in gradients[1])
        worst = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True)) / largest
        if difference > 1e-5 or worst > 1e-4:
            raise AssertionError(f"the networks differ: outputs by {difference:.1e}, gradients by {worst:.1e}")


def endless(loader: Loader) -> Iterator[dict[str, torch.Tensor]]:
    """Epoch after epoch of gdyn's loader."""
    return (window[0] for epoch in itertools.count() for window in loader.windows(epoch))


def endless_graphs(graphs: FrameGraphPairs) -> Iterator[list[Batch]]:
    """Epoch after epoch of PyG's stock loader: graphs at t, graphs at t + tau."""
    loader = DataLoader(graphs, batch_size=BATCH, shuffle=True, drop_last=True)
    return itertools.chain.from_iterable(loader for _ in itertools.count())
