"""The same global batch of complexes gives one loss, one gradient and one average of the weights for any split into
ranks x micro-batches, at ZeRO stages 0 to 2, through the whole trainer."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gdyn.config import Optimization, RunConfig
from gdyn.engines.diffusion.engine import Diffusion
from gdyn.phases import Phase
from gdyn.ranks import ALONE, RankContext
from tests import runs
from tests.exactness import TOLERANCE, Result, assert_exact, differences, gradients, watch

STEPS = 3
SPLITS = [(1, 1), (1, 4), (2, 2), (4, 1)]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ligand_vae": ("ligand_vae", {}),
    "protein_vae": ("protein_vae", {}),
    "denoiser": ("denoiser", {}),
    "joint": ("joint", {"normalization": "mean", "attention": True}),
    "vlb": ("denoiser", {"diffusion_loss": "vlb", "schedule": "cosine"}),
}
SCORES = {
    "ligand_vae": ("loss", "ligand_positions", "ligand_element", "ligand_kl", "ligand_rmsd"),
    "protein_vae": ("loss", "protein_residue", "protein_backbone"),
    "denoiser": ("loss", "predict_zero"),
    "joint": ("loss", "ligand_vae", "protein_vae", "denoiser"),
}


@dataclass
class Trained(Result):
    buffers: dict[str, torch.Tensor]
    """Of the network after the last step."""


@pytest.fixture(scope="module")
def trained(run_ranks, tmp_path_factory):
    """trained(case, split, stage) -> what three steps came to; each is run once."""
    folder, done = tmp_path_factory.mktemp("exactness"), {}

    def get(case: str, split: tuple[int, int], stage: int = 0, function: Any = gradients) -> Trained:
        key = f"{case}-{split}-{stage}-{function}"
        if key not in done:
            objective, fields = CASES[case]
            ranks, micro_batches = split
            # A small rate, because Adam turns the rounding noise of small gradients into whole steps.
            optimization = Optimization(8 // ranks // micro_batches, micro_batches, learning_rate=0.0005)
            settings = {"phases": [Phase(objective, 1)], "optimization": optimization} | fields
            start = folder / f"{case}.safetensors"
            config = runs.small_run(
                folder, f"run{len(done)}", engine=Diffusion, stage=stage, init_from=str(start), **settings
            )
            if not start.exists():
                torch.manual_seed(0)
                save_file(config.engine.model().state_dict(), start)
            result = watch(run_ranks, ranks, config, SCORES[objective], function)
            done[key] = Trained(result.gradients, result.scores, buffers_of(config))
        return done[key]

    return get


def buffers_of(config: RunConfig) -> dict[str, torch.Tensor]:
    weights = runs.weights(config)
    return {name: weights[name] for name, _ in config.engine.model().named_buffers() if name in weights}


def assert_alike(found: Trained, reference: Trained) -> None:
    assert int(found.buffers["steps_done"]) == len(found.gradients) == len(reference.gradients) == STEPS
    assert_exact(found, reference)
    for name, buffer in reference.buffers.items():
        difference = (found.buffers[name].double() - buffer.double()).norm()
        # Adam's first steps have the size of the rate whatever the gradient, also where it is rounding noise.
        assert difference <= 10 * TOLERANCE * buffer.double().norm() + 1e-7, name


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


QUICK = [("ligand_vae", 0, (1, 4)), ("protein_vae", 1, (2, 2)), ("denoiser", 1, (2, 2)), ("joint", 1, (2, 2))]
REST = [(case, stage, (2, 2)) for case in CASES for stage in range(3)]
REST += [("joint", stage, split) for stage in (0, 2) for split in SPLITS]
REST = [one for one in dict.fromkeys(REST) if one[1:] != (0, (1, 1)) and one not in QUICK]


@pytest.mark.parametrize(("case", "stage", "split"), [*QUICK, *(slow(*one) for one in REST)])
def test_any_split_gives_the_same_losses_gradient_and_average(trained, case, stage, split) -> None:
    assert_alike(trained(case, split, stage), trained(case, (1, 1)))


@pytest.mark.parametrize("case", ["denoiser", "joint"])
def test_the_average_has_moved(trained, case) -> None:
    buffers = trained(case, (1, 1)).buffers
    assert int(buffers["denoiser_average.updates"]) == STEPS


# So that these tests can fail


def with_counts_of_one_rank(here: RankContext, config: RunConfig) -> torch.Tensor:
    """`gradients` where a rank divides by its own atoms, and DeepSpeed takes the mean. In a process that ends with
    it."""
    begin_window = Diffusion.begin_window

    def alone(self: Diffusion, model: Any, batches: Any, phase: Any, here: RankContext) -> Any:
        window = begin_window(self, model, batches, phase, ALONE)
        return window._replace(counts={name: count * here.world_size for name, count in window.counts.items()})

    Diffusion.begin_window = alone  # type: ignore[method-assign]
    return gradients(here, config)


def test_means_over_one_rank_are_noticed(trained) -> None:
    spoilt, reference = trained("protein_vae", (2, 2), 1, with_counts_of_one_rank), trained("protein_vae", (1, 1))
    assert differences(spoilt, reference)[1] > 100 * TOLERANCE
