"""What kinetics mean, in plain sentences: the findings, and what must be known before they are believed."""

from __future__ import annotations

import numpy as np

from gdyn.engines.vamp.clock import Clock
from gdyn.engines.vamp.kinetics import Kinetics

RARE = 0.01
"""A state less populated than this rests on few frames."""


def learned(k: Kinetics, clock: Clock) -> str:
    """Number of states, slowest timescale with its band, other resolved timescales, populations."""
    value, lower, upper = k.timescales
    first = f"{len(value) + 1} states. "
    if np.isfinite(value[0]):
        band = f"95 % band {clock.between(lower[0], upper[0])} {clock.unit}, at a lag of {clock.say(k.lag)}"
        first += f"The slowest process relaxes in {clock.say(value[0])} ({band})"
    else:
        first += "The data do not determine how fast the slowest process relaxes"
    others = [clock.say(time) for time in value[1:] if time > k.lag]
    rest = f"; further processes slower than the lag: {', '.join(others)}" if others else ""
    shares = ", ".join(f"{100 * share:.1f} % in state {i}" for i, share in enumerate(k.populations.value))
    return f"{first}{rest}. Populations: {shares}."


def warnings(k: Kinetics, clock: Clock) -> list[str]:
    """One sentence each."""
    value, states, lag = k.timescales.value, len(k.populations.value), clock.say(k.lag)
    found = []
    flagged = [str(i) for i, time in enumerate(value, 1) if np.isnan(time)]
    if flagged:
        found.append(
            f"Process {', '.join(flagged)}: no timescale at the lag of {lag}, the eigenvalue is not between 0 and 1. "
            "Either nothing was seen to relax, or there is only noise."
        )
    fast = [f"{i} ({clock.say(time)})" for i, time in enumerate(value, 1) if time <= k.lag]
    if fast:
        found.append(f"Process {', '.join(fast)} is faster than the lag of {lag}: not resolved.")
    if k.rank < states - 1:
        found.append(
            f"The states span {k.rank} independent functions beside the constant, not {states - 1}: some states are "
            "not used, or copy each other."
        )
    rare = [f"{i} ({100 * share:.2g} %)" for i, share in enumerate(k.populations.value) if share < RARE]
    if rare:
        found.append(f"State {', '.join(rare)} is hardly populated: its numbers rest on few frames.")
    return found + _slowing(k, clock) + _doubts(k, clock)


def _slowing(k: Kinetics, clock: Clock) -> list[str]:
    """Processes whose timescale at a longer lag, where it is still resolved, is clearly above that at the model's."""
    times = k.implied_timescales
    longer = (k.lags > k.lag)[:, None] & (times.value > k.lags[:, None]) & (times.value > 1.1 * k.timescales.value)
    lower = np.where(longer, times.lower, 0)
    return [
        f"Process {i + 1} still slows with the lag: {clock.say(k.timescales.value[i])} at the model's, "
        f"{clock.say(times.value[at, i])} at {clock.say(k.lags[at])}. The latter is nearer the truth."
        for i, at in enumerate(lower.argmax(0))
        if lower[at, i] > k.timescales.upper[i]
    ]


def _doubts(k: Kinetics, clock: Clock) -> list[str]:
    """Whether the model predicts longer times, and whether the bands can be trusted."""
    test, slowest, found = k.chapman_kolmogorov, k.timescales.value[0], []
    if test.fails.any():
        found.append(
            f"The Chapman-Kolmogorov test fails (largest deviation {test.deviation:.2f}): the states are not Markovian "
            f"at the lag of {clock.say(k.lag)}. Try a longer lag or more states."
        )
    if not k.block_frames >= 2 * slowest:
        found.append(
            f"The bands are too narrow: a bootstrap block of {clock.say(k.block_frames)} does not outlast the slowest "
            "process. Longer trajectories are needed."
        )
    return found
