"""What gdyn's Trainer adds to a training step: a real run against a bare DeepSpeed loop.

Both have the same network, frames, order and DeepSpeed JSON. The Trainer logs, draws TensorBoard points, keeps meters,
computes singular values and looks for stop requests; the bare loop does nothing that training does not need. Counted
are the windows of an epoch, from reading frames to writing log lines; validation and checkpoints come after them.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed

from benchmarks.measure import Finding, Rounds, cpu_seconds, finding, ratios
from benchmarks.workload import BATCH, SMALL, engine, vamp2_loss, write_trajectory
from gdyn import ds_config, ranks, recipes
from gdyn.config import Optimization, RunConfig
from gdyn.loader import Batch
from gdyn.phases import Phase, Position
from gdyn.rundir import RunDir
from gdyn.signals import StopRequest
from gdyn.trainer import Trainer

CEILING = 1.05
STEPS = 20
"""Per epoch, and an epoch is a round."""


def run(rounds: int) -> list[Finding]:
    logging.getLogger("gdyn").addHandler(logging.NullHandler())  # the table is what counts here
    with tempfile.TemporaryDirectory() as folder, ranks.join() as here:
        trainer = RacingTrainer(Path(folder), rounds + 1, here)
        trainer.fit()
        trainer.journal.close()
    ours, bare = trainer.ours[1:], trainer.bare[1:]
    return [
        finding("Trainer", [1e3 * s / STEPS for s in ours], "CPU ms / step"),
        finding("bare DeepSpeed loop", [1e3 * s / STEPS for s in bare], "CPU ms / step"),
        finding(f"Trainer / bare loop, {SMALL}", ratios(ours, bare), "x", ceiling=CEILING),
    ]


class RacingTrainer(Trainer):
    """The Trainer as it is, but for a stopwatch around its windows, and the bare loop's turn between two of them."""

    def __init__(self, folder: Path, epochs: int, here: ranks.RankContext):
        recipe = recipes.find_recipe("fp32_zero0", None)
        config = RunConfig(
            engine=engine(
                write_trajectory(folder / "train", STEPS * BATCH + 10, SMALL),
                write_trajectory(folder / "validation", BATCH + 10, SMALL),
            ),
            deepspeed=str(recipe),
            run_dir=str(folder / "run"),
            phases=[Phase("vamp2", epochs)],
            optimization=Optimization(batch_size=BATCH, gradient_accumulation_steps=1, learning_rate=1e-4),
        )
        run_dir = RunDir(Path(config.run_dir))
        run_dir.create()
        super().__init__(config, here, run_dir, ds_config.read(recipe), StopRequest())
        self.ours: Rounds = []
        self.bare: Rounds = []
        self.bare_ds: Any = None

    def _bar(self, position: Position) -> Iterator[list[Batch]]:
        """The Trainer's windows, each followed by the bare loop's: the machine's load meets both alike."""
        windows, bare_windows = iter(super()._bar(position)), self.loader.windows(position.epoch)
        self.ours.append(0.0)
        self.bare.append(0.0)
        while True:
            began = time.process_time()
            batches = next(windows, None)
            if batches is None:
                return
            yield batches
            self.ours[-1] += time.process_time() - began
            self.bare[-1] += cpu_seconds(lambda: self._bare_step(bare_windows))

    def _bare_step(self, windows: Iterator[list[Batch]]) -> None:
        if self.bare_ds is None:
            model = self.engine.model()
            model.load_state_dict(self.ds.module.state_dict())
            self.bare_ds, *_ = deepspeed.initialize(
                model=model, model_parameters=model.parameters(), config=copy.deepcopy(self.ds_json)
            )
        first, second = self.bare_ds(next(windows)[0])
        self.bare_ds.backward(vamp2_loss(first.flatten(0, 1), second.flatten(0, 1)))
        self.bare_ds.step()
