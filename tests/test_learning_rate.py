"""Learning rates follow published formulas, keep the groups' ratios, and survive resumes, other ranks and phases."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from gdyn import ds_config
from gdyn.config import parse
from gdyn.errors import UserError
from gdyn.learning_rate import LearningRates, LearningRateSchedule
from gdyn.phases import Phase
from tests import runs
from tests.test_ds_config import Wishes, config
from tests.toy import toy_run

TOTAL, WARMUP, MUON, ADAM = 40, 6, 0.02, 3e-4


def optimizer() -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (MUON, ADAM)]
    return torch.optim.SGD(groups, lr=1.0)


def rates(steps: int = TOTAL, **changes: Any) -> list[list[float]]:
    """Learning rates of both groups, for each step."""
    sgd = optimizer()
    schedule = LearningRates(LearningRateSchedule(**changes), TOTAL).attach(sgd)
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in sgd.param_groups])
        schedule.step()
    return found


def first(steps: int = TOTAL, **changes: Any) -> list[float]:
    return [lr for lr, _ in rates(steps, **changes)]


def cosine(progress: float, cycles: float) -> float:
    """transformers.optimization, _get_cosine_schedule_with_warmup_lr_lambda, num_cycles 0.5 by default."""
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * float(cycles) * 2.0 * progress)))


def restarts(progress: float, cycles: int) -> float:
    """_get_cosine_with_hard_restarts_schedule_with_warmup_lr_lambda."""
    return 0.0 if progress >= 1.0 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((float(cycles) * progress) % 1.0))))


HUGGING_FACE: list[tuple[dict[str, Any], Callable[[float], float]]] = [
    ({"shape": "none"}, lambda t: 1.0),
    ({"shape": "linear"}, lambda t: max(0.0, 1 - t)),
    ({"shape": "cosine"}, lambda t: cosine(t, 0.5)),
    ({"shape": "cosine_restarts"}, lambda t: restarts(t, 3)),
    ({"shape": "cosine_restarts", "cycles": 5}, lambda t: restarts(t, 5)),
    ({"shape": "polynomial", "power": 2.0}, lambda t: max(0.0, 1 - t) ** 2),
]


@pytest.mark.parametrize(("changes", "decay"), HUGGING_FACE, ids=[str(changes) for changes, _ in HUGGING_FACE])
def test_warm_up_and_shapes_are_those_of_transformers(changes: dict[str, Any], decay: Callable[[float], float]) -> None:
    def expected(step: int) -> float:
        if step < WARMUP:
            return MUON * float(step) / float(max(1, WARMUP))
        return MUON * decay(float(step - WARMUP) / float(max(1, TOTAL - WARMUP)))

    found = first(TOTAL + 3, warmup_steps=WARMUP, **changes)
    assert found[:-2] == pytest.approx([expected(step) for step in range(TOTAL + 1)], abs=1e-15)
    assert found[-1] == found[-3]  # a run that is extended does not rise again
    assert found == first(TOTAL + 3, warmup_ratio=WARMUP / TOTAL, warmup_steps=1, **changes)


TORCH: list[tuple[dict[str, Any], Callable[[Any], Any]]] = [
    ({"shape": "cosine", "min_lr": 1e-3}, lambda sgd: lr_scheduler.CosineAnnealingLR(sgd, TOTAL, eta_min=1e-3)),
    ({"shape": "linear", "min_lr": 0.1 * MUON}, lambda sgd: lr_scheduler.LinearLR(sgd, 1.0, 0.1, TOTAL)),
    ({"shape": "polynomial", "power": 3.0}, lambda sgd: lr_scheduler.PolynomialLR(sgd, TOTAL, 3.0)),
]


@pytest.mark.parametrize(("changes", "reference"), TORCH, ids=[changes["shape"] for changes, _ in TORCH])
def test_shapes_with_a_floor_are_those_of_torch(changes: dict[str, Any], reference: Callable[[Any], Any]) -> None:
    sgd = optimizer()
    theirs, expected = reference(sgd), []
    for _ in range(TOTAL):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        theirs.step()
    assert first(**changes) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("higher", [False, True])
@pytest.mark.parametrize("patience", [0, 2])
def test_plateau_is_that_of_torch(patience: int, higher: bool) -> None:
    scores = torch.randn(60, generator=torch.Generator().manual_seed(3)).tolist()
    scores[:10] = range(10, 0, -1) if not higher else range(-10, 0)
    scores[17] = math.nan
    ours, theirs = optimizer(), optimizer()
    settings: dict[str, Any] = {"factor": 0.5, "patience": patience, "min_lr": 1e-4}
    schedule = LearningRates(LearningRateSchedule("plateau", **settings), TOTAL).attach(ours)
    reference = lr_scheduler.ReduceLROnPlateau(
        theirs, mode="max" if higher else "min", threshold=0.0, eps=0, **settings
    )
    seen = set()
    for score in scores:
        schedule.end_epoch("loss", score, higher)
        reference.step(score)
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
        seen.add(ours.param_groups[0]["lr"])
    assert len(seen) > 4 and pytest.approx(min(seen)) == 1e-4


def test_plateau_compares_scores_of_one_objective_only() -> None:
    sgd = optimizer()
    schedule = LearningRates(LearningRateSchedule("plateau", patience=0), TOTAL).attach(sgd)
    for objective, score, dropped in (("a", 1.0, 1), ("b", 9.0, 1), ("b", 9.5, 0.1), ("a", 5.0, 0.1), ("a", 6, 0.01)):
        schedule.end_epoch(objective, score, False)
        assert sgd.param_groups[0]["lr"] == pytest.approx(MUON * dropped)


@pytest.mark.parametrize("shape", ["none", "linear", "cosine", "cosine_restarts", "polynomial"])
def test_groups_keep_their_ratio_down_to_the_floor(shape: str) -> None:
    found = rates(TOTAL + 2, shape=shape, warmup_steps=WARMUP, min_lr=1e-3)
    assert all(adam == pytest.approx(lr * ADAM / MUON) for lr, adam in found)
    assert shape == "none" or found[-1][0] == pytest.approx(1e-3)


def test_state_is_complete_and_another_schedulers_is_passed_over() -> None:
    schedule = LearningRateSchedule("plateau", warmup_steps=3, factor=0.5, patience=1)
    sgd, other = optimizer(), optimizer()
    whole = LearningRates(schedule, TOTAL).attach(sgd)
    for score in (2.0, 1.0, 1.5):
        whole.step()
        whole.end_epoch("loss", score, False)
    resumed = LearningRates(schedule, TOTAL).attach(other)
    for state in (None, {"last_batch_iteration": 7}):
        resumed.load_state_dict(state)
        assert resumed.steps == 0
    resumed.load_state_dict(whole.state_dict())
    resumed.apply()
    for score in (1.2, 0.5, 0.7, 0.8):
        for each in (whole, resumed):
            each.step()
            each.end_epoch("loss", score, False)
        assert sgd.param_groups[1]["lr"] == other.param_groups[1]["lr"]
    assert whole.state_dict() == resumed.state_dict() and whole.drops == 2


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [({"warmup_ratio": 2.0}, "0 to 1"), ({"cycles": 0}, "1 or more"), ({"factor": 1.0}, "between 0 and 1")],
)
def test_a_schedule_that_cannot_be_is_refused(wrong: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=rf"optimization.lr_schedule.{next(iter(wrong))} is .* expected {expected}"):
        LearningRateSchedule(**wrong)


def test_a_schedule_in_both_places_is_refused_naming_both() -> None:
    mine = config(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 5}})
    wishes = Wishes(lr_schedule=LearningRateSchedule())
    with pytest.raises(UserError, match=r'mine\.json: "scheduler" is WarmupLR, .* optimization\.lr_schedule; keep one'):
        ds_config.complete(mine, wishes, 10)
    assert ds_config.complete(config(), wishes, 10)


def test_the_run_file_says_it_and_the_command_line_too(tmp_path: Path) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(
        "engine: {class_path: Vamp, init_args: {train: [a], validation: [b]}}\ndeepspeed: fp32_zero1\n"
        "run_dir: x\nloss_schedule: [vamp2]\nepochs: 1\n"
        "optimization: {lr_schedule: {shape: cosine_restarts, warmup_ratio: 0.1, cycles: 2}}\n"
    )
    found = parse(["--config", str(run_file), "--optimization.lr_schedule.cycles", "4"]).config
    assert found.optimization.lr_schedule == LearningRateSchedule("cosine_restarts", warmup_ratio=0.1, cycles=4)
    run_file.write_text(found.to_yaml())
    assert parse(["--config", str(run_file)]).config == found
    run_file.write_text(found.to_yaml().replace("cycles:", "cycle:"))
    with pytest.raises(UserError, match='Did you mean "cycles"'):
        parse(["--config", str(run_file)])


# In training


COSINE = LearningRateSchedule("cosine", warmup_steps=3, min_lr=1e-3)
PLATEAU = LearningRateSchedule("plateau", warmup_steps=1, factor=0.5, patience=0)
HEAD = Phase("loss", 2, name="head", trains=("head.*",))


def learning_rates(run: Any) -> list[float]:
    return [record["lr"] for record in runs.metrics(run) if record["split"] == "train"]


def logged(*, steps: int, schedule: LearningRateSchedule, base: float) -> list[float]:
    """A line tells the rate of the step that comes next."""
    return [base * schedule.at(step, steps, 0, schedule.min_lr / base) for step in range(1, steps + 1)]


@pytest.mark.parametrize("stage", [0, 1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_schedule_runs_over_all_phases_and_resumes_bit_for_bit(run_ranks, tmp_path, stage) -> None:
    """The second phase has another optimizer; stopped within an epoch and between the phases."""
    changes = {"stage": stage, "samples": 48, "phases": [Phase("loss", 2), HEAD], "lr_schedule": COSINE}
    expected, run = (toy_run(tmp_path, name, **changes) for name in ("whole", "run"))
    run_ranks(1, runs.run, expected)
    assert learning_rates(expected) == pytest.approx(logged(steps=8, schedule=COSINE, base=0.01))
    run_ranks(1, runs.run, run, 1)
    run_ranks(1, runs.run, run, 3, True)
    run_ranks(1, runs.run, run)
    runs.assert_same(run, expected)


@pytest.mark.parametrize("same", [True, False])
def test_the_schedule_begins_anew_with_each_phase_and_resumes_bit_for_bit(run_ranks, tmp_path, same) -> None:
    """The second phase trains the same parameters with the same optimizer, or others; it is stopped within both phases
    and between them."""
    schedule = dataclasses.replace(COSINE, each_phase=True)
    second = Phase("loss", 3, name="second") if same else dataclasses.replace(HEAD, epochs=3)
    changes = {"samples": 48, "phases": [Phase("loss", 2), second], "lr_schedule": schedule}
    expected, run = (toy_run(tmp_path, name, **changes) for name in ("whole", "run"))
    run_ranks(1, runs.run, expected)
    per_epoch = len(learning_rates(expected)) // 5
    both = [logged(steps=epochs * per_epoch, schedule=COSINE, base=0.01) for epochs in (2, 3)]
    assert learning_rates(expected) == pytest.approx(both[0] + both[1])
    for stop_after, between in ((1, False), (1, True), (per_epoch + 1, False)):
        run_ranks(1, runs.run, run, stop_after, between)
    run_ranks(1, runs.run, run)
    runs.assert_same(run, expected)


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_plateau_acts_at_the_ends_of_epochs_and_resumes_bit_for_bit(run_ranks, tmp_path, stage) -> None:
    """The validation never improves: one drop after each epoch but the first. The phases train different parameters."""
    changes = {"stage": stage, "uphill": True, "phases": [Phase("loss", 3), HEAD], "lr_schedule": PLATEAU}
    expected, run = (toy_run(tmp_path, name, **changes) for name in ("whole", "run"))
    run_ranks(1, runs.run, expected)
    dropped = [0.5**drops for drops in (0, 0, 0, 0, 1, 1, 2, 2, 3, 3)]
    assert learning_rates(expected) == pytest.approx([0.01 * factor for factor in dropped])
    for stop_after, between in ((3, False), (1, True), (2, True)):
        run_ranks(1, runs.run, run, stop_after, between)
    run_ranks(1, runs.run, run)
    runs.assert_same(run, expected)


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_other_numbers_of_ranks_keep_the_schedule(run_ranks, tmp_path, stage) -> None:
    whole, run = (toy_run(tmp_path, name, stage=stage, lr_schedule=PLATEAU, uphill=True) for name in ("whole", "run"))
    two = toy_run(tmp_path, "run", stage=stage, split=(2, 1), lr_schedule=PLATEAU, uphill=True)
    run_ranks(1, runs.run, whole)
    run_ranks(2, runs.run, two, 5)
    run_ranks(1, runs.run, run)
    assert learning_rates(run) == learning_rates(whole)


def test_a_schedule_added_later_starts_where_the_run_is(run_ranks, tmp_path) -> None:
    plain = toy_run(tmp_path, "run")
    run_ranks(1, runs.run, plain, 3)
    added = dataclasses.replace(plain.optimization, lr_schedule=COSINE)
    run_ranks(1, runs.run, dataclasses.replace(plain, optimization=added))
    assert learning_rates(plain)[3:] == pytest.approx(logged(steps=8, schedule=COSINE, base=0.01)[3:])
