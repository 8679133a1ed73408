"""What is next? Pure arithmetic."""

import dataclasses
import math
import subprocess
import sys

import pytest

from gdyn.errors import UserError
from gdyn.phases import Phase, Plan, Position, covered, improves

SCHEDULE = Plan((Phase("vamp2", 30), Phase("vamp1", 30), Phase("vamp2", 30)))


START = Position()


def walk(plan, position=START, windows=2, size=8):
    """Every position a run passes through, ends of epochs included."""
    while not plan.done(position):
        yield position
        for _ in range(position.sample // size, windows):
            position = plan.after_window(position, size)
            yield position
        position = plan.after_epoch(position)
    yield position


def record(plan):
    """The phases as a checkpoint's JSON holds them."""
    return [dataclasses.asdict(phase) | {"trains": list(phase.trains)} for phase in plan.phases]


def test_45_epochs_done_of_30_epoch_phases_means_phase_1_epoch_15_is_next():
    position = Position()
    for _ in range(45):
        position = SCHEDULE.after_epoch(position)
    assert (position.phase, position.epoch) == (1, 15)
    assert SCHEDULE.global_epoch(position) == 45
    assert SCHEDULE.phase(position).objective == "vamp1"


def test_after_the_last_epoch_the_plan_is_done():
    last = Position(phase=2, epoch=29)
    assert not SCHEDULE.done(last)
    assert SCHEDULE.done(SCHEDULE.after_epoch(last))
    assert SCHEDULE.global_epoch(SCHEDULE.after_epoch(last)) == SCHEDULE.epochs == 90


def test_patience_ends_a_phase_early_and_the_next_ones_keep_their_numbers():
    plan = Plan((Phase("a", 30, patience=3), Phase("b", 10)))
    position = Position(0, 11, sample=64, step=96)
    assert plan.after_epoch(position, 2) == Position(0, 12, step=96)
    assert plan.after_epoch(position, 3) == Position(1, 0, step=96)
    assert plan.global_epoch(Position(1, 0)) == 30 and plan.tag(Position(1, 0)) == "p1-b-e0000"
    assert Plan((Phase("a", 30),)).after_epoch(position, 99) == Position(0, 12, step=96)  # without patience


@pytest.mark.parametrize(
    ("score", "best", "higher", "better"),
    [
        *((1.0, None, True, True), (2.0, 1.0, True, True), (1.0, 1.0, True, False), (0.5, 1.0, True, False)),
        *((0.5, 1.0, False, True), (1.0, 1.0, False, False), (2.0, 1.0, False, False)),
        *((math.nan, None, False, False), (math.nan, 1.0, True, False), (math.inf, 1.0, True, False)),
    ],
)
def test_a_score_improves_on_the_best_by_its_direction_if_it_is_a_number(score, best, higher, better):
    assert improves(score, best, higher) is better


@pytest.mark.parametrize(
    ("glob", "globs", "expected"),
    [
        ("vae.*", ["*"], True),
        ("vae.*", ["denoiser.*", "vae.*"], True),
        ("vae.*", ["*vae*"], True),
        ("vae.encoder.*", ["vae.*"], True),
        ("vae.*", ["vae.encoder.*"], False),
        ("vae.*", ["ligand_vae.*"], False),
        ("vae.*", [], False),
    ],
)
def test_a_glob_is_covered_by_one_that_matches_all_it_does(glob, globs, expected):
    assert covered(glob, globs) is expected


def test_steps_count_over_all_phases_and_samples_within_the_epoch():
    plan = Plan((Phase("a", 2), Phase("b", 1)))
    *_, end = walk(plan, windows=5)
    assert (end.step, end.sample) == (15, 0)


def test_continuing_from_any_position_passes_through_the_same_positions():
    plan = Plan((Phase("a", 2), Phase("b", 1), Phase("a", 1)))
    whole = list(walk(plan))
    for i, position in enumerate(whole):
        rest = list(walk(plan, position))
        assert (
            whole[i:] == rest or whole[i + 1 :] == rest
        )  # the end of an epoch's windows is followed by the next epoch


def test_positions_of_one_run_have_different_tags_that_sort_by_age():
    plan = Plan((Phase("vamp2", 2), Phase("vamp1", 1, name="fine")))
    positions = list(walk(plan))
    tags = [plan.tag(position) for position in positions]
    assert len(set(tags)) == len(tags)
    assert positions == sorted(positions)
    assert tags[0] == "p0-vamp2-e0000" and tags[1] == "p0-vamp2-e0000-s00000001"
    assert plan.tag(Position(1, 0)) == "p1-fine-e0000" and tags[-1].startswith("p2-done")


def test_appended_phases_and_a_changed_future_are_welcome():
    before = record(SCHEDULE)
    longer = Plan((*SCHEDULE.phases, Phase("vamp_sym", 5)))
    assert "extended from 3 to 4" in longer.check_past(before, Position(3, 0))
    future = Plan((*SCHEDULE.phases[:2], Phase("vampe", 7)))
    assert future.check_past(before, Position(1, 15)) == ""
    assert SCHEDULE.check_past(before, Position(1, 15)) == ""


@pytest.mark.parametrize(
    "phases",
    [
        (Phase("vamp1", 30), *SCHEDULE.phases[1:]),
        (Phase("vamp2", 20), *SCHEDULE.phases[1:]),
        (Phase("vamp2", 30, trains=("lobe_0.*",)), *SCHEDULE.phases[1:]),
        SCHEDULE.phases[:1],
    ],
    ids=["objective", "epochs", "trains", "removed"],
)
def test_a_changed_past_is_refused_with_both_versions_unless_asked_for(phases):
    changed, position = Plan(phases), Position(1, 15)
    with pytest.raises(UserError, match=r"loss schedule mismatch.*'epochs': 30.*now says.*--allow_schedule_change"):
        changed.check_past(record(SCHEDULE), position)
    assert "differs" in changed.check_past(record(SCHEDULE), position, allow_change=True)


def test_records_from_before_a_field_existed_have_its_default():
    old = [{"objective": phase.objective, "epochs": 30, "name": "", "trains": ["*"]} for phase in SCHEDULE.phases]
    assert SCHEDULE.check_past(old, Position(1, 15)) == ""
    patient = Plan((dataclasses.replace(SCHEDULE.phases[0], patience=5), *SCHEDULE.phases[1:]))
    with pytest.raises(UserError, match=r"'patience': None.*now says.*'patience': 5"):
        patient.check_past(old, Position(1, 15))


def test_a_phase_not_yet_begun_is_no_past():
    changed = Plan((SCHEDULE.phases[0], Phase("vampe", 3)))
    assert changed.check_past(record(SCHEDULE), Position(1, 0)) == ""
    with pytest.raises(UserError, match="mismatch"):
        changed.check_past(record(SCHEDULE), Position(1, 0, sample=8))


def test_impossible_plans_are_refused():
    for phases, message in [
        ((), "no phases"),
        ((Phase("a", 1), Phase("b", 0)), r"phases\[1\].epochs = 0"),
        ((Phase("a", 1, trains=()),), r"phases\[0\].trains is empty"),
        ((Phase("a", 1, patience=0),), r"phases\[0\].patience = 0; 1 or more"),
    ]:
        with pytest.raises(UserError, match=message):
            Plan(phases)


def test_phases_are_pure():
    code = "import sys, gdyn.phases; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'deepspeed')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
