"""What the trainer asks an engine for beside the loss: the end of a window, gauges, and parts of the gradient."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gdyn import window
from gdyn.engine import Step
from gdyn.evaluation import evaluate
from gdyn.loader import Loader
from gdyn.metrics import Meter
from gdyn.phases import Phase
from gdyn.preflight import memory
from gdyn.ranks import ALONE
from tests import runs
from tests.toy import HIDDEN, PARTS, Network, Rows, Toy, toy_run

PHASE = Phase("loss", 1)
BUFFERS = ("step", "mean", "precise")
SPLITS = [(1, 1), (1, 2), (2, 1)]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def train_lines(run: Any) -> list[dict[str, Any]]:
    return [record for record in runs.metrics(run) if record["split"] == "train"]


# The end of a window


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (2, 1), (3, 2), slow(0, 2), slow(3, 1)])
def test_what_it_changes_is_in_checkpoints_and_resumes_bit_for_bit(run_ranks, tmp_path, stage, ranks) -> None:
    expected, run = (toy_run(tmp_path, name, stage=stage, split=(ranks, 1)) for name in ("whole", "run"))
    run_ranks(ranks, runs.run, expected)
    run_ranks(ranks, runs.run, run, 3)
    halfway = runs.weights(run)
    assert int(halfway["step"]) == 3 and halfway["precise"].dtype == torch.float64
    assert torch.equal(halfway["mean"], halfway["precise"].float()) and bool((halfway["mean"] != 0).all())
    run_ranks(ranks, runs.run, run)
    runs.assert_same(run, expected)
    assert int(runs.weights(run)["step"]) == 8


@pytest.mark.parametrize("stage", [1, slow(2), slow(3)])
def test_on_another_number_of_ranks_it_goes_on(run_ranks, tmp_path, stage) -> None:
    whole, run = (toy_run(tmp_path, name, stage=stage) for name in ("whole", "run"))
    run_ranks(1, runs.run, whole)
    run_ranks(2, runs.run, toy_run(tmp_path, "run", stage=stage, split=(2, 1)), 3)
    run_ranks(1, runs.run, run)
    found, expected = runs.weights(run), runs.weights(whole)
    assert int(found["step"]) == 8
    torch.testing.assert_close(found["precise"], expected["precise"], rtol=1e-5, atol=1e-6)


def test_it_survives_a_new_optimizer(run_ranks, tmp_path) -> None:
    run = toy_run(tmp_path, "run", stage=1, phases=[Phase("loss", 1), Phase("loss", 1, "head", ("head.*",))])
    run_ranks(1, runs.run, run)
    weights = runs.weights(run)
    assert int(weights["step"]) == 4 and torch.equal(weights["mean"], weights["precise"].float())


class Ds(Network):
    """Of a DeepSpeed engine in fp16, what a window needs."""

    def __init__(self, applied: bool):
        super().__init__()
        self.applied, self.taken = applied, 0
        self.optimizer, self.basic_optimizer, self.torch_autocast_z0_gradscaler = SimpleNamespace(), None, None
        self.fp16_enabled = self.dynamic_loss_scale = lambda: True

    @property
    def module(self) -> Network:
        return self

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step_(self) -> None:
        self.taken += 1

    def was_step_applied(self) -> bool:
        return self.applied


@pytest.mark.parametrize("applied", [True, False])
def test_it_gets_every_micro_batch_of_a_step_that_was_applied(applied: bool, monkeypatch) -> None:
    """DeepSpeed skips a step whose fp16 gradients overflow."""
    calls: list[list[Step]] = []
    monkeypatch.setattr(Toy, "end_window", lambda self, model, steps, *_: calls.append(steps))
    ds = Ds(applied)
    del ds._buffers["step"]
    ds.step = ds.step_
    batches = [Rows(24, 0)[part] for part in np.split(np.arange(24), [10])]
    window.train(Toy(), ds, batches, PHASE, ALONE, Meter(ALONE.device), measure=False)
    assert ds.taken == 2 and len(calls) == applied
    if applied:
        assert [step.weight for step in calls[0]] == [10, 14] and calls[0][0].statistics.shape == (HIDDEN + 1,)


def test_evaluation_and_preflight_change_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Toy, "end_window", lambda *_: pytest.fail("called outside training"))
    torch.manual_seed(0)
    model = Network().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(Toy(), model, Loader(Rows(24, 0), 8, 1, ALONE), PHASE, ALONE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    values = {"train_micro_batch_size_per_gpu": 4}
    trial = memory.try_window(Toy(), [Rows(24, 0)[np.arange(4)]] * 2, [PHASE], values, ALONE)
    assert math.isfinite(trial.loss)


# Gauges and parts


def test_gauges_stand_in_every_train_line(run_ranks, tmp_path) -> None:
    run = toy_run(tmp_path, "run")
    run_ranks(1, runs.run, run)
    assert [line["counted"] for line in train_lines(run)] == list(range(1, 9))


def norms_of_the_first_step() -> dict[str, float]:
    """Of all rows at once, without DeepSpeed."""
    torch.manual_seed(1234)
    model, x = Network(), Rows(24, 0).rows
    (model(x)[0] - x).square().sum(1).mean().backward()
    squares = {name: float(p.grad.double().square().sum()) for name, p in model.named_parameters()}
    parts = {part: sum(v for name, v in squares.items() if name.startswith(part)) for part in PARTS}
    found = {f"grad_norm_{part}": value**0.5 for part, value in parts.items()}
    return found | {"grad_norm": sum(squares.values()) ** 0.5}


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: f"{split[0]}x{split[1]}")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradient_norms_by_part_are_those_of_the_whole_batch(run_ranks, tmp_path, stage, split) -> None:
    """Before clipping, which is at 1 here."""
    changes = {"stage": stage, "split": split, "samples": 24, "phases": [PHASE]}
    run, undivided = (toy_run(tmp_path, f"{divided}", divided=divided, **changes) for divided in (True, False))
    run_ranks(split[0], runs.run, run)
    run_ranks(split[0], runs.run, undivided)
    [found], [whole] = train_lines(run), train_lines(undivided)
    expected = norms_of_the_first_step()
    assert expected["grad_norm"] > 5
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert sum(found[f"grad_norm_{part}"] ** 2 for part in PARTS) == pytest.approx(found["grad_norm"] ** 2, rel=1e-6)
    assert whole["grad_norm"] == pytest.approx(found["grad_norm"], rel=1e-5) and "grad_norm_head" not in whole


def test_measuring_changes_nothing(run_ranks, tmp_path) -> None:
    run, undivided = (toy_run(tmp_path, f"{d}", divided=d, stage=2, split=(1, 2)) for d in (True, False))
    for each in (run, undivided):
        run_ranks(1, runs.run, each)
    one, other = runs.weights(run), runs.weights(undivided)
    assert all(torch.equal(one[name], other[name]) for name in BUFFERS + tuple(other))
