"""Whole training steps of the structure autoencoder: gdyn against the same network on HeteroData objects in plain
PyTorch Geometric, in time and in memory; and how fast structures are prepared.

A step is reading structures from HDF5, batching, sampling pairs, the network, all losses, backward, AdamW and the
codebook's update. Both arms read the same structures in the same batches from the file that the benchmark prepares
from examples/proteins; both start from equal parameters. Every structure is read again from the file, or all of them
are kept in memory, in both arms alike. The baseline runs its decoders once per step; foldtree2 runs them three
times, which is measured too, and nothing is claimed of it.
"""

from __future__ import annotations

import re
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader

from benchmarks import hetero
from benchmarks.measure import Finding, Rounds, finding, interleave, pin, ratios
from gdyn.engines.monodecoder.decoders import divisor
from gdyn.engines.monodecoder.engine import DECODER_HEADS, Monodecoder
from gdyn.engines.monodecoder.pairs import sample_pairs
from gdyn.engines.monodecoder.prepare import Preparation, prepare
from gdyn.engines.monodecoder.structures import stable_key
from gdyn.loader import Loader
from gdyn.phases import Phase
from gdyn.ranks import ALONE

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = ROOT / "examples" / "proteins" / "test.tar.xz"
STRUCTURES = 16
"""Per batch."""
PHASE = Phase("loss", 1)


@dataclass(frozen=True)
class Size:
    name: str
    hidden: int
    heads: int
    embedding_dim: int
    feed_forward: int
    batches: int
    """Of a round."""
    speed: float
    """The floor: baseline's time over gdyn's."""
    memory: float
    """The floor: baseline's memory over gdyn's."""


EXAMPLE = Size("example", 64, 4, 32, 128, batches=2, speed=1.1, memory=1.25)
FOLDTREE2 = Size("foldtree2", 256, 16, 128, 2048, batches=1, speed=2.2, memory=2.5)
PREPARED = 12.0
"""Structures per CPU-second, the floor."""
PROCESSES = 2
"""Of each arm, whose memory is measured; they differ by a few per cent."""


def run(rounds: int) -> list[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "structures.h5"
        findings = [prepared(path, rounds)]
        for size in (EXAMPLE, FOLDTREE2):
            check(path, size)
            findings += speeds(path, size, in_memory=False, rounds=rounds)
            if size is EXAMPLE:  # beside foldtree2's network, reading is too little to show
                findings += speeds(path, size, in_memory=True, rounds=rounds)
            findings.append(memory(path, size))
    return findings


def prepared(path: Path, rounds: int) -> Finding:
    found: dict[str, int] = {}
    job = Preparation([ARCHIVE], path, overwrite=True)
    seconds = interleave({"prepare": lambda: found.update(prepare(job, ALONE))}, rounds)["prepare"]
    residues = found["residues"] / statistics.median(seconds)
    return finding(
        "gdyn prepare proteins",
        [found["structures"] / s for s in seconds],
        "structures / CPU-s",
        floor=PREPARED,
        detail=f"{residues:,.0f} residues per CPU-second",
    )


def speeds(path: Path, size: Size, in_memory: bool, rounds: int) -> list[Finding]:
    """Of the baseline over gdyn, its decoders run once, and three times."""
    gdyn, once, thrice = Gdyn(path, size, in_memory), Hetero(path, size, in_memory), Hetero(path, size, in_memory, 3)
    arms = {"gdyn": gdyn.train, "once": once.train, "thrice": thrice.train}
    seconds = interleave(arms, rounds)
    speed = {name: gdyn.residues / statistics.median(values) for name, values in seconds.items()}
    name = f"{size.name}, {'in memory' if in_memory else 'from the file'}"
    return [
        finding(
            name + (", decoders run 3 times" if arm == "thrice" else ""),
            ratios(seconds[arm], seconds["gdyn"]),
            "x",
            floor=size.speed if arm == "once" else None,
            detail=f"{speed['gdyn']:,.0f} : {speed[arm]:,.0f} residues per CPU-second",
        )
        for arm in ("once", "thrice")
    ]


def memory(path: Path, size: Size) -> Finding:
    """Of the baseline, its decoders run once, over gdyn."""
    mib: dict[str, Rounds] = {arm.__name__: [] for arm in (Gdyn, Hetero)}
    for _ in range(PROCESSES):
        for name, peaks in mib.items():
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                peaks.append(fresh.submit(peak, name, path, size).result())
    gdyn, baseline = mib["Gdyn"], mib["Hetero"]
    return finding(
        f"{size.name}, peak memory",
        ratios(baseline, gdyn),
        "x",
        floor=size.memory,
        detail="{:,.0f} : {:,.0f} MiB".format(*map(statistics.median, (gdyn, baseline))),
    )


def peak(arm: str, path: Path, size: Size) -> float:
    """MiB that this process came to hold in two rounds of training, above what it holds now. Not ru_maxrss, which a
    process inherits from the one that started it."""
    pin()
    before = resident("VmRSS")
    trainee = {"Gdyn": Gdyn, "Hetero": Hetero}[arm](path, size, in_memory=False)
    trainee.train()
    trainee.train()
    return resident("VmHWM") - before


def resident(kind: str) -> float:
    """MiB."""
    found = re.search(rf"{kind}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


# -- the arms ---------------------------------------------------------------------------------------------------------


class Gdyn:
    """The engine, a fresh network, and AdamW."""

    def __init__(self, path: Path, size: Size, in_memory: bool):
        torch.manual_seed(0)
        self.engine = Monodecoder(
            train=[str(path)],
            hidden=[size.hidden] * 3,
            heads=size.heads,
            embedding_dim=size.embedding_dim,
            feed_forward=size.feed_forward,
            cache_mb=1024 if in_memory else 0,
        )
        self.structures = self.engine.structures(self.engine.train)
        self.network = self.engine.model()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), 1e-4)
        # The same few batches again and again, as many as there are in a round.
        self.loader = Loader(self.structures, STRUCTURES, 1, ALONE, overfit_windows=size.batches)

    @property
    def residues(self) -> int:
        """Of a round."""
        return sum(len(batch["features"]) for (batch,) in self.loader.windows(0))

    def order(self) -> list[list[int]]:
        """Which structures are in each batch of a round."""
        numbers = {stable_key(name): i for i, name in enumerate(self.structures.identifiers)}
        return [[numbers[int(key)] for key in batch["keys"]] for (batch,) in self.loader.windows(0)]

    def train(self) -> None:
        for batches in self.loader.windows(0):
            window = self.engine.begin_window(self.network, batches, PHASE, ALONE)
            steps = [self.engine.loss(self.network, batch, PHASE, window) for batch in batches]
            self.optimizer.zero_grad()
            steps[0].loss.backward()
            self.optimizer.step()
            self.engine.end_window(self.network, steps, PHASE, window, ALONE)


class Hetero:
    """The baseline with the same parameters and batches, and AdamW."""

    def __init__(self, path: Path, size: Size, in_memory: bool, runs: int = 1):
        gdyn = Gdyn(path, size, in_memory=False)
        engine = gdyn.engine
        assert engine.features is not None
        self.network = hetero.HeteroAutoencoder(
            engine.features,
            engine.hidden,
            engine.heads,
            engine.embedding_dim,
            engine.codes,
            divisor(size.hidden, DECODER_HEADS),
            engine.feed_forward,
            engine.dropout,
            runs,
        )
        hetero.load(self.network, gdyn.network.state_dict())
        self.weights = engine.weights.at(0) | {"vq": engine.weights.at(0)["vq"] * float(engine.commitment)}
        self.optimizer = torch.optim.AdamW(self.network.parameters(), 1e-4)
        self.loader = DataLoader(hetero.StructureGraphs(path, in_memory), batch_sampler=gdyn.order())

    def loss(self, graphs: Batch, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        terms = hetero.losses(self.network(graphs, positive, negative), graphs, positive, negative)
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def train(self) -> None:
        for graphs in self.loader:
            loss = self.loss(graphs, *hetero.sample(graphs))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


# -- both are the same function ---------------------------------------------------------------------------------------


def check(path: Path, size: Size) -> None:
    """Without dropout and with the same pairs, each loss of both is equal within 1e-4, all outputs within 1e-3, and
    parameter gradients within 1e-4 of the largest; so are the codebooks after an update."""
    gdyn, baseline = Gdyn(path, size, in_memory=False), Hetero(path, size, in_memory=False)
    gdyn.network.eval()
    baseline.network.eval()
    (batch,) = next(gdyn.loader.windows(0))
    graphs = next(iter(baseline.loader))
    pairs = sample_pairs(batch, 0)
    apart = pairs.index[:, pairs.contact], pairs.index[:, ~pairs.contact]
    positive, _ = hetero.sample(graphs)
    assert set(zip(*positive.tolist(), strict=True)) == set(zip(*apart[0].tolist(), strict=True))

    window = gdyn.engine.begin_window(gdyn.network, [batch], PHASE, ALONE)
    step = gdyn.engine.loss(gdyn.network, batch, PHASE, window)
    terms = hetero.losses(baseline.network(graphs, *apart), graphs, *apart)
    for name, term in terms.items():
        expected = step.metrics[name] / (window.commitment if name == "vq" else 1)
        differs(f"loss {name}", term, expected, 1e-4)
    ours, theirs = gdyn.network(batch, pairs.index), baseline.network(graphs, *apart)
    for name, of in {"aa_logits": "aa", "ss_logits": "ss", "angles": "angles", "spectrum_2d": "fft2"}.items():
        differs(name, theirs[of], ours[name], 1e-3)
    for name in ("contact", "distance"):
        both = torch.cat([theirs[f"{name}_positive"], theirs[f"{name}_negative"]])
        differs(f"{name}_logits", both, ours[f"{name}_logits"], 1e-3)

    step.loss.backward()
    baseline.loss(graphs, *apart).backward()
    slopes = {name: parameter.grad for name, parameter in baseline.network.named_parameters()}
    largest = max(float(slope.abs().max()) for slope in slopes.values())
    for name, slope in hetero.translated({n: p.grad for n, p in gdyn.network.named_parameters()}).items():
        differs(f"gradient of {name}", slopes[name], slope, 1e-4 * largest)

    baseline.network.codebook.train()
    baseline.network(graphs, *apart)
    gdyn.engine.end_window(gdyn.network, [step], PHASE, window, ALONE)
    differs("codebook", baseline.network.codebook.sums, gdyn.network.quantizer.sums, 1e-4)


def differs(what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Raises: AssertionError if it does by more than the tolerance."""
    worst = float((found.detach() - expected.detach()).abs().max())
    if not worst <= tolerance:
        raise AssertionError(f"{what}: the arms differ by {worst:.1e}, more than {tolerance:.1e}.")
