"""What it takes to say that two splits of a global batch train alike: gradients and scores of the steps of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad

from gdyn.config import RunConfig
from gdyn.ranks import RankContext
from gdyn.trainer import Trainer
from tests import runs

TOLERANCE = 1e-5


class Watched(Trainer):
    """Keeps the whole gradient of every optimizer step, as the optimizer gets it before clipping."""

    def _initialize(self, *args: Any) -> None:
        super()._initialize(*args)
        self.gradients: list[torch.Tensor] = []
        step = self.ds.step

        def watched_step() -> None:
            if self.ds.is_gradient_accumulation_boundary():
                self.gradients.append(self._gradient())
            step()

        self.ds.step = watched_step

    def _gradient(self) -> torch.Tensor:
        sharded = self.ds.zero_optimization_stage() > 0
        trained = [p for p in self.ds.module.parameters() if p.requires_grad]
        parts = [safe_get_full_grad(p) if sharded else p.grad for p in trained]
        return torch.cat([part.detach().double().flatten() for part in parts])


def gradients(here: RankContext, config: RunConfig) -> torch.Tensor:
    """Of every step, (steps, parameters). Every rank must call this."""
    return torch.stack(runs.train(here, config, kind=Watched).gradients)


@dataclass
class Result:
    gradients: torch.Tensor
    """(steps, parameters)."""
    scores: torch.Tensor
    """(steps, scores)."""


def watch(
    run_ranks: Callable[..., list[torch.Tensor]],
    ranks: int,
    config: RunConfig,
    scores: Sequence[str],
    function: Callable[..., torch.Tensor] = gradients,
) -> Result:
    """Run it on so many ranks. `scores`: of the train lines of its metrics."""
    vectors = run_ranks(ranks, function, config)[0]
    train = [record for record in runs.metrics(config) if record["split"] == "train"]
    return Result(vectors, torch.tensor([[line[name] for name in scores] for line in train], dtype=torch.float64))


def differences(found: Result, reference: Result) -> tuple[float, float]:
    """Largest relative differences: of the scores of all steps, and of the first gradient, to its global norm."""
    assert found.gradients.shape == reference.gradients.shape
    norms = reference.gradients.norm(dim=1)
    assert bool((norms > 1e-2).all())
    scores = (found.scores - reference.scores).abs() / reference.scores.abs()
    slopes = (found.gradients - reference.gradients).norm(dim=1) / norms
    return float(scores.max()), float(slopes[0])  # later gradients are those of weights that Adam's steps made differ


def assert_exact(found: Result, reference: Result) -> None:
    scores, slopes = differences(found, reference)
    assert scores <= TOLERANCE and slopes <= TOLERANCE
