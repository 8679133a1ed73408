"""Loss curves: which numbers of metrics.jsonl, and a picture that can be opened."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from gdyn import loss_curves
from gdyn.loss_curves import Curves, collect, draw
from gdyn.phases import Phase, Plan
from gdyn.rundir import RunDir

PLAN = Plan((Phase("vae", 5), Phase("score", 3, "denoiser"), Phase("vae", 2), Phase("score", 9, "never")))
"""The first phase ends early, after 3 epochs; the last never begins."""


def line(split: str, epoch: int, loss: float, step: int = 0, **scores: float) -> dict[str, Any]:
    return {"step": step, "phase": "", "epoch": epoch, "split": split, "loss": loss, **scores}


LINES = [
    *(line("train", 0, 9.0), line("train", 0, 7.0), line("validation", 0, 6.0, vae=6.0)),
    *(line("train", 1, 5.0), line("validation", 1, 2.0, vae=2.0)),
    # An epoch shorter than the interval of the train lines has none.
    *(line("validation", 2, 3.0, vae=3.0),),
    *(line("train", 5, 0.5), line("validation", 5, -0.2, score=0.2)),
    *(line("train", 6, math.nan), line("train", 6, 0.3), line("validation", 6, -0.9, score=0.9)),
    *(line("train", 7, 0.2), line("validation", 7, math.nan, score=math.nan)),
    *(line("train", 8, 1.0), line("validation", 8, 1.0, vae=1.0)),
    line("test", 19, 0.0),
]


def curves() -> list[Curves]:
    return collect(LINES, PLAN, lambda objective: objective == "score")


def test_epochs_count_within_their_phase_and_train_losses_are_means_of_them() -> None:
    vae, denoiser, again = curves()
    assert vae.train == [(1, 8.0), (2, 5.0)] and vae.validation == [(1, 6.0), (2, 2.0), (3, 3.0)]
    assert denoiser.train == [(1, 0.5), (2, 0.3), (3, 0.2)] and denoiser.validation == [(1, -0.2), (2, -0.9)]
    assert again.train == again.validation == [(1, 1.0)]


def test_the_best_epoch_is_by_the_score_of_the_objective() -> None:
    assert [each.best for each in curves()] == [2, 2, 1]
    assert [each.best for each in collect(LINES, PLAN, lambda objective: True)] == [1, 2, 1]


def test_a_label_that_comes_again_gets_its_phase() -> None:
    assert [each.name for each in curves()] == ["vae", "denoiser", "p2-vae"]


@pytest.mark.parametrize(("low", "logarithmic"), [(1.0, False), (0.11, True), (0.0, False), (-5.0, False)])
def test_losses_over_more_than_a_decade_are_drawn_on_a_logarithmic_axis(low: float, logarithmic: bool) -> None:
    figure = draw(Curves("a", [(1, 2.0)], [(1, 2.0), (2, low)], 2))
    assert figure.axes[0].get_yscale() == ("log" if logarithmic else "linear")


def test_the_picture_shows_both_curves_and_marks_the_best() -> None:
    axes = draw(curves()[0]).axes[0]
    drawn = {curve.get_label(): list(zip(*curve.get_data(), strict=True)) for curve in axes.lines}
    assert drawn == {
        "train": [(1, 8.0), (2, 5.0)],
        "validation": [(1, 6.0), (2, 2.0), (3, 3.0)],
        "best: epoch 2, 2": [(2, 2.0)],
    }
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("phase vae", "epoch", "loss")


def test_one_readable_picture_a_phase_and_none_where_there_is_nothing_to_draw(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    loss_curves.write(run_dir, PLAN, lambda objective: False)
    run_dir.metrics_jsonl.write_text(json.dumps(line("train", 0, 1.0)) + "\n")
    loss_curves.write(run_dir, PLAN, lambda objective: False)
    assert not run_dir.losses.exists()
    run_dir.metrics_jsonl.write_text("".join(json.dumps(each) + "\n" for each in LINES))
    loss_curves.write(run_dir, PLAN, lambda objective: False)
    assert sorted(path.name for path in run_dir.losses.iterdir()) == ["denoiser.png", "p2-vae.png", "vae.png"]
    for path in run_dir.losses.iterdir():
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[0] > 300 and pixels.shape[1] > 500 and pixels.std() > 0.01
