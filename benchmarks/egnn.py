"""E(n)-equivariant networks, forward and backward: gdyn's dense one against the same network on edge lists in plain
PyTorch, for batches of ligands and of pockets with sizes as mixed as real ones."""

from __future__ import annotations

import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.edge_list_egnn import EdgeListEGNN
from benchmarks.measure import Finding, finding, interleave, pin, ratios
from gdyn.nn.egnn import EGNN, group_by_size

FEATURES, HIDDEN, BLOCKS = 32, 128, 3
"""Of the autoencoders."""


@dataclass(frozen=True)
class Batch:
    label: str
    molecules: int
    smallest: int
    largest: int
    floor: float


BATCHES = (Batch("32 ligands", 32, 20, 35, 1.5), Batch("8 pockets", 8, 100, 150, 2.5))
ARMS = ("edge list", "gdyn", "gdyn, checkpointing")


def run(rounds: int) -> list[Finding]:
    findings = []
    for batch in BATCHES:
        arms, atoms = networks(), molecules(batch)
        check(arms, atoms)
        steps = {name: functools.partial(step, network, atoms) for name, network in arms.items()}
        seconds = interleave(steps, rounds)
        for name in ARMS[1:]:
            floor = batch.floor if name == "gdyn" else None
            times = ratios(seconds["edge list"], seconds[name])
            findings.append(finding(f"{batch.label}: {name}", times, "x", floor, detail=padding(atoms[2])))
        for name in ARMS:
            findings.append(finding(f"{batch.label}: {name}, memory", [peak_memory(batch, name)], "MB"))
    return findings


def networks() -> dict[str, nn.Module]:
    """One function of the same parameters, thrice."""
    torch.manual_seed(0)
    sizes = (FEATURES, HIDDEN, FEATURES, BLOCKS)
    arms = dict(zip(ARMS, (EdgeListEGNN(*sizes), EGNN(*sizes), EGNN(*sizes, checkpoint=True)), strict=True))
    for network in arms.values():
        network.load_state_dict(arms["gdyn"].state_dict())
    return arms


def molecules(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Features, coordinates with the density of proteins, Å, and mask."""
    random = torch.Generator().manual_seed(0)
    sizes = torch.randint(batch.smallest, batch.largest + 1, (batch.molecules,), generator=random)
    mask = torch.arange(int(sizes.max())) < sizes[:, None]
    h = torch.randn(*mask.shape, FEATURES, generator=random)
    x = 0.8 * batch.largest ** (1 / 3) * torch.randn(*mask.shape, 3, generator=random)
    return h * mask[..., None], x * mask[..., None], mask


def step(network: nn.Module, atoms: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Real atoms' outputs, after the gradients of a function of them."""
    mask = atoms[2]
    h, x = network(*atoms)
    if isinstance(network, EGNN):
        h, x = h[mask], x[mask]
    network.zero_grad()
    (h.square().mean() + x.square().mean()).backward()
    return h, x


def check(arms: dict[str, nn.Module], atoms: tuple[Tensor, Tensor, Tensor]) -> None:
    """Outputs and gradients of all are equal, within 1e-5 of their norms."""
    results = {}
    for name, network in arms.items():
        outputs = [output.detach() for output in step(network, atoms)]
        gradients = {key: p.grad.clone() for key, p in network.named_parameters() if p.grad is not None}
        results[name] = [*outputs, *(gradients[key] for key in sorted(gradients))]
    for name in ARMS[1:]:
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(results[name], results["edge list"], strict=True)]
        if max(errors) > 1e-5:
            raise AssertionError(f"{name} differs from the edge list by {max(errors):.1e}")


def padding(mask: Tensor) -> str:
    """Pairs computed, over real ones."""
    real = int(mask.sum(1).square().sum())
    _, groups = group_by_size(mask, "sum", torch.float32)
    computed = sum(len(group.weights_g1m) * group.atoms**2 for group in groups)
    ungrouped = mask.shape[0] * mask.shape[1] ** 2
    return f"{computed / real:.2f} pairs per real one, {ungrouped / real:.2f} if not grouped"


def peak_memory(batch: Batch, arm: str) -> float:
    """MB that a step adds to a fresh process, at most."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_memory, batch, arm).result()


def _peak_memory(batch: Batch, arm: str) -> float:
    pin()
    network, atoms = networks()[arm], molecules(batch)
    before = most_resident()
    step(network, atoms)
    return most_resident() - before


def most_resident() -> float:
    """MB, of this process since it began; getrusage would answer with its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3
