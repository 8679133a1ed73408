"""Kinetics of predicted states: Koopman matrices, implied timescales, Chapman-Kolmogorov test, populations, lifetimes.

NumPy in float64, pure functions; times are in frames, whoever knows the frame spacing multiplies. Predictions `p` are
one array per trajectory, (T, n, k) or (T, k): T frames, n targets, k states, rows that sum to one. The targets of a
trajectory are pooled; no frame is ever paired with one of another trajectory.

Confidence bands are those of a block bootstrap. All that is estimated here depends on sums over pairs of frames, so
trajectories are cut into consecutive blocks of time (all targets together, because they may move together), each block
keeps its own sums, and the blocks are drawn anew with replacement. A draw means the same blocks at every lag, so that
differences between lags have bands, too. Bands are honest where a block outlasts the slowest process.

Legend: s draws, the first of which is the data themselves; b blocks; l lags; m multiples of a lag.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gdyn.errors import UserError

Array = NDArray[np.float64]
Predictions = Sequence[np.ndarray] | np.ndarray

MAX_BLOCKS, MIN_BLOCKS, DRAWS, SEED = 40, 10, 400, 0
CONFIDENCE = 0.95
RANK_THRESHOLD = 1e-10
"""Eigenvalues of C0 below this share of the largest are dropped: directions in which the predictions never vary."""
RESOLUTION = 1e-9
"""Eigenvalues this near to 0 or 1 are rounding noise: no decay time can be read from them."""
CK_TOLERANCE = 0.05
"""A Chapman-Kolmogorov deviation, in probability, below which nobody worries however narrow the band."""


class Band(NamedTuple):
    """An estimate with its 95 % confidence band, arrays of one shape.

    A *time* that the data do not determine is flagged: its value is NaN. The bounds of a time may be 0 or infinite,
    which means no bound on that side.
    """

    value: Array
    lower: Array
    upper: Array


def koopman(p: Predictions, lag: int) -> Array:
    """K(lag) = C0^-1 Ct (k, k) with C0 = sum p_t' p_t, Ct = sum p_t' p_(t+lag); no mean is removed. Rows sum to one,
    except those of a state that is never occupied, which are zero.

    Raises: UserError if no trajectory is longer than the lag.
    """
    return _solve(*(sums.sum(0) for sums in _products(_Blocks(p, 1), lag)))


def timescales(koopman_matrix: Array, lag: float) -> Array:
    """Implied timescales -lag / ln |eigenvalue| of K (..., k, k), slowest first, without the constant: (..., k - 1).

    NaN flags what is no decay: eigenvalues at or beyond 1 (nothing was seen to relax), which come first, and those at
    or below 0 (noise: faster than the lag), which come last.
    """
    return _flag(_decays(koopman_matrix, lag))


def eigenvectors(koopman_matrix: Array) -> Array:
    """Right eigenvectors (k, k), the constant first, then in the order of `timescales`. Column i is a function of the
    state, scaled so that its largest entry is 1; of a complex pair, the real part."""
    values, vectors = np.linalg.eig(koopman_matrix)
    order = np.argsort(-_decay_time(values, 1), kind="stable")
    constant = np.abs(values - 1).argmin()
    vectors = vectors[:, [constant, *order[order != constant]]].real
    return vectors / vectors[np.abs(vectors).argmax(0), range(len(vectors))]


def stationary_distribution(koopman_matrix: Array) -> Array:
    """Left eigenvector of the eigenvalue 1, summing to one: (k,). NaN if states never exchange: it is not unique."""
    values, vectors = np.linalg.eig(koopman_matrix.T)
    distance = np.abs(values - 1)
    if np.sort(distance)[1] < RESOLUTION:
        return np.full(len(values), np.nan)
    vector = vectors[:, distance.argmin()].real
    return vector / vector.sum()


def transition_counts(p: Predictions) -> NDArray[np.int64]:
    """(k, k) counts from row to column between consecutive frames of a target, the most probable state counting."""
    parts = _trajectories(p)
    k = parts[0].shape[-1]
    states = [part.argmax(-1) for part in parts]
    pairs = np.concatenate([(k * at[:-1] + at[1:]).ravel() for at in states])
    return np.bincount(pairs, minlength=k * k).reshape(k, k)


def dwell_times(transitions: NDArray[np.int64]) -> Array:
    """Mean stay in the most probable state, frames: frames spent / exits, which also counts stays that the ends of the
    trajectory cut. NaN where a state is never left."""
    stays, exits = transitions.sum(1), transitions.sum(1) - np.diag(transitions)
    return np.divide(stays, exits, out=np.full(len(stays), np.nan), where=exits > 0)


def default_lags(n_frames: int, tau: int, count: int = 20) -> list[int]:
    """About `count` lags spaced evenly on a log axis from 1 to a tenth of the frames, tau among them."""
    return sorted({tau, *np.geomspace(1, max(1, n_frames // 10), count).round().astype(int).tolist()})


class ChapmanKolmogorov(NamedTuple):
    """K(lag)^m beside K(m lag)."""

    multiples: NDArray[np.int64]
    """(m,), from 0, where both are the identity."""
    predicted: Band
    """(m, k, k)"""
    estimated: Band
    """(m, k, k)"""
    fails: NDArray[np.bool_]
    """(m, k, k): they differ by more than CK_TOLERANCE, and 0 is outside the band of the difference."""

    @property
    def deviation(self) -> float:
        """Largest |predicted - estimated|, a probability."""
        return float(np.abs(self.predicted.value - self.estimated.value).max())


@dataclass(frozen=True)
class Kinetics:
    """What k states say about the dynamics. Times in frames; processes slowest first."""

    lag: int
    koopman: Band
    """(k, k)"""
    eigenvectors: Array
    """(k, k), see `eigenvectors`."""
    rank: int
    """How many independent functions the states span beside the constant: k - 1 unless some states are not used."""
    timescales: Band
    """(k - 1,) at `lag`."""
    lags: NDArray[np.int64]
    implied_timescales: Band
    """(l, k - 1)"""
    chapman_kolmogorov: ChapmanKolmogorov
    stationary: Band
    """(k,), of K(lag)."""
    populations: Band
    """(k,), mean over frames and targets."""
    lifetimes: Band
    """(k,), -lag / ln K_ii."""
    transitions: NDArray[np.int64]
    """(k, k), see `transition_counts`."""
    dwell_times: Array
    """(k,), see `dwell_times`."""
    frames: int
    """Over all trajectories."""
    block_frames: float
    """Length of a bootstrap block."""


def analyse(p: Predictions, lag: int, lags: Sequence[int] | None = None) -> Kinetics:
    """Everything, at the model's `lag` and with implied timescales over `lags` (frames; the default is `default_lags`).

    Raises: UserError if no trajectory is longer than the lags, or if predictions are no probabilities of k > 1 states.
    """
    parts = _trajectories(p)
    frames, longest = sum(map(len, parts)), max(map(len, parts))
    lags = default_lags(longest, lag) if lags is None else sorted({*lags, lag})
    slowest = np.nan_to_num(timescales(koopman(parts, lag), lag)[0])
    blocks = _Blocks(parts, int(np.clip(frames / max(3 * slowest, 1), MIN_BLOCKS, MAX_BLOCKS)))
    at_lags = {n: blocks.koopman(n) for n in lags}
    times = np.stack([_decays(at_lags[n], n) for n in lags], axis=1)
    at_lag, transitions = at_lags[lag], transition_counts(parts)
    return Kinetics(
        lag=lag,
        koopman=_band(at_lag),
        eigenvectors=eigenvectors(at_lag[0]),
        rank=_rank(_products(blocks, lag)[0].sum(0)) - 1,
        timescales=_time_band(times[:, lags.index(lag)]),
        lags=np.array(lags),
        implied_timescales=_time_band(times),
        chapman_kolmogorov=_chapman_kolmogorov(blocks, lag, max(1, min(5, longest // (2 * lag)))),
        stationary=_band(np.stack([stationary_distribution(k) for k in at_lag])),
        populations=_band(blocks.populations()),
        lifetimes=_time_band(_decay_time(np.diagonal(at_lag, axis1=1, axis2=2), lag)),
        transitions=transitions,
        dwell_times=dwell_times(transitions),
        frames=frames,
        block_frames=frames / blocks.count,
    )


def _chapman_kolmogorov(blocks: _Blocks, lag: int, steps: int) -> ChapmanKolmogorov:
    multiples = np.arange(steps + 1)
    once = blocks.koopman(lag)
    predicted = np.stack([np.linalg.matrix_power(once, m) for m in multiples], axis=1)
    estimated = np.stack([predicted[:, 0], once, *(blocks.koopman(m * lag) for m in multiples[2:])], axis=1)
    difference = _band(estimated - predicted)
    fails = (np.abs(difference.value) > CK_TOLERANCE) & ((difference.lower > 0) | (difference.upper < 0))
    return ChapmanKolmogorov(multiples, _band(predicted), _band(estimated), fails)


class _Blocks:
    """Trajectories cut into about `count` blocks of time, and the draws from them."""

    def __init__(self, p: Predictions, count: int):
        self.parts = _trajectories(p)
        length = max(1, sum(map(len, self.parts)) / count)
        self.spans = [
            (part, start, stop)
            for part in self.parts
            for start, stop in pairwise(np.linspace(0, len(part), max(1, round(len(part) / length)) + 1, dtype=int))
        ]
        self.count = len(self.spans)
        draws = np.random.default_rng(SEED).multinomial(self.count, np.full(self.count, 1 / self.count), DRAWS)
        self.weights = np.vstack([np.ones(self.count), draws])

    def koopman(self, lag: int) -> Array:
        """K(lag) of every draw: (s, k, k)."""
        return _solve(*(np.tensordot(self.weights, sums, 1) for sums in _products(self, lag)))

    def populations(self) -> Array:
        """(s, k)"""
        sums = np.stack([part[start:stop].sum((0, 1), dtype=np.float64) for part, start, stop in self.spans])
        drawn = self.weights @ sums
        return drawn / drawn.sum(-1, keepdims=True)


def _products(blocks: _Blocks, lag: int) -> tuple[Array, Array]:
    """C0 and Ct of the pairs that start in each block: (b, k, k) each."""
    longest = max(map(len, blocks.parts))
    if not 1 <= lag < longest:
        raise UserError(f"a lag of {lag} frames needs a longer trajectory: the longest has {longest} frames.")
    c0, ct = [], []
    for part, start, stop in blocks.spans:
        stop = max(start, min(stop, len(part) - lag))
        now, then = (
            part[start + shift : stop + shift].reshape(-1, part.shape[-1]).astype(np.float64) for shift in (0, lag)
        )
        c0.append(now.T @ now)
        ct.append(now.T @ then)
    return np.stack(c0), np.stack(ct)


def _solve(c0: Array, ct: Array) -> Array:
    """C0^-1 Ct (..., k, k) with C0 inverted where its eigenvalues are above the threshold."""
    values, vectors = np.linalg.eigh(c0)
    kept = values > RANK_THRESHOLD * values[..., -1:]
    inverse = np.divide(1, values, out=np.zeros_like(values), where=kept)
    return (vectors * inverse[..., None, :]) @ np.swapaxes(vectors, -1, -2) @ ct


def _rank(c0: Array) -> int:
    values = np.linalg.eigvalsh(c0)
    return int((values > RANK_THRESHOLD * values[-1]).sum())


def _decays(koopman_matrix: Array, lag: float) -> Array:
    """Decay times (..., k - 1), slowest first: infinite or 0 where `timescales` flags."""
    values = np.linalg.eigvals(koopman_matrix)
    # The eigenvalue 1 of the constant function is exact; the largest may be another one, beyond 1 by chance.
    constant = np.abs(values - 1).argmin(-1)[..., None]
    times = _decay_time(values, lag)
    np.put_along_axis(times, constant, np.inf, -1)
    return -np.sort(-times, axis=-1)[..., 1:]


def _decay_time(eigenvalues: np.ndarray, lag: float) -> Array:
    size = np.abs(eigenvalues)
    decaying = (eigenvalues.real > RESOLUTION) & (size < 1 - RESOLUTION)
    limit = np.where(eigenvalues.real > RESOLUTION, np.inf, 0.0)
    return np.where(decaying, -lag / np.log(np.where(decaying, size, 0.5)), limit)


def _flag(times: Array) -> Array:
    return np.where(np.isfinite(times) & (times > 0), times, np.nan)


def _band(draws: Array) -> Band:
    """From draws (s, ...). Order statistics, because an interpolation cannot pass infinity."""
    tail = (1 - CONFIDENCE) / 2
    lower = np.quantile(draws[1:], tail, axis=0, method="lower")
    upper = np.quantile(draws[1:], 1 - tail, axis=0, method="higher")
    return Band(draws[0], lower, upper)


def _time_band(draws: Array) -> Band:
    band = _band(draws)
    return band._replace(value=_flag(band.value))


def _trajectories(p: Predictions) -> list[np.ndarray]:
    """As a list of (T, n, k)."""
    parts = [p] if isinstance(p, np.ndarray) else list(p)
    parts = [part[:, None] if part.ndim == 2 else part for part in parts]
    shapes = [part.shape for part in parts]
    if not parts or any(part.ndim != 3 or not part.size for part in parts) or len({shape[-1] for shape in shapes}) > 1:
        raise UserError(f"predictions of shapes {shapes}; one (frames, targets, states) array per trajectory expected.")
    if shapes[0][-1] < 2:
        raise UserError("predictions of a single state have no kinetics; train with state_len of at least 2.")
    worst = max(float(np.abs(part.sum(-1) - 1).max()) for part in parts)
    if not worst < 1e-2:  # also true for NaN
        raise UserError(f"predictions are no probabilities: they sum to 1 only within {worst:.3g}.")
    return parts
