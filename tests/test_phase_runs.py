"""What phases do in a run: ending early, leaving their best weights, and being scored as the engine wants."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gdyn.config import Checkpointing, Logging
from gdyn.errors import UserError
from gdyn.evaluation import evaluate_alone
from gdyn.phases import Phase
from gdyn.rundir import RunDir
from tests import runs
from tests.harness import RanksFailed
from tests.runs import as_new
from tests.toy import Network, Rows, Toy, toy_run

STAGED = [
    Phase("loss", 5, "one", patience=2, restore_best=True),
    Phase("loss", 4, "two", patience=2, restore_best=True),
    Phase("loss", 2, "three"),
]
"""With `uphill` the first epoch of each phase is its best, and the run's best is that of the first phase."""


def validated(config):
    """(phase, epoch over the whole run) of every epoch that was trained."""
    return [(line["phase"], line["epoch"]) for line in runs.metrics(config) if line["split"] == "validation"]


def staged(folder, name, **changes):
    given = {"phases": STAGED, "checkpointing": Checkpointing(keep=1, every_epochs=10)}
    return toy_run(folder, name, stage=1, uphill=True, **given | changes)


@pytest.mark.parametrize("ranks", [1, 2])
def test_phases_end_early_and_leave_their_best_weights_bit_for_bit_wherever_the_run_is_resumed(
    run_ranks, tmp_path, ranks
) -> None:
    expected = staged(tmp_path, "whole", split=(ranks, 1))
    run_ranks(ranks, runs.run, expected)
    # Each counts since it began, and those that follow have the numbers of the plan.
    assert validated(expected) == [
        *(("one", 0), ("one", 1), ("one", 2)),
        *(("two", 5), ("two", 6), ("two", 7)),
        *(("three", 9), ("three", 10)),
    ]
    run = staged(tmp_path, "run", split=(ranks, 1))
    # In the middle of an epoch, at the end of the first phase, in the second, at its end; steps of each start.
    for stop_after, between_epochs, reached in ((3, False, 3), (3, True, 6), (3, False, 9), (3, True, 12)):
        run_ranks(ranks, runs.run, run, stop_after, between_epochs)
        assert runs.step(run) == reached
    run_ranks(ranks, runs.run, run)
    runs.assert_same(run, expected)


def test_the_next_phase_goes_on_from_the_best_epoch_with_a_new_optimizer(run_ranks, tmp_path) -> None:
    """One window an epoch is all samples, so that a run of its own from the best weights must come to the same."""
    changes = {"samples": 24, "checkpointing": Checkpointing(keep=20)}
    run = staged(tmp_path, "run", **changes | {"phases": [STAGED[0], Phase("loss", 2, "next")]})
    run_ranks(1, runs.run, run)
    checkpoints = RunDir(Path(run.run_dir)).checkpoints
    names = ("p0-one-e0001", "p1-next-e0000")
    best, last = (checkpoints / name / "weights.safetensors" for name in names)
    one, other = load_file(best), load_file(last)
    assert not torch.equal(one["head.weight"], other["head.weight"])
    alone = staged(tmp_path, "alone", **changes | {"phases": [Phase("loss", 2, "next")], "init_from": str(best)})
    run_ranks(1, runs.run, alone)
    found, expected = runs.weights(run), runs.weights(alone)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_best_checkpoint_that_is_gone_or_damaged_is_said(run_ranks, tmp_path) -> None:
    run = staged(tmp_path, "run")
    run_ranks(1, runs.run, run, 6, True)
    best = RunDir(Path(run.run_dir)).checkpoints / "p0-one-e0001"
    (best / "weights.safetensors").write_bytes(b"")
    with pytest.raises(
        RanksFailed, match=r"p0-one-e0001, the best of phase one, is damaged: weights.safetensors has 0"
    ):
        run_ranks(1, runs.run, run)
    (best / "position.json").unlink()
    with pytest.raises(RanksFailed, match="p0-one-e0001 is not a whole checkpoint") as failure:
        run_ranks(1, runs.run, run)
    assert isinstance(failure.value.errors[0], UserError)


def test_more_phases_after_one_that_restores_begin_from_its_best(run_ranks, tmp_path) -> None:
    expected = staged(tmp_path, "whole")
    run_ranks(1, runs.run, expected)
    short = as_new(expected, tmp_path, phases=STAGED[:2])
    run_ranks(1, runs.run, short)
    run_ranks(1, runs.run, as_new(expected, tmp_path))
    runs.assert_same(short, expected)


# What is printed and drawn


def logged(here, config, path):
    """`runs.run`, with what it logs in a file."""
    handler = logging.FileHandler(path)
    logging.getLogger("gdyn").addHandler(handler)
    logging.getLogger("gdyn").setLevel(logging.INFO)
    runs.run(here, config)


@pytest.mark.parametrize("style", ["lines", "table", "gdynet"])
def test_console_and_loss_curves_tell_of_each_phase(run_ranks, tmp_path, style) -> None:
    run = staged(tmp_path, style, logging=Logging(every_steps=1, progress="off", style=style))
    run_ranks(1, logged, run, tmp_path / "log")
    text = (tmp_path / "log").read_text()
    if style == "lines":
        epochs = re.findall(r"^Epoch (\d+): Train Loss = (\d+\.\d{4}), Test Loss = (\d+\.\d{4})$", text, re.MULTILINE)
        assert [int(epoch) for epoch, *_ in epochs] == [1, 2, 3, 1, 2, 3, 1, 2]
        lines = [line for line in runs.metrics(run) if line["split"] == "validation"]
        assert [float(loss) for *_, loss in epochs] == [round(line["loss"], 4) for line in lines]
        assert text.count("Early stopping at epoch 3\n") == 2
        assert text.count("Saved best loss weights: p0-one-e0001\n") == text.count("Saved best") == 1
        assert text.index("phase one: objective loss") < text.index("Epoch 1:")
    else:
        assert "early stopping of phase two at epoch 3: no better loss for 2 epochs." in text
    assert "restoring the best weights of phase two: epoch 1, loss" in text
    pictures = sorted(path.name for path in RunDir(Path(run.run_dir)).losses.iterdir())
    assert pictures == ["one.png", "three.png", "two.png"]


def test_a_run_that_stops_within_its_first_epoch_has_nothing_to_draw(run_ranks, tmp_path) -> None:
    run = staged(tmp_path, "run")
    run_ranks(1, runs.run, run, 1)
    assert not RunDir(Path(run.run_dir)).losses.exists()
    run_ranks(1, runs.run, run, 3)
    assert [path.name for path in RunDir(Path(run.run_dir)).losses.iterdir()] == ["one.png"]


# How it is scored


@dataclass(frozen=True)
class Silenced(Toy):
    """Scored with all weights zero, whose output is zero."""

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        with torch.no_grad():
            kept = [parameter.clone() for parameter in model.parameters()]
            for parameter in model.parameters():
                parameter.zero_()
            yield
            for parameter, value in zip(model.parameters(), kept, strict=True):
                parameter.copy_(value)


def test_every_evaluation_is_as_the_engine_wants_and_training_does_not_notice(run_ranks, tmp_path) -> None:
    plain, run = toy_run(tmp_path, "plain"), toy_run(tmp_path, "run")
    run = as_new(run, tmp_path, engine=Silenced())
    for each in (plain, run):
        run_ranks(1, runs.run, each)
    squares = Rows(24, 1).rows.double().square().sum(1).mean()
    scores = [line["loss"] for line in runs.metrics(run) if line["split"] == "validation"]
    scores += [runs.summary(run)["validation"]["loss"]]
    scores += [evaluate_alone(Silenced(), Network().eval(), Rows(24, 1), Phase("loss", 1))["loss"]]
    assert scores == pytest.approx([float(squares)] * 6, rel=1e-6)
    one, other = runs.weights(plain), runs.weights(run)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
