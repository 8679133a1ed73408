"""A finished (or running) run, opened for use: engine, network with its best weights, folder. One process, no
DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from gdyn import config as run_config
from gdyn.checkpoints import Checkpoint, CheckpointStore
from gdyn.config import RunConfig
from gdyn.engine import Engine
from gdyn.errors import MissingFile, UserError
from gdyn.ranks import ALONE
from gdyn.rundir import RunDir


@dataclass(frozen=True)
class Run:
    """What reports, evaluation and export work with."""

    dir: RunDir
    config: RunConfig
    model: nn.Module
    """On the CPU, in eval mode."""
    tag: str

    @property
    def engine(self) -> Engine:
        return self.config.engine


def load_run(path: str | Path, checkpoint: str = "best") -> Run:
    """Open a run folder. `checkpoint`: best (of the last phase's objective), latest, or a tag.

    Raises: MissingFile if there is no run or no such checkpoint; UserError if it is damaged or does not fit the run
    file.
    """
    run_dir = RunDir(Path(path)).existing()
    config = run_config.load(run_dir.run_yaml)
    store = CheckpointStore(run_dir.checkpoints, ALONE)
    chosen = choose(store, config, checkpoint)
    damage = store.damage(chosen)
    if damage:
        raise UserError(f"checkpoint {chosen.path} is damaged: {damage}; choose another with --checkpoint.")
    model = config.engine.model()
    load_weights(model, chosen.weights(), str(chosen.path))
    return Run(run_dir, config, model.eval(), chosen.tag)


def choose(store: CheckpointStore, config: RunConfig, which: str) -> Checkpoint:
    """Raises: MissingFile if there is no such checkpoint."""
    if which in ("best", "latest"):
        best = store.best()
        objective = next((p.objective for p in reversed(config.plan.phases) if p.objective in best), None)
        if which == "best" and objective is not None:
            return store.read(store.path / best[objective]["tag"])
        checkpoints = store.whole()
        if not checkpoints:
            raise MissingFile(f"{store.path} holds no whole checkpoint; train the run first (at least one epoch).")
        return checkpoints[0]
    return store.read(store.path / which)


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Raises: UserError naming what does not fit."""
    expected = model.state_dict()
    wrong = [f"{name} is missing" for name in expected if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in expected]
    wrong += [
        f"{name} has shape {tuple(weights[name].shape)}, {tuple(expected[name].shape)} expected"
        for name in expected
        if name in weights and weights[name].shape != expected[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"the weights in {source} do not fit the engine of the run file: {'; '.join(wrong[:3])}{more}.")
    model.load_state_dict(weights)


def weights_of(source: Path) -> dict[str, torch.Tensor]:
    """The weights to start another run from: of a run folder (its best checkpoint), or of a .safetensors file.

    Raises: MissingFile, UserError. Pickled checkpoints are not read.
    """
    if source.is_dir():
        return load_run(source).model.state_dict()
    if not source.is_file():
        raise MissingFile(f"init_from {source} does not exist; give a run folder or a .safetensors file.")
    try:
        return load_file(source)
    except SafetensorError as error:
        raise UserError(
            f"init_from {source} is not a .safetensors file ({error}); export the other run's weights."
        ) from None
