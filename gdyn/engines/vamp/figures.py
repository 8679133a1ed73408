"""Figures of learned kinetics. Each function draws one matplotlib Figure from arrays; states are numbered as in the
prediction files."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from gdyn.engines.vamp.clock import Clock
from gdyn.engines.vamp.kinetics import Array, Band, Kinetics
from gdyn.report import INK, PALE, PALETTE, SHADE, colour, styled

MAX_FULL_GRID = 4
"""Up to so many states the Chapman-Kolmogorov figure shows every pair of states; beyond, only staying."""


@styled
def implied_timescales(kinetics: Kinetics, clock: Clock) -> Figure:
    """Timescales over lags with bands, log axes. In the grey area a process is faster than the lag: nothing is known
    there. Gaps are flagged estimates."""
    figure = Figure(figsize=(9, 5))
    axes = figure.add_subplot()
    lags = kinetics.lags * clock.frame_time
    bands = Band(*(bound * clock.frame_time for bound in kinetics.implied_timescales))
    resolved = bands.value[bands.value > lags[:, None]]
    low = 0.5 * min([lags[0], *resolved])
    high = 3 * max(resolved, default=lags[-1])  # beyond it all is grey
    for i, time in enumerate(kinetics.timescales.value):
        value, lower, upper = (np.clip(bound[:, i], low, high) for bound in bands)
        axes.fill_between(lags, lower, upper, where=np.isfinite(value), color=colour(i), alpha=0.18, linewidth=0)
        axes.plot(lags, value, "o-", color=colour(i), markersize=4.5, label=f"process {i + 1}: {clock.say(time)}")
    diagonal = [low, 2 * high]
    axes.fill_between(
        diagonal, low, diagonal, color=SHADE, zorder=2.2, linewidth=0, alpha=0.85, label="faster than the lag"
    )
    axes.plot(diagonal, diagonal, color=PALE, linewidth=1, zorder=2.3)
    lag = f"model lag: {clock.say(kinetics.lag)}"
    axes.axvline(kinetics.lag * clock.frame_time, color=PALE, linestyle="--", linewidth=1.2, zorder=2.4, label=lag)
    axes.set(xscale="log", yscale="log", xlim=(0.9 * lags[0], 1.1 * min(lags[-1], high)), ylim=(low, high))
    axes.set(xlabel=f"lag ({clock.unit})", ylabel=f"implied timescale ({clock.unit})")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


@styled
def chapman_kolmogorov(kinetics: Kinetics, clock: Clock) -> Figure:
    """Predicted K(lag)^m (line, band) beside estimated K(m lag) (points, bars); failing panels are marked."""
    test, k = kinetics.chapman_kolmogorov, len(kinetics.populations.value)
    full = k <= MAX_FULL_GRID
    cells = [(i, j) for i in range(k) for j in range(k)] if full else [(i, i) for i in range(k)]
    columns = k if full else 5
    rows = -(-len(cells) // columns)
    figure = Figure(figsize=(9, 1.2 + 1.75 * rows))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    at = test.multiples * kinetics.lag * clock.frame_time
    for axes, (i, j) in zip(panels, cells, strict=False):
        predicted, estimated = (Band(*(bound[:, i, j] for bound in band)) for band in (test.predicted, test.estimated))
        axes.fill_between(at, predicted.lower, predicted.upper, color=PALETTE[0], alpha=0.2, linewidth=0)
        axes.plot(at, predicted.value, color=PALETTE[0], label="predicted, $K(\\tau)^m$")
        points: dict[str, Any] = {"fmt": "o", "color": PALETTE[3], "markersize": 4, "linewidth": 1.3}
        axes.errorbar(at, estimated.value, _bars(estimated), **points, label="estimated, $K(m\\tau)$")
        failed = test.fails[:, i, j].any()
        axes.set_title(f"{i} → {j}" + ("  differs" if failed else ""), color=PALETTE[3] if failed else INK)
        axes.set_ylim(-0.05, 1.05)
    for axes in panels[len(cells) :]:
        axes.set_visible(False)
    figure.supxlabel(f"time ({clock.unit})", fontsize=11)
    figure.supylabel("probability", fontsize=11)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


@styled
def populations(kinetics: Kinetics) -> Figure:
    """Bars: mean occupation in the data; diamonds: the stationary distribution of K. They agree in equilibrium."""
    states = np.arange(len(kinetics.populations.value))
    figure = Figure(figsize=(9, 3.6))
    axes = figure.add_subplot()
    tints = [colour(int(i)) for i in states]
    axes.bar(states, kinetics.populations.value, width=0.6, color=tints, alpha=0.85, label="population")
    whiskers: dict[str, Any] = {"color": "black", "capsize": 3, "linewidth": 1.2, "linestyle": "", "markersize": 5}
    known, predicted = kinetics.populations, kinetics.stationary
    axes.errorbar(states - 0.12, known.value, _bars(known), **whiskers)
    name = "stationary distribution of K"
    axes.errorbar(states + 0.12, predicted.value, _bars(predicted), marker="D", label=name, **whiskers)
    axes.set(xlabel="state", ylabel="probability", xticks=states, ylim=(0, None))
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


@styled
def eigenvectors(kinetics: Kinetics, clock: Clock) -> Figure:
    """Which states each process exchanges: entries of opposite sign."""
    modes = kinetics.eigenvectors[:, 1:].T
    figure = Figure(figsize=(9, 1.3 + 0.55 * len(modes)))
    axes = figure.add_subplot()
    image = axes.imshow(modes, cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(modes):
        ink = "white" if abs(value) > 0.6 else "black"
        axes.text(j, i, f"{value:+.2f}".replace("-", "−"), ha="center", va="center", fontsize=10, color=ink)
    labels = [f"process {i}, {clock.say(time)}" for i, time in enumerate(kinetics.timescales.value, 1)]
    axes.set(xlabel="state", xticks=range(len(modes) + 1), yticks=range(len(modes)), yticklabels=labels)
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="right eigenvector", aspect=12)
    return figure


@styled
def excerpt(p: NDArray[np.float32], kinetics: Kinetics, clock: Clock) -> Figure:
    """State probabilities of the target and stretch of one trajectory (F, n, k) in which the slowest process moves
    most."""
    target, start, length = _liveliest(p, kinetics)
    stride = -(-length // 1000)  # finer than a pixel cannot be seen
    frames = np.arange(start, start + length - stride + 1, stride)
    means = np.mean([p[frames + i, target] for i in range(stride)], axis=0)
    figure = Figure(figsize=(9, 3.2))
    axes = figure.add_subplot()
    states = range(p.shape[-1])
    at, names, tints = frames * clock.frame_time, [f"state {i}" for i in states], map(colour, states)
    axes.stackplot(at, means.T, colors=list(tints), labels=names, step="post", linewidth=0)
    axes.set(xlabel=f"time ({clock.unit})", ylabel="probability", ylim=(0, 1), xlim=(at[0], at[-1]))
    axes.set_title(f"target {target}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return figure


def _liveliest(p: NDArray[np.float32], kinetics: Kinetics, targets: int = 64) -> tuple[int, int, int]:
    """(target, first frame, frames) of the window of 25 slow timescales in which the slowest process varies most."""
    slowest = np.nan_to_num(kinetics.timescales.value[0])
    length = min(len(p), int(np.clip(25 * slowest, 500, 5000)))
    mode = p[:, :targets] @ kinetics.eigenvectors[:, 1].astype(np.float32)
    starts = range(0, len(p) - length + 1, max(1, length // 2))
    spread = np.array([mode[start : start + length].var(0) for start in starts])
    best, target = np.unravel_index(spread.argmax(), spread.shape)
    return int(target), starts[int(best)], length


def _bars(band: Band) -> Array:
    """Lengths below and above the value, as errorbar wants them: (2, ...)."""
    value, lower, upper = band
    return np.maximum(np.nan_to_num([value - lower, upper - value]), 0)


@styled
def singular_values(of_splits: dict[str, list[float]]) -> Figure:
    """Singular values of the whitened Koopman matrix of each split, largest first: how much of each process is left
    after the lag."""
    figure = Figure(figsize=(6, 3.5))
    axes = figure.add_subplot()
    for i, (split, values) in enumerate(of_splits.items()):
        axes.plot(np.arange(1, len(values) + 1), values, "o-", color=colour(i), label=split)
    axes.set(xlabel="process", ylabel="singular value", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure
