"""Kinetics against closed forms of Markov chains, deeptime, and symmetries."""

import numpy as np
import pytest
from deeptime.covariance import Covariance
from deeptime.markov.msm import MarkovStateModel, MaximumLikelihoodMSM
from scipy.linalg import block_diag

from gdyn.engines.vamp import kinetics
from gdyn.errors import UserError

TWO = np.array([[0.9, 0.1], [0.2, 0.8]])
THREE = np.array([[0.95, 0.04, 0.01], [0.02, 0.95, 0.03], [0.01, 0.09, 0.90]])


def chain(matrix: np.ndarray, frames: int, targets: int = 1, seed: int = 0) -> np.ndarray:
    """States (frames, targets) of independent realizations that start in equilibrium."""
    rng = np.random.default_rng(seed)
    cumulated = matrix.cumsum(1)
    states = np.empty((frames, targets), dtype=int)
    states[0] = rng.choice(len(matrix), targets, p=MarkovStateModel(matrix).stationary_distribution)
    for t, draws in enumerate(rng.random((frames - 1, targets, 1)), 1):
        states[t] = (draws > cumulated[states[t - 1]]).sum(1)
    return states


def hard(states: np.ndarray, k: int) -> np.ndarray:
    return np.eye(k)[states]


def soft(states: np.ndarray, k: int, seed: int = 1) -> np.ndarray:
    """Noisy probabilities, as a network gives them."""
    logits = 3 * np.eye(k)[states] + np.random.default_rng(seed).normal(size=(*states.shape, k))
    return (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).astype(np.float32)


GOLDEN = hard(np.array([0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1]), 2)


def test_golden_koopman_matrices_and_timescale():
    once, twice = kinetics.koopman(GOLDEN, 1), kinetics.koopman(GOLDEN, 2)
    np.testing.assert_allclose(once, [[2 / 3, 1 / 3], [0.4, 0.6]], atol=1e-12)
    np.testing.assert_allclose(twice, [[0.375, 0.625], [0.8, 0.2]], atol=1e-12)
    np.testing.assert_allclose(sorted(np.linalg.eigvals(once)), [0.2666667, 1], atol=1e-7)
    np.testing.assert_allclose(sorted(np.linalg.eigvals(twice)), [-0.425, 1], atol=1e-12)
    np.testing.assert_allclose(kinetics.timescales(once, 1), [0.75656], atol=1e-5)


def test_golden_two_state_chain():
    np.testing.assert_allclose(kinetics.timescales(TWO, 1), [2.80367], atol=1e-5)
    np.testing.assert_allclose(kinetics.stationary_distribution(TWO), [2 / 3, 1 / 3])
    np.testing.assert_allclose(np.linalg.matrix_power(TWO, 2), [[0.83, 0.17], [0.34, 0.66]])


def test_timescale_does_not_depend_on_the_lag_of_a_markov_chain():
    for lag in (1, 2, 5, 20):
        matrix = np.linalg.matrix_power(THREE, lag)
        np.testing.assert_allclose(kinetics.timescales(matrix, lag), MarkovStateModel(THREE).timescales())


@pytest.mark.parametrize(
    ("matrix", "reason"),
    [
        (np.eye(2), "states never exchange, eigenvalue 1"),
        ([[1.2, -0.2], [-0.1, 1.1]], "eigenvalue above 1"),
        ([[0.1, 0.9], [0.8, 0.2]], "negative eigenvalue"),
        ([[0.5, 0.5], [0.5, 0.5]], "no memory, eigenvalue 0"),
    ],
)
def test_what_is_no_decay_is_flagged_and_never_infinite_or_negative(matrix, reason):
    assert np.isnan(kinetics.timescales(np.array(matrix), 5)).all(), reason


def test_processes_without_a_decay_time_do_not_displace_those_with_one():
    frozen_and_moving = block_diag(TWO, [[0.1, 0.9], [0.8, 0.2]])
    times = kinetics.timescales(frozen_and_moving, 1)
    np.testing.assert_allclose(times, [np.nan, 2.80367, np.nan], atol=1e-5)  # never, slow, faster than the lag
    assert np.isnan(kinetics.stationary_distribution(frozen_and_moving)).all()  # not unique


@pytest.mark.parametrize("lag", [1, 7])
def test_hard_states_give_deeptimes_transition_matrix(lag):
    trajectories = [chain(THREE, 2000, seed=1), chain(THREE, 1500, seed=2)]
    model = MaximumLikelihoodMSM(reversible=False, lagtime=lag).fit_fetch([s[:, 0] for s in trajectories])
    ours = kinetics.koopman([hard(s, 3) for s in trajectories], lag)
    np.testing.assert_allclose(ours, model.transition_matrix, atol=1e-12)
    np.testing.assert_allclose(kinetics.timescales(ours, lag), model.timescales())
    np.testing.assert_allclose(kinetics.stationary_distribution(ours), model.stationary_distribution, atol=1e-10)


def test_soft_states_give_deeptimes_covariances():
    p = soft(chain(THREE, 3000), 3)[:, 0].astype(np.float64)
    both = Covariance(lagtime=4, compute_c00=True, compute_c0t=True, remove_data_mean=False).fit_fetch(p)
    np.testing.assert_allclose(kinetics.koopman(p, 4), np.linalg.solve(both.cov_00, both.cov_0t), atol=1e-9)
    np.testing.assert_allclose(kinetics.koopman(p, 4).sum(1), 1)


def test_targets_are_pooled_and_trajectories_never_joined():
    p = soft(chain(THREE, 500, targets=3), 3)
    np.testing.assert_allclose(kinetics.koopman(p, 2), kinetics.koopman([p[:, i] for i in range(3)], 2))
    rest, moving = hard(np.zeros(50, int), 2), hard(np.ones(50, int), 2)
    np.testing.assert_allclose(kinetics.koopman([rest, moving], 1), np.eye(2))  # joined, 0 would go to 1 once
    assert kinetics.transition_counts([rest, moving]).tolist() == [[49, 0], [0, 49]]


def test_renaming_states_renames_results_and_leaves_timescales():
    p, order = soft(chain(THREE, 4000, targets=2), 3), [2, 0, 1]
    before, after = kinetics.analyse(p, 3), kinetics.analyse(p[..., order], 3)
    for name in ("timescales", "implied_timescales"):
        np.testing.assert_allclose(getattr(after, name).value, getattr(before, name).value)
    for name in ("populations", "stationary", "lifetimes"):
        for was, now in zip(getattr(before, name), getattr(after, name), strict=True):
            np.testing.assert_allclose(now, was[order])
    np.testing.assert_allclose(after.koopman.value, before.koopman.value[np.ix_(order, order)])
    np.testing.assert_array_equal(after.transitions, before.transitions[np.ix_(order, order)])
    np.testing.assert_allclose(np.abs(after.eigenvectors), np.abs(before.eigenvectors[order]), atol=1e-9)


def test_a_markov_chain_is_recovered_within_its_bands():
    found = kinetics.analyse([hard(chain(THREE, 6000, 2, seed), 3) for seed in (3, 4)], lag=2)
    truth = MarkovStateModel(THREE)
    known = {
        "timescales": truth.timescales(),
        "populations": truth.stationary_distribution,
        "stationary": truth.stationary_distribution,
        "koopman": THREE @ THREE,
        "lifetimes": -2 / np.log(np.diag(THREE @ THREE)),
    }
    for name, value in known.items():
        band = getattr(found, name)
        slack = 0.5 * (band.upper - band.lower)  # twice the 95 % band: all entries together
        assert ((band.lower - slack <= value) & (value <= band.upper + slack)).all(), name
    np.testing.assert_allclose(found.dwell_times, 1 / (1 - np.diag(THREE)), rtol=0.1)
    assert found.rank == 2
    assert not found.chapman_kolmogorov.fails.any()


def test_ninety_five_percent_bands_cover_the_truth_as_often_as_they_claim():
    covered = 0
    for seed in range(60):
        band = kinetics.analyse(hard(chain(TWO, 1500, seed=seed), 2), 1, lags=[1]).timescales
        covered += bool(band.lower[0] <= 2.80367 <= band.upper[0])
    assert 51 <= covered <= 60  # 57 expected; outside this range by chance once in a hundred


def test_chapman_kolmogorov_holds_for_a_chain_and_fails_for_hidden_memory():
    """Two hidden states that look the same make the visible process remember."""
    hidden = np.array([[0.90, 0.10, 0.00], [0.10, 0.89, 0.01], [0.00, 0.004, 0.996]])
    states = chain(hidden, 20000, 2)
    whole = kinetics.analyse(hard(states, 3), 5).chapman_kolmogorov
    blurred = kinetics.analyse(hard((states > 0).astype(int), 2), 5).chapman_kolmogorov
    assert not whole.fails.any()
    assert blurred.fails.any()
    assert blurred.deviation > kinetics.CK_TOLERANCE
    np.testing.assert_array_equal(whole.predicted.value[0], np.eye(3))
    np.testing.assert_allclose(whole.predicted.value[2], whole.predicted.value[1] @ whole.predicted.value[1])


def test_an_unused_state_lowers_the_rank_and_flags_what_it_cannot_know():
    p = np.concatenate([hard(chain(TWO, 1000), 2), np.zeros((1000, 1, 1))], axis=-1)
    found = kinetics.analyse(p, 1)
    assert found.rank == 1
    np.testing.assert_allclose(found.timescales.value[0], kinetics.timescales(kinetics.koopman(p[..., :2], 1), 1)[0])
    assert np.isnan([found.timescales.value[1], found.lifetimes.value[2], found.dwell_times[2]]).all()
    np.testing.assert_allclose(found.stationary.value[2], 0, atol=1e-12)


def test_collapsed_predictions_are_flagged_not_fatal():
    found = kinetics.analyse(np.full((300, 2, 3), 1 / 3, dtype=np.float32), 2)
    assert found.rank == 0
    assert np.isnan(found.timescales.value).all()


def test_default_lags_are_log_spaced_and_contain_tau():
    lags = kinetics.default_lags(10_000, tau=7)
    assert 7 in lags
    assert lags[0] == 1
    assert lags[-1] == 1000
    assert kinetics.default_lags(20, tau=15) == [1, 2, 15]


@pytest.mark.parametrize(
    ("p", "lag", "message"),
    [
        (GOLDEN, 15, "longest has 15 frames"),
        ([GOLDEN, np.full((9, 3), 1 / 3)], 1, "shapes"),
        (np.ones((9, 1)), 1, "single state"),
        (GOLDEN * 2, 1, "no probabilities"),
        (np.where(GOLDEN > 0, np.nan, 0), 1, "no probabilities"),
    ],
)
def test_impossible_predictions_are_refused(p, lag, message):
    with pytest.raises(UserError, match=message):
        kinetics.analyse(p, lag)
