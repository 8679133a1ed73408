"""A finished (or running) run, opened for use: engine, network with its best weights, folder. One process, no
DeepSpeed."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
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
from gdyn.phases import Phase
from gdyn.ranks import ALONE
from gdyn.rundir import RunDir

SHOWN = 10
"""Of what does not fit, so many are named."""


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
    chosen = choose(store, config.plan.phases, checkpoint)
    damage = store.damage(chosen)
    if damage:
        raise UserError(f"checkpoint {chosen.path} is damaged: {damage}; choose another with --checkpoint.")
    model = config.engine.model()
    load_weights(model, chosen.weights(), str(chosen.path))
    return Run(run_dir, config, model.eval(), chosen.tag)


def choose(store: CheckpointStore, phases: Sequence[Phase], which: str) -> Checkpoint:
    """Raises: MissingFile if there is no such checkpoint."""
    if which in ("best", "latest"):
        best = store.best()
        objective = next((p.objective for p in reversed(phases) if p.objective in best), None)
        if which == "best" and objective is not None:
            return store.read(store.path / best[objective]["tag"])
        checkpoints = store.whole()
        if not checkpoints:
            raise MissingFile(f"{store.path} holds no whole checkpoint; train the run first (at least one epoch).")
        return checkpoints[0]
    return store.read(store.path / which)


def load_weights(
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    source: str,
    cure: str = "Restore the settings it was trained with.",
) -> None:
    """Raises: UserError naming what does not fit."""
    expected = model.state_dict()
    strangers = [f"{name} is unknown" for name in weights if name not in expected]
    _refuse([*_misfits(weights, expected), *strangers], source, cure)
    model.load_state_dict(weights)


def begin_from(init_from: str | Mapping[str, str], model: nn.Module) -> None:
    """Load what a run file's `init_from` says: all weights of one source, or parts of several.

    Raises: MissingFile, UserError naming the source and what does not fit.
    """
    if isinstance(init_from, str):
        cure = (
            'Take the parts that fit, as in init_from: {"encoder.*": runs/other}, or give the engine the same settings.'
        )
        load_weights(model, weights_of(Path(init_from)), f"init_from {init_from}", cure)
        return
    weights = model.state_dict()
    for glob, names in _shares(init_from, list(weights)).items():
        given = weights_of(Path(init_from[glob]))
        cure = "Narrow the glob, or give the engine the settings of that run."
        wanted = {name: weights[name] for name in names}
        _refuse(_misfits(given, wanted), f'init_from {{"{glob}": {init_from[glob]}}}', cure)
        weights |= {name: given[name] for name in names}
    model.load_state_dict(weights)


def _shares(globs: Iterable[str], names: Sequence[str]) -> dict[str, list[str]]:
    """Glob -> the names that no later glob matches too.

    Raises: UserError if a glob matches nothing.
    """
    last: dict[str, str] = {}
    for glob in globs:
        matched = [name for name in names if fnmatch.fnmatchcase(name, glob)]
        if not matched:
            raise UserError(
                f'init_from: "{glob}" matches no weight of the network; the first are {", ".join(names[:3])}.'
            )
        last |= dict.fromkeys(matched, glob)
    return {glob: [name for name, owner in last.items() if owner == glob] for glob in globs}


def _misfits(given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    missing = [f"{name} is missing" for name in expected if name not in given]
    return missing + [
        f"{name} has shape {tuple(given[name].shape)}, {tuple(tensor.shape)} expected"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]


def _refuse(wrong: Sequence[str], source: str, cure: str) -> None:
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise UserError(
            f"the weights of {source} do not fit the engine of the run file: {'; '.join(wrong[:SHOWN])}{more}. {cure}"
        )


def weights_of(source: Path) -> dict[str, torch.Tensor]:
    """The weights to start another run from: of a run folder (its best checkpoint, whatever engine it is of), or of a
    .safetensors file.

    Raises: MissingFile, UserError. Pickled checkpoints are not read.
    """
    if source.is_dir():
        return _best(RunDir(source).existing()).weights()
    if not source.is_file():
        raise MissingFile(f"init_from {source} does not exist; give a run folder or a .safetensors file.")
    try:
        return load_file(source)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"init_from {source} is not a .safetensors file, or damaged ({error}); export the other run's weights."
        ) from None


def _best(run_dir: RunDir) -> Checkpoint:
    """As `load_run` chooses, by what the checkpoints themselves say of the run's phases.

    Raises: MissingFile, UserError if it is damaged.
    """
    store = CheckpointStore(run_dir.checkpoints, ALONE)
    phases = [Phase.of(record) for newest in store.whole()[:1] for record in newest.record["phases"]]
    chosen = choose(store, phases, "best")
    damage = store.damage(chosen)
    if damage:
        raise UserError(
            f"init_from {run_dir.path}: its best checkpoint {chosen.tag} is damaged: {damage}; give the "
            "weights.safetensors of another checkpoint."
        )
    return chosen
