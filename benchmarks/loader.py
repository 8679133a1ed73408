"""Pairs of frames per CPU-second: gdyn's Loader, and a PyG Dataset with the stock DataLoader on the same files.

The two do not deliver the same: PyG's batches hold edge lists and Gaussian features, which gdyn makes on the device.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.edge_list import FrameGraphPairs
from benchmarks.gdynet import endless, endless_graphs
from benchmarks.measure import Finding, finding, interleave, ratios
from benchmarks.workload import BATCH, LARGE, engine, write_trajectory
from gdyn.loader import Loader
from gdyn.ranks import ALONE

FLOOR = 100_000
FRAMES = 4096
BATCHES = {"gdyn": 2000, "PyG": 8}
"""Per round."""


def run(rounds: int) -> list[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        directory = write_trajectory(Path(folder) / "data", FRAMES, LARGE)
        vamp = engine(directory)
        gdyn = endless(Loader(vamp.datasets()["train"], BATCH, 1, ALONE))
        pyg = endless_graphs(FrameGraphPairs(directory, vamp.tau, vamp.cutoff, vamp.num_gaussians))
        arms = {"gdyn": lambda: read(gdyn, BATCHES["gdyn"]), "PyG": lambda: read(pyg, BATCHES["PyG"])}
        seconds = interleave(arms, rounds)
    speed = {name: [BATCHES[name] * BATCH / s for s in values] for name, values in seconds.items()}
    return [
        finding(f"{LARGE}: gdyn", speed["gdyn"], "pairs / CPU-s", floor=FLOOR),
        finding(f"{LARGE}: PyG", speed["PyG"], "pairs / CPU-s"),
        finding(f"{LARGE}: gdyn / PyG", ratios(speed["gdyn"], speed["PyG"]), "x"),
    ]


def read(batches: Iterator[object], count: int) -> None:
    for _ in itertools.islice(batches, count):
        pass
