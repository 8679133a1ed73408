"""Whole training steps of the diffusion engine: gdyn against the same networks on edge lists in plain PyTorch, in time
and in memory; what frozen parts cost; and how much of a batch is padding.

A step is reading complexes from HDF5, batching, the network, all losses, backward, AdamW and the moving average,
without DeepSpeed. Both arms read the same complexes of examples/ligands_in_pockets, draw the same noise and start from
equal parameters.
"""

from __future__ import annotations

import copy
import functools
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.edge_list_diffusion import on_edge_lists
from benchmarks.egnn import most_resident
from benchmarks.measure import Finding, finding, interleave, pin, ratios
from gdyn import ds_engine
from gdyn.engine import Step
from gdyn.engines.diffusion.complexes import Complexes
from gdyn.engines.diffusion.engine import Diffusion
from gdyn.engines.diffusion.network import LatentDiffusion
from gdyn.engines.diffusion.prepare import Preparation, prepare
from gdyn.loader import Batch, Loader
from gdyn.phases import Phase
from gdyn.ranks import ALONE
from gdyn.splits import Part

ARCHIVE = Path(__file__).resolve().parents[1] / "examples" / "ligands_in_pockets" / "train.tar.xz"
PADDED = 50
"""Atoms that the original pads ligands to."""


@dataclass(frozen=True)
class Work:
    """Steps of one objective; complexes are neighbours in the order of size, as in the engine's batches."""

    objective: str
    complexes: int
    quantile: float
    """Where in the order of size the batch begins."""
    floor: float
    """Baseline's time over gdyn's."""
    arms: tuple[str, ...] = ("gdyn", "edge list")

    @property
    def phase(self) -> Phase:
        return Phase(self.objective, 1)


WORKS = (
    Work("ligand_vae", 16, 0.4, floor=1.5, arms=("gdyn", "edge list", "padded edges")),
    # Of a pocket of average size, edge lists take 10 GB.
    Work("protein_vae", 1, 0.0, floor=2.5),
    Work("denoiser", 2, 0.4, floor=3.0, arms=("gdyn", "edge list", "edge list, latents kept")),
)
FROZEN = Work("denoiser", 1, 0.0, floor=0.0), Work("joint", 1, 0.0, floor=0.0)
BATCHES = {8: 15.0, 16: 15.0, 32: None}
"""Complexes of a batch, and the most that padding may be of its rows, %. Of 32, the example has five batches."""
EPOCHS = 5


def run(rounds: int) -> list[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        path = prepared(Path(folder))
        findings = [line for work in WORKS for line in (*speeds(path, work, rounds), *memory(path, work))]
        return [*findings, *frozen(path, rounds), *paddings(path)]


def prepared(folder: Path) -> Path:
    path = folder / "complexes.h5"
    prepare(Preparation([ARCHIVE], path))
    return path


# -- steps ------------------------------------------------------------------------------------------------------------


class Arm:
    """The engine, a network, AdamW of what the objective trains, and one batch, which every step reads anew."""

    def __init__(self, path: Path, work: Work, name: str = "gdyn"):
        torch.manual_seed(0)
        self.phase = work.phase
        self.engine = Diffusion(train=[str(path)])
        self.network: LatentDiffusion = self.engine.model()
        if name != "gdyn":
            self.network = on_edge_lists(self.network, PADDED if name == "padded edges" else None)
        if name == "edge list":
            self.network.frozen_latents.limit = 0  # frozen autoencoders encode in every step, as usual
        trains = Phase(work.objective, 1, trains=self.engine.trains(work.objective))
        names = set(ds_engine.trainable(self.network, trains))
        for key, parameter in self.network.named_parameters():
            parameter.requires_grad_(key in names)
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-4)
        complexes = Complexes(path)
        begin = int(work.quantile * len(complexes))
        chosen = np.argsort(complexes.sizes, kind="stable")[begin : begin + work.complexes]
        self.loader = Loader(Part(complexes, chosen), work.complexes, 1, ALONE)

    def loss(self) -> Step:
        ((batch,),) = self.loader.windows(0)
        self.window = self.engine.begin_window(self.network, [batch], self.phase, ALONE)
        return self.engine.loss(self.network, batch, self.phase, self.window)

    def train(self) -> None:
        step = self.loss()
        self.optimizer.zero_grad()
        step.loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.engine.end_window(self.network, [step], self.phase, self.window, ALONE)

    def optimizer_bytes(self) -> int:
        tensors = (t for state in self.optimizer.state.values() for t in state.values())
        return sum(t.numel() * t.element_size() for t in tensors)


def speeds(path: Path, work: Work, rounds: int) -> list[Finding]:
    arms = {name: Arm(path, work, name) for name in work.arms}
    check(arms)
    seconds = interleave({name: arm.train for name, arm in arms.items()}, rounds)
    speed = {name: work.complexes / statistics.median(values) for name, values in seconds.items()}
    return [
        finding(
            f"{work.objective}: {name} / gdyn",
            ratios(seconds[name], seconds["gdyn"]),
            "x",
            floor=work.floor if name == "edge list" else None,
            detail=f"{speed['gdyn']:.3g} : {speed[name]:.3g} complexes per CPU-second",
        )
        for name in work.arms[1:]
    ]


def check(arms: dict[str, Arm]) -> None:
    """Losses, scores and gradients of all arms are equal, within 1e-4 of their norms. Coordinate steps are made large,
    or hardly anything would depend on the coordinates."""
    found = {}
    for name, arm in arms.items():
        saved = copy.deepcopy(arm.network.state_dict())
        for key, parameter in arm.network.named_parameters():
            if key.endswith("steps.last.weight"):
                parameter.data.mul_(30.0)
        step = arm.loss()
        arm.network.zero_grad()
        step.loss.backward()
        gradients = {key: p.grad for key, p in arm.network.named_parameters() if p.grad is not None}
        found[name] = {"loss": step.loss.detach(), **step.metrics} | gradients
        arm.network.zero_grad()
        arm.network.load_state_dict(saved)
    for name, values in found.items():
        if values.keys() != found["gdyn"].keys():
            raise AssertionError(f"{name} has other gradients than gdyn")
        for key, expected in found["gdyn"].items():
            error = float((values[key] - expected).norm() / expected.norm().clamp_min(1e-12))
            if not error <= 1e-4:
                raise AssertionError(f"{name}: {key} differs from gdyn's by {error:.1e}")


def memory(path: Path, work: Work) -> list[Finding]:
    return [
        finding(f"{work.objective}: memory of {name}", [in_fresh_process(_peak, path, work, name)], "MB")
        for name in work.arms
    ]


def in_fresh_process(function: Callable[..., float], *args: object) -> float:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def _peak(path: Path, work: Work, name: str) -> float:
    """MB that a step adds to this process, at most."""
    pin()
    arm = Arm(path, work, name)
    before = most_resident()
    arm.train()
    return most_resident() - before


# -- frozen parts -----------------------------------------------------------------------------------------------------


def frozen(path: Path, rounds: int) -> list[Finding]:
    """The denoiser with both autoencoders frozen, against training all of them."""
    arms = {work.objective: Arm(path, work) for work in FROZEN}
    seconds = interleave({name: arm.train for name, arm in arms.items()}, rounds)
    mb = {name: [arm.optimizer_bytes() / 1e6] for name, arm in arms.items()}
    times = ratios(seconds["joint"], seconds["denoiser"])
    encode = functools.partial(encoded, arms["denoiser"])
    encoding = statistics.median(interleave({"encode": encode}, rounds)["encode"])
    detail = f"encoding once takes {encoding / statistics.median(seconds['denoiser']):.1f} x a step of denoiser"
    return [
        finding("a step of joint / one of denoiser", times, "x", detail=detail),
        *(finding(f"{work.objective}: optimizer state", mb[work.objective], "MB") for work in FROZEN),
        *(
            finding(f"{work.objective}: memory of a step", [in_fresh_process(_peak, path, work, "gdyn")], "MB")
            for work in FROZEN
        ),
    ]


@torch.no_grad()
def encoded(arm: Arm) -> None:
    """Latents of both frozen encoders."""
    assert isinstance(arm.network, LatentDiffusion)
    ((batch,),) = arm.loader.windows(0)
    arm.network.encode_ligand(batch)
    arm.network.encode_pocket(batch)


# -- padding ----------------------------------------------------------------------------------------------------------


def paddings(path: Path) -> list[Finding]:
    """Of batches at random and of like size."""
    findings = []
    for size, ceiling in BATCHES.items():
        for like in (False, True):
            loader = Loader(Complexes(path), size, 1, ALONE, like_sizes=like)
            batches = (batch for epoch in range(EPOCHS) for (batch,) in loader.windows(epoch))
            shares = padding(batches)
            pairs = f"pairs n*m {shares['n*m']:.1f} %, m*m {shares['m*m']:.1f} %, n*n {shares['n*n']:.1f} %"
            for part in ("ligand", "pocket"):
                name = f"padding, {part}s, {size} {'of like size' if like else 'at random'}"
                detail = pairs if part == "pocket" else ""
                findings.append(finding(name, [shares[part]], "%", ceiling=ceiling if like else None, detail=detail))
    return findings


def padding(batches: Iterable[Batch]) -> dict[str, float]:
    """% of the rows of ligands and pockets, and of pairs of ligand (n) and pocket (m) atoms, that are padding."""
    real, padded = np.zeros(5), np.zeros(5)
    for batch in batches:
        n, m = (batch[f"{part}_mask"].sum(1).numpy() for part in ("ligand", "pocket"))
        real += [products.sum() for products in _products(n, m)]
        padded += [len(n) * products for products in _products(n.max(), m.max())]
    return dict(zip(("ligand", "pocket", "n*m", "m*m", "n*n"), 100 * (1 - real / padded), strict=True))


def _products(n: np.ndarray, m: np.ndarray) -> tuple[np.ndarray, ...]:
    return n, m, n * m, m * m, n * n
