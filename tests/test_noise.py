"""Schedules against published values and their definitions; random numbers against the generator's reference, their
distributions, and what they may depend on."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from gdyn.nn.counters import bits, integers, normal, splitmix64, uniform
from gdyn.nn.noise import NoiseSchedule

TIMES = [0, 1, 250, 500, 750, 999, 1000]
GOLDEN = {
    ("polynomial_2", 1e-4): (
        [0.9999, 0.9998980004, 0.8788304688, 0.5624875, 0.1914679687, 1.039952e-4, 1.00004e-4],
        [-9.210240, -9.190440, -1.981401, -0.251264, 1.440500, 9.171062, 9.210200],
    ),
    ("polynomial_2", 1e-5): (
        [0.99999, 0.999988, 0.8788986719, 0.56249875, 0.1914124219, 1.39959e-5, 1.0004e-5],
        [-11.512915, -11.330595, -1.982042, -0.251309, 1.440859, 11.176731, 11.512516],
    ),
    ("cosine", 1e-4): (
        [0.9999587594, 0.9999126730, 0.8461701885, 0.4930651514, 0.1439986873, 2.4239e-6, 2.4e-9],
        [-10.096047, -9.345763, -1.704874, 0.027741, 1.782468, 12.930123, 19.837881],
    ),
}
"""alpha^2 and gamma, as the program of EDM computes them."""


@pytest.mark.parametrize(("kind", "precision"), GOLDEN)
def test_schedule_has_the_published_values(kind: str, precision: float) -> None:
    schedule = NoiseSchedule(kind, 1000, precision)  # type: ignore[arg-type]
    squares, gammas = GOLDEN[kind, precision]
    t = torch.tensor(TIMES)
    np.testing.assert_allclose(schedule.gamma[t], gammas, atol=6e-7)
    np.testing.assert_allclose(schedule.alpha(t).square(), squares, rtol=2e-5 if kind == "polynomial_2" else 1e-2)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, np.ones(7), rtol=1e-15)


def test_weights_and_transitions_have_the_published_values() -> None:
    schedule = NoiseSchedule()
    t = torch.tensor([1, 10, 100, 500, 900, 999, 1000])
    weights = [0.019998, 0.145061, 0.020509, 0.006113, 0.0197, 0.115111, 0.039915]
    np.testing.assert_allclose(schedule.snr_weight(t - 1, t), weights, atol=6e-7)
    t = torch.tensor([1000, 500, 1])
    np.testing.assert_allclose(schedule.sigma2_given(t - 1, t), [0.0383787572, 0.0026582154, 1.99980e-6], rtol=1e-6)


def test_two_steps_of_noise_are_one() -> None:
    schedule = NoiseSchedule("cosine")
    r, s, t = torch.tensor([0]), torch.tensor([300]), torch.tensor([700])
    product = schedule.alpha_given(r, s) * schedule.alpha_given(s, t)
    torch.testing.assert_close(product, schedule.alpha(t) / schedule.alpha(r))
    variance = schedule.sigma2_given(s, t) + schedule.alpha_given(s, t) ** 2 * schedule.sigma(s) ** 2
    torch.testing.assert_close(variance, schedule.sigma(t) ** 2)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_table_survives_a_cast_of_the_model(cast: str) -> None:
    model = torch.nn.Sequential(NoiseSchedule(), torch.nn.Linear(1, 1))
    getattr(model, cast)()
    torch.testing.assert_close(model[0].gamma, NoiseSchedule().gamma, rtol=0, atol=0)
    assert model[0].gamma.dtype == torch.float64
    assert "0.gamma" not in model.state_dict()


def test_generator_is_splitmix64() -> None:
    # The first outputs for seed 1234567 of the reference program, https://prng.di.unimi.it/splitmix64.c
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    seed, increment = 1234567, 0x9E3779B97F4A7C15
    states = [(seed + k * increment + 2**63) % 2**64 - 2**63 for k in range(4)]
    assert [value % 2**64 for value in splitmix64(torch.tensor(states)).tolist()] == expected


KEYS = torch.tensor([3, -(2**62), 2**63 - 1, 0])


def test_numbers_are_the_samples_own() -> None:
    """Whatever the batch's order and padding, and whoever else is in it."""
    whole = normal(KEYS, 5, 1, (9, 3))
    shuffle = torch.tensor([2, 0, 3, 1])
    assert torch.equal(normal(KEYS[shuffle], 5, 1, (9, 3)), whole[shuffle])
    assert torch.equal(normal(KEYS[1:2], 5, 1, (4, 3)), whole[1:2, :4])
    steps = torch.tensor([5, 6, 7, 8])
    assert torch.equal(normal(KEYS, steps, 1, (9, 3))[2], normal(KEYS, 7, 1, (9, 3))[2])


def test_every_word_of_the_question_changes_all_numbers() -> None:
    answers = [bits(torch.tensor([k]), s, c, (1000,)) for k in (0, 1) for s in (0, 1, 2) for c in (0, 1)]
    assert len(torch.cat(answers, 1).unique()) == 12 * 1000


def test_numbers_are_distributed_as_they_say() -> None:
    keys = torch.arange(50)
    normals = normal(keys, 0, 0, (400, 3)).double()
    assert normals.isfinite().all()
    assert stats.kstest(normals.flatten().numpy(), "norm").pvalue > 1e-3
    n = normals.numel()
    for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert float((normals**power).mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / n))
    uniforms = uniform(keys, 0, 1, (400,))
    assert uniforms.min() >= 0 and uniforms.max() < 1
    assert stats.kstest(uniforms.flatten().numpy(), "uniform").pvalue > 1e-3
    times = integers(keys, 0, 2, 10, (2000,)).flatten().numpy()
    counts = np.bincount(times)
    assert len(counts) == 11
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("neighbour", ["key", "step", "stream", "element"])
def test_neighbouring_numbers_are_not_correlated(neighbour: str) -> None:
    many = torch.arange(40000)
    if neighbour == "key":
        values = normal(many, 0, 0)
    elif neighbour == "step":
        values = normal(torch.zeros_like(many), many, 0)
    elif neighbour == "stream":
        values = torch.cat([normal(torch.tensor([7]), 0, int(c)) for c in many[:4000]])
    else:
        values = normal(torch.tensor([7]), 0, 0, (40000,))[0]
    for lag in (1, 2, 3):
        correlation = float((values[lag:] * values[:-lag]).mean())
        assert abs(correlation) < 4 / math.sqrt(len(values))
