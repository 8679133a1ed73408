"""A stopped run of the monodecoder goes on as if nothing had happened: buffers, schedules, windows bounded by residues;
bit for bit on as many ranks, within 1e-5 on others."""

from typing import Any

import pytest
import torch

from gdyn.config import Logging, Optimization
from gdyn.engines.monodecoder.engine import Monodecoder, Weights
from gdyn.learning_rate import LearningRateSchedule
from gdyn.phases import Phase
from gdyn.schedules import Schedule
from tests import runs
from tests.runs import as_new, step

COMMITMENT = Schedule(0.1, 0.9, 8)
FADING = Weights(**{name: Schedule(weight, 0, 50, "linear") for name, weight in Weights().at(0).items()})
"""Validation scores take what schedules come to, here 0: none is better than the first, and plateau acts."""
PLATEAU = LearningRateSchedule("plateau", factor=0.5, patience=0)
PHASES = [Phase("loss", 2), Phase("loss", 1, "decoders", ("decoders.*",))]
CASES: dict[str, dict[str, Any]] = {
    "ema": {"max_residues": 50, "revive_after": 3, "codes": 24, "mask_plddt": True},
    "plain": {"ema": False, "revive_after": 3, "codes": 24},
}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("case", "stage", "ranks"),
    [("ema", 0, 1), ("ema", 1, 2), slow("plain", 1, 2), slow("plain", 0, 1), slow("ema", 2, 2), slow("plain", 3, 2)],
)
def test_stopped_within_an_epoch_it_continues_bit_for_bit(run_ranks, tmp_path, case, stage, ranks) -> None:
    """Lines of metrics have three steps and epochs another number, so lines straddle what happens."""
    settings = CASES[case] | {"commitment": COMMITMENT, "weights": FADING, "dropout": 0.1, "phases": PHASES}
    settings["logging"] = Logging(every_steps=3, progress="off")
    settings["optimization"] = Optimization(4, 2 // ranks, learning_rate=0.005, lr_schedule=PLATEAU)
    expected = runs.small_run(tmp_path, "whole", engine=Monodecoder, stage=stage, **settings)
    config = as_new(expected, tmp_path)
    run_ranks(ranks, runs.run, expected)
    run_ranks(ranks, runs.run, config, 2)
    halfway = runs.weights(config)
    assert int(halfway["steps_done"]) == step(config) == 2
    assert bool((halfway["quantizer.idle"] > 0).any())
    run_ranks(ranks, runs.run, config, 3)
    assert step(config) == 5
    run_ranks(ranks, runs.run, config)
    runs.assert_same(config, expected)
    final = runs.weights(config)
    assert int(final["steps_done"]) == step(config) >= 9
    assert not torch.equal(final["quantizer.counts"], halfway["quantizer.counts"])
    lines = [line for line in runs.metrics(config) if line["split"] == "train"]
    assert [line["commitment"] for line in lines] == [COMMITMENT.at(line["step"]) for line in lines]
    assert [line["lr"] for line in (lines[0], lines[-1])] == [0.005, 0.0025]


@pytest.mark.parametrize("stage", [0, slow(1), slow(2), slow(3)])
@pytest.mark.parametrize("bounded", [False, slow(True)])
def test_other_numbers_of_ranks_continue_within_1e_5(run_ranks, tmp_path, stage, bounded) -> None:
    changes = {"commitment": COMMITMENT, "weights": Weights(edge=Schedule(1, 0.1, 6))}
    changes |= {"max_residues": 60} if bounded else {}

    def run(name: str, split: tuple[int, int]) -> Any:
        return runs.small_run(tmp_path, name, engine=Monodecoder, stage=stage, split=split, **changes)

    expected, first, second = run("whole", (1, 2)), run("run", (2, 1)), run("run", (1, 2))
    run_ranks(1, runs.run, expected)
    run_ranks(2, runs.run, first, 5)
    assert step(first) == 5
    run_ranks(1, runs.run, second)
    found, reference = runs.metrics(second), runs.metrics(expected)
    assert [line["step"] for line in found] == [line["step"] for line in reference]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in reference], rel=1e-5)
    one, other = runs.weights(second), runs.weights(expected)
    for name in ("steps_done", "quantizer.idle", "quantizer.counts", "quantizer.sums"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5, msg=name)
