"""A window whose loss or gradient is not finite on one rank: all ranks skip it, count it, and stop after too many."""

import copy
import dataclasses
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import Tensor

from gdyn import ds_config, ds_engine, window
from gdyn.checkpoints import _digest, full_weights
from gdyn.config import Logging
from gdyn.learning_rate import LearningRates, LearningRateSchedule
from gdyn.loader import Loader
from gdyn.metrics import Meter
from gdyn.phases import Phase
from gdyn.ranks import AgreedError, RankContext
from gdyn.recipes import bundled
from launch import train
from tests import runs
from tests.harness import RanksFailed
from tests.spoilt import Spoilt, SpoiltRows, batch, finite
from tests.toy import Toy, toy_run

PHASE = Phase("loss", 1)
COSINE = LearningRateSchedule("cosine", warmup_steps=2)
Values = dict[str, Any]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# One window, on real ranks


class Trouble(NamedTuple):
    kind: str
    rank: int
    micro: int


class After(NamedTuple):
    """What is left of some windows on one rank."""

    weights: dict[str, Tensor]
    """Parameters and buffers in full, and Adam's moments."""
    rates: dict[str, float]
    scale: float
    metrics: dict[str, float]
    outcomes: list[window.Outcome]


def values_of(recipe: str, **changes: Any) -> Values:
    """A bundled recipe with another value for some keys, whose dots are written as `__`."""
    values = json.loads(bundled()[recipe].read_text())
    for name, value in changes.items():
        *way, last = name.split("__")
        section = values
        for part in way:
            section = section.setdefault(part, {})
        section[last] = value
    return values


def take(here: RankContext, values: Values, accumulation: int, windows: list[Trouble | int]) -> After:
    """Windows are numbers, from which their rows follow, or troubles."""
    from deepspeed.accelerator import get_accelerator  # slow to import
    from deepspeed.utils import safe_get_full_optimizer_state

    get_accelerator().is_fp16_supported = lambda: True  # too slow for DeepSpeed's taste, but possible
    torch.manual_seed(0)
    engine, model = Spoilt(groups=values["optimizer"]["type"] == "Muon"), Spoilt().model()
    values |= {"train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": accumulation}
    if values["optimizer"]["params"].get("lr") == "auto":
        values["optimizer"]["params"]["lr"] = 0.01
    rates = LearningRates(COSINE, 10)
    ds = ds_engine.make(engine, model, PHASE, values, rates)
    # What is stored in half precision must be fed with it.
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(ds_config.precision(values), torch.float32)
    meter, outcomes = Meter(here.device), []
    for number in windows:
        batches = []
        for micro in range(accumulation):
            there = isinstance(number, Trouble) and (number.rank, number.micro) == (here.rank, micro)
            kind = number.kind if isinstance(number, Trouble) and there else ""
            seed = 99 if isinstance(number, Trouble) else number
            made = batch(1000 * seed + 10 * here.rank + micro, kind)
            batches.append(made | {"x": made["x"].to(half)})
        outcomes.append(window.train(engine, ds, batches, PHASE, here, meter, measure=True))
    weights = full_weights(ds)
    for name, parameter in ds.module.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            if ds.zero_optimization_stage() and ds_config.optimizer_type(values) != "Muon":
                moments = safe_get_full_optimizer_state(parameter, key)
            else:
                moments = ds.basic_optimizer.state.get(parameter, {}).get(key)
            if moments is not None:
                weights[f"{name} {key}"] = moments.clone()
    scale = float(getattr(ds.optimizer, "loss_scale", 1.0))
    after = After(weights, ds_engine.learning_rates(ds), scale, meter.means(), outcomes)
    ds_engine.release(ds)
    return after


def differing(one: After, other: After) -> list[str]:
    assert one.weights.keys() == other.weights.keys()
    return [name for name in one.weights if not torch.equal(one.weights[name], other.weights[name])]


def each(here: RankContext, values: Values, accumulation: int, cases: list[list[Trouble | int]]) -> list[After]:
    return [take(here, copy.deepcopy(values), accumulation, case) for case in cases]


def assert_skipped(
    run_ranks: Any, values: Values, troubles: list[Trouble], accumulation: int = 1, ranks: int = 2
) -> None:
    """The window in the middle leaves nothing behind, on any rank."""
    cases = [[1, 2, 3], *([1, 2, trouble, 3] for trouble in troubles)]
    first, *others = run_ranks(ranks, each, values, accumulation, cases)
    for rank, (expected, *found) in enumerate([first, *others]):
        for trouble, after in zip(troubles, found, strict=True):
            assert differing(after, expected) == [] and differing(after, first[0]) == [], trouble
            assert all(weight.isfinite().all() for weight in after.weights.values())
            assert (after.rates, after.scale, after.metrics) == (expected.rates, expected.scale, expected.metrics)
            assert int(after.weights["step"]) == 3 and finite(after.metrics)
            assert [outcome.skipped is None for outcome in after.outcomes] == [True, True, False, True], trouble
            assert after.outcomes[2].norms == {} and after.outcomes[3].norms == expected.outcomes[2].norms
            lost = [i for i, loss in enumerate(after.outcomes[2].skipped or ()) if not math.isfinite(loss)]
            assert lost == ([trouble.micro] if rank == trouble.rank and trouble.kind != "backward" else []), trouble
    # The schedule counts the steps that were applied.
    assert first[0].rates["lr"] == pytest.approx(0.01 * COSINE.at(3, 10))


STAGES = [0, 1, 2, 3]
KINDS = ("nan", "hidden", "backward")


@pytest.mark.parametrize(
    ("stage", "kinds"),
    [*((stage, ("nan", "backward")) for stage in STAGES), *(slow(s, ("inf", "hidden")) for s in STAGES)],
)
def test_a_window_of_one_ranks_nan_leaves_nothing_behind(run_ranks, stage: int, kinds: tuple[str, ...]) -> None:
    assert_skipped(run_ranks, values_of(f"fp32_zero{stage}"), [Trouble(kind, 1, 0) for kind in kinds])


@pytest.mark.parametrize(("stage", "kinds"), [(1, ("nan",)), *(slow(stage, KINDS) for stage in STAGES)])
def test_it_does_so_from_any_of_its_micro_batches(run_ranks, stage: int, kinds: tuple[str, ...]) -> None:
    troubles = [Trouble(kind, 0, micro) for kind in kinds for micro in (0, 1)]
    assert_skipped(run_ranks, values_of(f"fp32_zero{stage}"), troubles, accumulation=2)


def test_a_loss_whose_gradient_hides_it_is_found_by_a_process_alone(run_ranks) -> None:
    for stage in (0, 2):
        assert_skipped(run_ranks, values_of(f"fp32_zero{stage}"), [Trouble("hidden", 0, 0)], ranks=1)


PRECISIONS: dict[str, tuple[str, Values]] = {
    "autocast": ("bf16_zero{}", {}),
    "bf16": ("fp32_zero{}", {"bf16__enabled": True}),
    "bf16_unchecked": ("fp32_zero{}", {"bf16": {"enabled": True, "check_grad_overflow": False}}),
}


@pytest.mark.parametrize(
    ("precision", "stage", "kinds"),
    [("autocast", 1, ("nan",)), *(slow(precision, stage, KINDS) for precision in PRECISIONS for stage in STAGES)],
)
def test_it_does_so_in_bf16(run_ranks, precision: str, stage: int, kinds: tuple[str, ...]) -> None:
    recipe, changes = PRECISIONS[precision]
    troubles = [Trouble(kind, 1, micro) for kind in kinds for micro in (0, 1)]
    assert_skipped(run_ranks, values_of(recipe.format(stage), **changes), troubles, accumulation=2)


@pytest.mark.parametrize("stage", [1, slow(2)])
def test_it_does_so_where_deepspeed_is_told_not_to_look(run_ranks, stage: int) -> None:
    changes = {"zero_optimization__compute_grad_norm": False, "gradient_clipping": 0.0}
    assert_skipped(run_ranks, values_of(f"fp32_zero{stage}", **changes), [Trouble(kind, 1, 0) for kind in KINDS])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_does_so_where_the_optimizer_is_offloaded(run_ranks, stage: int) -> None:
    values = values_of(f"fp32_zero{stage}", zero_optimization__offload_optimizer={"device": "cpu"})
    values["zero_force_ds_cpu_optimizer"] = False
    assert_skipped(run_ranks, values, [Trouble(kind, 1, 0) for kind in KINDS], accumulation=2)


@pytest.mark.parametrize("stage", [0, slow(1), slow(2), slow(3)])
def test_it_does_so_with_muon(run_ranks, stage: int) -> None:
    muon = {"type": "Muon", "params": {"muon_lr": 0.01, "adam_lr": 0.01, "ns_method": "gram", "weight_decay": 0.0}}
    changes = {"optimizer": muon, "gradient_clipping": 0.0, "zero_optimization__reduce_scatter": False}
    assert_skipped(run_ranks, values_of(f"fp32_zero{stage}", **changes), [Trouble(kind, 1, 0) for kind in KINDS])


# fp16


def fp16(stage: int, power: int) -> Values:
    values = values_of(f"fp32_zero{stage}")
    return values | {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": power, "hysteresis": 1}}


@pytest.mark.parametrize("stage", [0, 1, slow(2), slow(3)])
def test_a_nan_is_not_blamed_on_fp16s_loss_scale(run_ranks, stage: int) -> None:
    assert_skipped(run_ranks, fp16(stage, 4), [Trouble("nan", 1, 0), Trouble("hidden", 1, 0)])


@pytest.mark.parametrize("stage", [1, slow(2), slow(3)])
def test_windows_in_which_fp16_seeks_its_loss_scale_are_not_counted(run_ranks, stage: int) -> None:
    for after in run_ranks(2, take, fp16(stage, 20), 1, list(range(9))):
        applied = int(after.weights["step"])
        assert 0 < applied < 9 and after.scale < 2**20
        assert all(outcome.skipped is None for outcome in after.outcomes)
        assert sum(outcome.norms != {} for outcome in after.outcomes) == applied
        assert all(finite(outcome.norms) for outcome in after.outcomes) and finite(after.metrics)
        assert after.rates["lr"] == pytest.approx(0.01 * COSINE.at(applied, 10))


@pytest.mark.parametrize(
    ("enabled", "dynamic", "scaler", "expected"),
    [(True, True, None, True), (True, False, None, False), (False, True, None, False), (False, True, object(), True)],
)
def test_only_a_loss_scale_that_moves_is_sought(enabled: bool, dynamic: bool, scaler: Any, expected: bool) -> None:
    ds = SimpleNamespace(
        fp16_enabled=lambda: enabled, dynamic_loss_scale=lambda: dynamic, torch_autocast_z0_gradscaler=scaler
    )
    assert ds_engine.seeks_loss_scale(ds) == expected


# What a message says


def test_the_reason_names_ranks_losses_and_a_few_samples() -> None:
    found = [[(0.5, [1, 2])], [(math.nan, [3]), (math.inf, [7, 8, 9, 10, 11])]]
    assert (
        window.described(found, "s{}".format) == "loss nan on rank 1 (s3), loss inf on rank 1 (s7, s8, s9 and 2 more)"
    )
    many = window.described([[(math.nan, [rank])] for rank in range(64)], "s{}".format)
    assert many == "loss nan on rank 0 (s0), loss nan on rank 1 (s1), loss nan on rank 2 (s2) and 61 more"
    assert window.described([[(0.5, [1])], [(0.5, [2])]], "s{}".format) == (
        "every loss is finite, but the gradient is not (s1, s2)"
    )


def test_the_loader_says_which_samples_a_window_holds() -> None:
    rows = SpoiltRows(48, [])
    for rank in range(2):
        loader = Loader(rows, 4, 3, RankContext(rank=rank, world_size=2), seed=5)
        for end, micro_batches in zip(loader.ends(1), loader.windows(1), strict=True):
            found = [rows[samples]["x"] for samples in loader.samples(1, end - 24, end)]
            assert all(torch.equal(x, b["x"]) for x, b in zip(found, micro_batches, strict=True)) and len(found) == 3
    assert loader.name(7) == "row7"
    del rows.identifiers
    assert loader.name(7) == "sample 7"


# Whole runs


def spoilt_run(folder: Path, name: str, spoilt: list[int], **changes: Any) -> Any:
    """2 x 2 epochs of 2 steps of 24 rows."""
    run = toy_run(folder, name, **changes)
    toy = {field.name: getattr(run.engine, field.name) for field in dataclasses.fields(Toy)}
    return dataclasses.replace(run, engine=Spoilt(**toy, spoilt=spoilt))


def train_lines(run: Any) -> list[dict[str, Any]]:
    return [record for record in runs.metrics(run) if record["split"] == "train"]


def logged(here: RankContext, run: Any) -> list[str]:
    """The warnings of a run."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("gdyn").addHandler(handler)
    runs.run(here, run)
    return [record.getMessage() for record in records]


def meets(run: Any, row: int) -> tuple[list[int], list[int]]:
    """(steps from 1, ranks on which) a row is met."""
    ranks, steps = [], []
    for rank in range(2):
        loader = Loader(SpoiltRows(48, []), 12, 1, RankContext(rank=rank, world_size=2), seed=run.seed)
        for epoch in range(4):
            for i, end in enumerate(loader.ends(epoch)):
                if row in loader.samples(epoch, end - 24, end)[0]:
                    ranks.append(rank)
                    steps.append(2 * epoch + i + 1)
    return sorted(steps), [rank for _, rank in sorted(zip(steps, ranks, strict=True))]


@pytest.mark.parametrize("stage", [0, slow(1), slow(2), slow(3)])
def test_a_run_counts_them_in_its_metrics_and_summary_and_names_them(run_ranks, tmp_path, stage: int) -> None:
    run = spoilt_run(tmp_path, "run", [17], stage=stage, split=(2, 1), divided=True)
    warnings, _ = run_ranks(2, logged, run)
    steps, ranks = meets(run, 17)
    lines = train_lines(run)
    assert [line["step"] for line in lines] == list(range(1, 9)) and len(steps) == 4
    assert [line.get("skipped_windows", 0) for line in lines] == [
        sum(step <= line["step"] for step in steps) for line in lines
    ]
    assert [line["step"] for line in lines if "loss" not in line] == steps and all(map(finite, lines))
    assert [line["counted"] for line in lines] == [step - sum(s <= step for s in steps) for step in range(1, 9)]
    assert runs.summary(run)["skipped_windows"] == 4 and runs.summary(run)["steps"] == 8
    skips = [warning for warning in warnings if warning.startswith("skipped")]
    for warning, step, rank in zip(skips, steps, ranks, strict=True):
        assert f"step {step}: loss nan on rank {rank} (row" in warning and "and 9 more)" in warning
    assert all(weight.isfinite().all() for weight in runs.weights(run).values())


@pytest.mark.parametrize(
    ("stage", "scheduler"), [(0, False), slow(0, True), slow(1, True), slow(2, False), slow(3, True)]
)
def test_a_resume_is_exact(run_ranks, tmp_path, stage: int, scheduler: bool) -> None:
    """Whether the learning rates are ours or DeepSpeed's."""
    changes: dict[str, Any] = {"stage": stage, "split": (2, 1), "logging": Logging(every_steps=3, progress="off")}
    if not scheduler:
        changes["lr_schedule"] = COSINE
    expected, run = (spoilt_run(tmp_path, name, [17], **changes) for name in ("whole", "run"))
    for each in (expected, run) if scheduler else ():
        path = Path(each.deepspeed)
        warmup = {"warmup_max_lr": "auto", "total_num_steps": "auto", "warmup_num_steps": 3}
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"scheduler": {"type": "WarmupDecayLR", "params": warmup}})
        )
    run_ranks(2, runs.run, expected)
    for stop_after in (3, 2, None):
        run_ranks(2, runs.run, run, stop_after)
    runs.assert_same(run, expected)
    assert runs.summary(run)["skipped_windows"] == 4


def test_a_checkpoint_that_knows_nothing_of_them_is_resumed(run_ranks, tmp_path) -> None:
    run = spoilt_run(tmp_path, "run", [])
    run_ranks(1, runs.run, run, 3)
    path = runs.store(run).whole()[0].path / "position.json"
    record = json.loads(path.read_text())
    assert record.pop("skipped_windows") == {"total": 0, "row": []}
    record.pop("sha256")
    path.write_text(json.dumps(record | {"sha256": _digest(record)}))
    run_ranks(1, runs.run, run)
    assert runs.step(run) == 8


@pytest.mark.parametrize("split", [(1, 2), (2, 1)])
def test_too_many_in_a_row_end_the_job_with_what_they_were(run_ranks, tmp_path, split: tuple[int, int]) -> None:
    """Also where a stop came between them. The checkpoint that was before stays."""
    run = spoilt_run(tmp_path, "run", list(range(48)), split=split, max_skipped_windows=4)
    run_ranks(split[0], runs.run, run, 3)
    before = runs.weights(run)
    with pytest.raises(RanksFailed) as failure:
        run_ranks(split[0], runs.run, run)
    messages = {str(error) for error in failure.value.errors.values()}
    assert len(failure.value.errors) == split[0] and len(messages) == 1
    assert all(isinstance(error, AgreedError) for error in failure.value.errors.values())
    message = messages.pop()
    assert "4 optimizer steps in a row were skipped" in message and "max_skipped_windows = 4" in message
    assert "phase loss, epoch 1, sample 24, step 4" in message and "learning_rate" in message
    assert all(f"step {step}: loss nan on rank 0 (row" in message for step in (1, 2, 3, 4))
    assert runs.step(run) == 3 and all(torch.equal(before[name], w) for name, w in runs.weights(run).items())


def test_they_are_only_too_many_in_a_row(run_ranks, tmp_path) -> None:
    run = spoilt_run(tmp_path, "run", [17], max_skipped_windows=3)
    steps, _ = meets(run, 17)
    assert not any({step, step + 1, step + 2} <= set(steps) for step in steps) and len(steps) == 4
    run_ranks(1, runs.run, run)
    assert runs.summary(run)["skipped_windows"] == 4


def test_the_program_ends_with_a_users_error_on_every_rank(run_ranks, tmp_path) -> None:
    run = spoilt_run(tmp_path, "run", list(range(48)), split=(2, 1), preflight="off")
    content = run.to_dict() | {
        "engine": {"class_path": "tests.spoilt.Spoilt", "init_args": dataclasses.asdict(run.engine)}
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    assert run_ranks(2, train.main, ["--config", str(path)], join=False) == [2, 2]


def test_a_validation_of_nan_is_shown_and_never_the_best(run_ranks, tmp_path) -> None:
    run = dataclasses.replace(toy_run(tmp_path, "run"), engine=NanValidation())
    run_ranks(1, runs.run, run)
    shown = [record for record in runs.metrics(run) if record["split"] == "validation"]
    assert len(shown) == 4 and all(math.isnan(record["loss"]) for record in shown)
    assert runs.store(run).best() == {} and runs.step(run) == 8


class NanValidation(Toy):
    """Toy whose rows to validate with are NaN."""

    def datasets(self) -> Any:
        return {"train": SpoiltRows(48, []), "validation": SpoiltRows(24, list(range(24)))}
