"""Small real runs for tests: a run file as an object, and what one rank does with it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gdyn import ds_config
from gdyn.checkpoints import CheckpointStore
from gdyn.config import Checkpointing, Logging, Optimization, RunConfig
from gdyn.engine import Engine
from gdyn.engines.diffusion.engine import Diffusion
from gdyn.engines.monodecoder.engine import Monodecoder
from gdyn.engines.vamp.engine import Vamp
from gdyn.phases import Phase
from gdyn.ranks import ALONE, RankContext
from gdyn.recipes import bundled
from gdyn.rundir import RunDir, read_metrics
from gdyn.trainer import Trainer
from tests.complexes import write_complexes
from tests.data import write_trajectory
from tests.proteins import write_proteins

CLOCK = "samples_per_second"


def _vamp(folder: Path, **sizes: Any) -> Vamp:
    train, validation = folder / "train", folder / "validation"
    if not train.exists():
        ferro = sizes.get("model_type") == "ferro"
        write_trajectory(train, frames=200, targets=2, ferro=ferro)
        write_trajectory(validation, frames=99, targets=2, ferro=ferro, seed=1)
    small = {"tau": 2, "state_len": 3, "atom_fea_len": 8, "n_conv": 2, "num_gaussians": 8, "cutoff": 5.0}
    return Vamp(train=[str(train)], validation=[str(validation)], test=[str(validation)], **small | sizes)


def _monodecoder(folder: Path, **sizes: Any) -> Monodecoder:
    train, validation = folder / "train.h5", folder / "validation.h5"
    if not train.exists():
        write_proteins(train, structures=24, residues=(8, 25))
        write_proteins(validation, structures=8, residues=(8, 25), seed=1)
    small = {"codes": 6, "embedding_dim": 8, "hidden": [16, 16, 16], "heads": 2, "feed_forward": 16, "dropout": 0.0}
    return Monodecoder(train=[str(train)], validation=[str(validation)], test=[str(validation)], **small | sizes)


def _diffusion(folder: Path, **sizes: Any) -> Diffusion:
    train, validation = folder / "train.h5", folder / "validation.h5"
    if not train.exists():
        write_complexes(train, complexes=24, ligand=(6, 12), pocket=(12, 24))
        write_complexes(validation, complexes=8, ligand=(6, 12), pocket=(12, 24), seed=1)
    small = {"latent": 4, "hidden": 8, "blocks": 1, "denoiser_hidden": 8, "denoiser_blocks": 1, "cross_attentions": 1}
    small |= {"validation_draws": 2, "ema_decay": 0.9}
    return Diffusion(train=[str(train)], validation=[str(validation)], test=[str(validation)], **small | sizes)


class Small(NamedTuple):
    """What a small run of an engine is made of."""

    make: Callable[..., Engine]
    """(folder of the data, which are made where they are not there yet; fields of the engine)."""
    samples: int
    """Of an optimizer step."""
    phases: list[Phase]


SMALL: dict[type[Engine], Small] = {
    Vamp: Small(_vamp, 48, [Phase("vamp2", 2), Phase("vamp_sym", 2)]),
    Monodecoder: Small(_monodecoder, 8, [Phase("loss", 3)]),
    Diffusion: Small(_diffusion, 8, [Phase("ligand_vae", 1), Phase("protein_vae", 1), Phase("denoiser", 2)]),
}


def small_run(
    folder: Path,
    name: str,
    *,
    engine: type[Engine] = Vamp,
    stage: int = 0,
    split: tuple[int, int] = (1, 1),
    **changes: Any,
) -> RunConfig:
    """A run that is ready in a second: of Vamp, 2 x 2 epochs of 4 steps on 48 pairs each; of Monodecoder, 3 epochs of 3
    steps on 8 structures each; of Diffusion, 4 epochs in three phases of 3 steps on 8 complexes each. `split`: (ranks,
    micro-batches) of a step.

    Data are made in `folder` where they are not there yet; the run goes to `folder / name`. `changes`: fields of
    RunConfig or of the engine, by name.
    """
    make, samples, phases = SMALL[engine]
    in_engine = {field.name for field in dataclasses.fields(engine)}
    sizes = {name: changes.pop(name) for name in list(changes) if name in in_engine}
    ranks, micro_batches = split
    given = {
        "phases": phases,
        "optimization": Optimization(samples // ranks // micro_batches, micro_batches, learning_rate=0.005),
        "deepspeed": str(bundled()[f"fp32_zero{stage}"]),
        "checkpointing": Checkpointing(keep=20),
        "logging": Logging(every_steps=1, progress="off"),
    }
    return RunConfig(engine=make(folder, **sizes), run_dir=str(folder / name), **given | changes)


def as_new(config: RunConfig, folder: Path, **changes: Any) -> RunConfig:
    """The same run file for a run of its own."""
    return dataclasses.replace(config, run_dir=str(folder / "run"), **changes)


class StopAfter:
    """A stop request that comes due once this start has done so many windows: before the next piece of work, or, with
    `between_epochs`, before the next epoch."""

    reason = "the test asked for it"

    def __init__(self, windows: int | None, between_epochs: bool = False):
        self.windows, self.between_epochs = windows, between_epochs
        self.trainer: Trainer | None = None
        self.first: int | None = None

    def due(self, now: float, seconds_needed: float) -> bool:
        assert self.trainer is not None
        position = self.trainer.position
        self.first = position.step if self.first is None else self.first
        due = self.windows is not None and position.step - self.first >= self.windows
        return due and not (self.between_epochs and position.sample)


def train(
    here: RankContext,
    config: RunConfig,
    stop_after: int | None = None,
    kind: Callable[..., Trainer] = Trainer,
    between_epochs: bool = False,
) -> Trainer:
    """What launch/train.py does, without its logging and signals. Every rank must call this. Returns the trainer."""
    run_dir = RunDir(Path(config.run_dir))
    if here.main:
        run_dir.create()
        run_dir.run_yaml.write_text(config.to_yaml())
    here.barrier()
    stop = StopAfter(stop_after, between_epochs)
    trainer = stop.trainer = kind(config, here, run_dir, ds_config.read(config.deepspeed), stop)
    position = trainer.fit()
    if trainer.plan.done(position):
        trainer.finish(position)
    else:
        trainer.journal.close()
    return trainer


def run(here: RankContext, config: RunConfig, stop_after: int | None = None, between_epochs: bool = False) -> None:
    """`train` for `run_ranks`, whose results must be picklable."""
    train(here, config, stop_after, between_epochs=between_epochs)


def store(config: RunConfig) -> CheckpointStore:
    return CheckpointStore(RunDir(Path(config.run_dir)).checkpoints, ALONE)


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint."""
    return store(config).whole()[0].weights()


def step(config: RunConfig) -> int:
    """Optimizer steps of the newest checkpoint."""
    return store(config).whole()[0].position.step


def metrics(config: RunConfig) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    records = read_metrics(RunDir(Path(config.run_dir)).metrics_jsonl)
    return [{name: value for name, value in record.items() if name != CLOCK} for record in records]


def summary(config: RunConfig) -> dict[str, Any]:
    """summary.json without what a clock measured."""
    content = json.loads(RunDir(Path(config.run_dir)).summary_json.read_text())
    return {name: value for name, value in content.items() if name != CLOCK}


def assert_same(found: RunConfig, expected: RunConfig) -> None:
    """Bit for bit: weights, every line of metrics.jsonl, summary.json."""
    one, other = weights(found), weights(expected)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert metrics(found) == metrics(expected)
    assert summary(found) == summary(expected)
