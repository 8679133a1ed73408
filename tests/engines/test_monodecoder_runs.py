"""What a run file may say of the monodecoder, and short runs with it: schedules, gauges, Muon, precision, limits."""

import dataclasses
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gdyn import config
from gdyn.config import Optimization, RunConfig, parse
from gdyn.engines.monodecoder.engine import Monodecoder, Weights
from gdyn.errors import UserError
from gdyn.phases import Phase
from gdyn.ranks import RankContext
from gdyn.recipes import bundled
from gdyn.schedules import Schedule
from tests import runs

COSINE = {"shape": "cosine", "start": 0.1, "end": 0.9, "steps": 20}
LINEAR = {"shape": "linear", "start": 1, "end": 0.25, "steps": 5}


def write(folder: Path, **engine: Any) -> list[str]:
    """A run file with these keys; returns the command line."""
    init_args = {"train": ["a.h5"], "features": 26} | engine
    content = {"engine": {"class_path": "Monodecoder", "init_args": init_args}, "deepspeed": "fp32_zero1"}
    content |= {"run_dir": "run", "loss_schedule": ["loss"], "epochs": 1}
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return ["--config", str(folder / "run.yaml")]


def engine_of(argv: list[str]) -> Monodecoder:
    engine = parse(argv).config.engine
    assert isinstance(engine, Monodecoder)
    return engine


# The run file


def test_numbers_may_be_schedules(tmp_path) -> None:
    engine = engine_of(write(tmp_path, commitment=COSINE, weights={"edge": LINEAR, "ss": 0.5}))
    assert engine.commitment == Schedule(0.1, 0.9, 20, "cosine")
    assert engine.weights == Weights(edge=Schedule(1, 0.25, 5, "linear"), ss=0.5)


def test_the_command_line_overrides_a_number_a_schedule_and_one_key_of_a_schedule(tmp_path) -> None:
    argv = write(tmp_path, commitment=COSINE, weights={"edge": LINEAR, "ss": 0.5})
    engine = engine_of([*argv, "--engine.commitment", "0.5", "--engine.weights.edge", "0.1"])
    assert (engine.commitment, engine.weights) == (0.5, Weights(edge=0.1, ss=0.5))
    engine = engine_of([*argv, "--engine.commitment.steps", "9", "--engine.weights.edge.end=0.5"])
    assert engine.commitment == Schedule(0.1, 0.9, 9)
    assert engine.weights == Weights(edge=Schedule(1, 0.5, 5, "linear"), ss=0.5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"commitment": COSINE, "weights": {"edge": LINEAR, "foldx": 0}},
        {"hidden": [16, 8], "links": ["contactPoints", "backbone"], "max_residues": 900, "ema": False},
    ],
)
def test_the_runs_own_copy_is_the_same_run(tmp_path, changes) -> None:
    found = parse(write(tmp_path, **changes)).config
    (tmp_path / "copy.yaml").write_text(found.to_yaml())
    assert config.load(tmp_path / "copy.yaml") == found


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "steps 0": ({"commitment": COSINE | {"steps": 0}}, r"engine\.commitment\.steps: .* 0 does not"),
    "steps a fraction": ({"weights": {"aa": COSINE | {"steps": 2.5}}}, r"engine\.weights\.aa\.steps: .* 2\.5"),
    "shape misspelt": ({"weights": {"edge": COSINE | {"shape": "cosin"}}}, r"engine\.weights\.edge\.shape: .*cosin$"),
    "start negative": ({"commitment": COSINE | {"start": -1}}, r"engine\.commitment\.start: .* -1 does not"),
    "end absent": ({"commitment": {"start": 0.1, "steps": 3}}, r"engine\.commitment: .*required: end"),
    "key unknown": ({"commitment": COSINE | {"stop": 3}}, r'engine\.commitment: .*stop.* Did you mean "steps"'),
    "weight negative": ({"weights": {"edge": -0.1}}, r"engine\.weights\.edge: .* Found: -0\.1"),
    "weight a word": ({"weights": {"edge": "much"}}, r"engine\.weights\.edge: .*float.* Found: much"),
    "weight unknown": ({"weights": {"egde": 0.1}}, r'engine: .*egde.* Did you mean "edge"'),
    "no code": ({"codes": 0}, r"engine\.codes: .* 0 does not"),
    "no width": ({"hidden": [16, 0]}, r"engine\.hidden: .* 0 does not"),
    "encoder unknown": ({"encoder": "mk2"}, r"engine\.encoder: .*mk1_muon.*mk2"),
    "threshold in percent": ({"plddt_threshold": 30}, r"engine\.plddt_threshold: .* 30 does not"),
    "dropout above 1": ({"dropout": 1.5}, r"engine\.dropout: .* 1\.5 does not"),
}


@pytest.mark.parametrize(("changes", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_said_with_its_key(tmp_path, changes, said) -> None:
    with pytest.raises(UserError, match=said.replace("$", "")) as failure:
        parse(write(tmp_path, **changes))
    assert "Namespace" not in str(failure.value) and "typing" not in str(failure.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codes": 1}, r"engine\.codes = 1; .*at least 2"),
        ({"hidden": [16]}, r"engine\.hidden = \[16\]; at least 2"),
        ({"features": None}, r"engine\.features is not known"),
    ],
)
def test_what_no_network_can_be_made_of_is_said_with_its_key(tmp_path, changes, said) -> None:
    with pytest.raises(UserError, match=said):
        engine_of(write(tmp_path, **changes)).model()


# Runs


def train_lines(run: RunConfig) -> list[dict[str, Any]]:
    return [line for line in runs.metrics(run) if line["split"] == "train"]


def test_gauges_follow_the_schedules_and_gradient_norms_are_told_apart(run_ranks, tmp_path) -> None:
    """A line has the values of the step that comes next."""
    engine = engine_of(write(tmp_path, commitment=COSINE, weights={"edge": LINEAR, "ss": 0.5}))
    changes = {"commitment": engine.commitment, "weights": engine.weights}
    run = runs.small_run(tmp_path, "run", engine=Monodecoder, stage=1, **changes)
    run_ranks(1, runs.run, run)
    lines = train_lines(run)
    assert [line["step"] for line in lines] == list(range(1, 10))
    for line in lines:
        step = line["step"]
        assert line["commitment"] == pytest.approx(0.1 + 0.8 * (1 - math.cos(math.pi * step / 20)) / 2)
        assert line["weight_edge"] == pytest.approx(max(0.25, 1 - 0.75 * step / 5))
        assert (line["weight_ss"], line["weight_aa"]) == (0.5, 1.0)
        assert 1 <= line["codebook_perplexity"] <= 6
        parts = math.hypot(line["grad_norm_encoder"], line["grad_norm_decoders"])
        assert min(line["grad_norm_encoder"], line["grad_norm_decoders"]) > 0
        assert line["grad_norm"] == pytest.approx(parts)
    # The loss of a step is the sum of its terms with the weights and the commitment cost before it.
    weights = [Weights(edge=Schedule(1, 0.25, 5, "linear"), ss=0.5).at(step) for step in range(9)]
    for line, weight in zip(lines, weights, strict=True):
        total = sum(weight[name] * line[name] for name in weight if name in line)
        assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_limit_windows_shortens_epochs_and_what_is_evaluated(run_ranks, tmp_path) -> None:
    run = runs.small_run(tmp_path, "run", engine=Monodecoder, limit_windows=1, split=(2, 1), max_residues=90)
    run_ranks(2, runs.run, run)
    assert [line["step"] for line in train_lines(run)] == [1, 2, 3]
    assert int(runs.weights(run)["steps_done"]) == 3


def test_overfit_windows_learns_the_same_structures_by_heart(run_ranks, tmp_path) -> None:
    changes = {"overfit_windows": 1, "phases": [Phase("loss", 25)], "codes": 20}
    changes["optimization"] = Optimization(8, 1, learning_rate=0.02)
    run = runs.small_run(tmp_path, "run", engine=Monodecoder, **changes)
    run_ranks(1, runs.run, run)
    lines = train_lines(run)
    assert [line["epoch"] for line in lines] == list(range(25))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


def test_bf16_keeps_the_moving_averages_in_full_precision(run_ranks, tmp_path) -> None:
    run = runs.small_run(tmp_path, "run", engine=Monodecoder, split=(2, 1), deepspeed=str(bundled()["bf16_zero1"]))
    run_ranks(2, runs.run, run)
    weights = runs.weights(run)
    assert weights["quantizer.sums"].dtype == weights["quantizer.counts"].dtype == torch.float32
    assert not torch.equal(weights["quantizer.sums"], weights["quantizer.sums"].bfloat16().float())
    losses = [line["loss"] for line in train_lines(run)]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


# Muon


def logged(here: RankContext, run: RunConfig) -> list[str]:
    """What the run says of its parameter groups."""
    said: list[str] = []
    logger, handler = logging.getLogger("gdyn"), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    runs.run(here, run)
    return [sentence for sentence in said if "tensors" in sentence]


def muon_run(folder: Path, recipe: str, rate: float | None, split: tuple[int, int]) -> RunConfig:
    sizes = Optimization(8 // split[0], 1, learning_rate=rate)
    changes = {"encoder": "mk1_muon", "decoders": "multi_muon", "ema": False, "optimization": sizes}
    return runs.small_run(folder, "run", engine=Monodecoder, split=split, deepspeed=str(bundled()[recipe]), **changes)


def described(run: RunConfig, kind: str) -> str:
    named = dict(run.engine.model().named_parameters())
    body = {name for name, p in named.items() if re.match(r"(encoder|decoders\.\w+)\.body\.", name) and p.ndim == 2}
    sizes = [sum(p.numel() for name, p in named.items() if (name in body) == within) for within in (True, False)]
    rest = len(named) - len(body)
    return f"body: {len(body)} {kind}, {sizes[0]:,} parameters; rest: {rest} tensors, {sizes[1]:,} parameters."


def test_muon_trains_the_bodies_on_two_ranks(run_ranks, tmp_path) -> None:
    run = muon_run(tmp_path, "fp32_zero1_muon", None, (2, 1))
    assert run_ranks(2, logged, run) == [[described(run, "matrices with Muon")]] * 2
    lines = train_lines(run)
    assert {(line["lr"], line["lr_rest"]) for line in lines} == {(0.02, 3e-4)}
    assert lines[-1]["loss"] < lines[0]["loss"]
    before, after = first_weights(run), runs.weights(run)
    for name, start in before.items():  # an orthogonalised step has a size of its own; AdamW's is a thirtieth of it
        moved = float((after[name] - start).square().mean().sqrt())
        muon = re.match(r"(encoder|decoders\.\w+)\.body\.", name) and start.ndim == 2
        assert (moved > 0.01) == bool(muon), f"{name} {moved}"


def first_weights(run: RunConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(run.seed)
    return {name: p.detach().clone() for name, p in run.engine.model().named_parameters()}


def test_with_adamw_the_bodies_are_a_group_like_any_other(run_ranks, tmp_path) -> None:
    run = muon_run(tmp_path, "fp32_zero1", 0.005, (1, 1))
    assert run_ranks(1, logged, run) == [[described(run, "tensors")]]
    plain = dataclasses.replace(run, engine=dataclasses.replace(run.engine, encoder="mk1", decoders="multi"))
    plain = dataclasses.replace(plain, run_dir=str(tmp_path / "plain"))
    assert run_ranks(1, logged, plain) == [[]]
    losses = [[line["loss"] for line in train_lines(one)] for one in (run, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # gradients are summed in another order
