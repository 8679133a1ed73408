"""The same global batch of structures gives one loss, one gradient and one codebook for any split into ranks x
micro-batches, at every ZeRO stage, through the whole trainer."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from gdyn.config import Optimization, RunConfig
from gdyn.engines.monodecoder.engine import Monodecoder
from gdyn.engines.monodecoder.quantizer import Quantizer
from gdyn.phases import Phase
from gdyn.ranks import ALONE, RankContext
from tests import runs
from tests.exactness import TOLERANCE, Result, assert_exact, differences, gradients, watch

STEPS = 3
SPLITS = [(1, 1), (1, 4), (2, 2), (4, 1)]
LOSSES = ("loss", "aa", "edge", "logit", "ss", "angles", "vq", "fft2")
CASES: dict[str, dict[str, Any]] = {
    "ema": {"mask_plddt": True, "plddt_threshold": 0.5},
    "plain": {"ema": False},
    "ema-revival": {"revive_after": 1, "codes": 24},
    "plain-revival": {"revive_after": 2, "codes": 24, "ema": False, "links": ["contactPoints", "backbone"]},
}


@dataclass
class Trained(Result):
    buffers: dict[str, torch.Tensor]
    """Of the network after the last step, and the codebook."""


@pytest.fixture(scope="module")
def trained(run_ranks, tmp_path_factory):
    """trained(case, split, stage, **changes) -> what three steps came to; each is run once."""
    folder, done = tmp_path_factory.mktemp("exactness"), {}

    def get(case: str, split: tuple[int, int], stage: int = 0, function: Any = gradients, **changes: Any) -> Trained:
        key = f"{case}-{split}-{stage}-{function}-{changes}"
        if key not in done:
            ranks, micro_batches = split
            # A small rate, because Adam turns the rounding noise of small gradients into whole steps.
            optimization = Optimization(8 // ranks // micro_batches, micro_batches, learning_rate=0.0005)
            settings = {"phases": [Phase("loss", 1)], "optimization": optimization} | CASES[case] | changes
            config = runs.small_run(folder, f"run{len(done)}", engine=Monodecoder, stage=stage, split=split, **settings)
            result = watch(run_ranks, split[0], config, LOSSES, function)
            done[key] = Trained(result.gradients, result.scores, buffers_of(config))
        return done[key]

    return get


def buffers_of(config: RunConfig) -> dict[str, torch.Tensor]:
    model, weights = config.engine.model(), runs.weights(config)
    model.load_state_dict(weights)
    assert isinstance(model.quantizer, Quantizer)
    named = {name: weights[name] for name, _ in model.named_buffers()}
    return named | {"codebook": model.quantizer.codebook()}


def assert_alike(found: Trained, reference: Trained) -> None:
    assert int(found.buffers["steps_done"]) == len(found.gradients) == len(reference.gradients) == STEPS
    assert_exact(found, reference)
    assert found.buffers.keys() == reference.buffers.keys()
    for name, buffer in found.buffers.items():
        difference, norm = relative(buffer, reference.buffers[name])
        assert difference <= TOLERANCE * norm, name
        assert buffer.is_floating_point() or difference == 0, name


def relative(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    return float((one.double() - other.double()).norm()), float(other.double().norm())


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


QUICK = [("ema", 0, (1, 4)), ("ema", 1, (2, 2)), ("plain", 1, (2, 2)), ("ema-revival", 1, (2, 2))]
QUICK += [("plain-revival", 0, (2, 2))]
REST = [(case, stage, split) for case in CASES for stage in range(4) for split in SPLITS]
REST = [one for one in REST if one[1:] != (0, (1, 1)) and one not in QUICK]


@pytest.mark.parametrize(("case", "stage", "split"), [*QUICK, *(slow(*one) for one in REST)])
def test_any_split_gives_the_same_losses_gradient_and_codebook(trained, case, stage, split) -> None:
    assert_alike(trained(case, split, stage), trained(case, (1, 1)))


@pytest.mark.parametrize("case", ["ema-revival", "plain-revival"])
def test_codes_were_revived_on_the_way(trained, case) -> None:
    """Every revival draws from the next seed."""
    with_revival, without = (trained(case, (1, 1), **changes) for changes in ({}, {"revive_after": 99}))
    assert int(with_revival.buffers["quantizer.seed"]) > int(without.buffers["quantizer.seed"])
    moved = (with_revival.buffers["codebook"] - without.buffers["codebook"]).abs().amax(1)
    assert int((moved > 0.01).sum()) >= 1


def bounded(split: tuple[int, int]) -> dict[str, Any]:
    """At most 3 structures and 36 residues in each of four micro-batches."""
    return {"max_residues": 36, "optimization": Optimization(3, split[1], learning_rate=0.005)}


@pytest.mark.parametrize(("stage", "split"), [(0, (2, 2)), slow(1, (4, 1)), slow(3, (2, 2))])
def test_windows_bounded_by_residues_are_alike_for_one_product_of_ranks_and_accumulation(trained, stage, split) -> None:
    assert_alike(trained("ema", split, stage, **bounded(split)), trained("ema", (1, 4), **bounded((1, 4))))


# So that these tests can fail


def with_codes_of_one_rank(here: RankContext, config: RunConfig) -> torch.Tensor:
    """`gradients` where the codes follow what a rank's own residues assign. In a process that ends with it."""
    end_window = Monodecoder.end_window

    def alone(self: Monodecoder, model: Any, steps: Any, phase: Any, window: Any, here: RankContext) -> None:
        end_window(self, model, steps, phase, window, ALONE)

    Monodecoder.end_window = alone  # type: ignore[method-assign]
    return gradients(here, config)


def with_counts_of_one_rank(here: RankContext, config: RunConfig) -> torch.Tensor:
    """`gradients` where a rank divides by its own residues, and DeepSpeed takes the mean."""
    begin_window = Monodecoder.begin_window

    def alone(self: Monodecoder, model: Any, batches: Any, phase: Any, here: RankContext) -> Any:
        window = begin_window(self, model, batches, phase, ALONE)
        weights = {name: weight / here.world_size for name, weight in window.weights.items()}
        return window._replace(weights=weights)

    Monodecoder.begin_window = alone  # type: ignore[method-assign]
    return gradients(here, config)


def test_codes_that_follow_one_rank_are_noticed(trained) -> None:
    spoilt, reference = trained("ema", (2, 2), 1, with_codes_of_one_rank), trained("ema", (1, 1))
    difference, norm = relative(spoilt.buffers["codebook"], reference.buffers["codebook"])
    assert difference > 100 * TOLERANCE * norm
    assert differences(spoilt, reference)[0] > 100 * TOLERANCE  # and they decode other letters


def test_means_over_one_rank_are_noticed(trained) -> None:
    spoilt, reference = trained("ema", (2, 2), 1, with_counts_of_one_rank), trained("ema", (1, 1))
    assert differences(spoilt, reference)[1] > 100 * TOLERANCE
