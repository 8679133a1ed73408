"""Schedules of numbers against reference values, at their ends, and beyond them."""

import math

import pytest

from gdyn.errors import UserError
from gdyn.schedules import Schedule, final, value

# Reference numbers: the commitment cost of foldtree2, 0.1 to 0.9 within 5000 steps.
COSINE = {0: 0.1, 1250: 0.217157, 2500: 0.5, 3750: 0.782843, 5000: 0.9}
RESTARTS = {0: 0.1, 250: 0.217157, 500: 0.5, 999: 0.899998, 1000: 0.1}
LINEAR = {0: 0.1, 1250: 0.3, 5000: 0.9}


@pytest.mark.parametrize(
    ("shape", "expected"), [("cosine", COSINE), ("cosine_with_restarts", RESTARTS), ("linear", LINEAR)]
)
def test_reference_numbers(shape, expected):
    schedule = Schedule(0.1, 0.9, 5000, shape)
    assert {step: schedule.at(step) for step in expected} == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("shape", ["linear", "cosine", "cosine_with_restarts"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 12, 5000])
def test_a_schedule_starts_at_start_and_ends_at_end_and_never_leaves_what_lies_between(shape, steps):
    schedule = Schedule(0.9, 0.1, steps, shape)
    values = [schedule.at(step) for step in range(steps)]
    assert values[0] == 0.9
    assert all(0.1 <= found <= 0.9 for found in values)
    assert [schedule.at(step) for step in (steps, steps + 1, 10 * steps)] == [0.1] * 3


def test_five_ramps_each_start_again():
    values = [Schedule(0, 1, 50, "cosine_with_restarts").at(step) for step in range(50)]
    assert values[:10] == values[10:20] == values[40:]
    assert values[:10] == sorted(values[:10])


def test_a_number_is_a_schedule_that_never_changes():
    assert (value(0.25, 7), final(0.25)) == (0.25, 0.25)
    assert (value(Schedule(0, 1, 4, "linear"), 1), final(Schedule(0, 1, 4))) == (0.25, 1)


def test_steps_below_one_and_numbers_that_are_none_are_refused():
    with pytest.raises(UserError, match="steps = 0"):
        Schedule(0, 1, 0)
    with pytest.raises(UserError, match="finite"):
        Schedule(0, math.nan, 10)
