"""The HTML page of a VAMP run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gdyn.engines.vamp.clock import Clock
from gdyn.engines.vamp.kinetics import Band, Kinetics
from gdyn.report import heading, notes, page, picture, section, table, tiles

CAPTIONS = {
    "implied_timescales": "Relaxation times over the lag at which they are estimated, with 95 % bands. Where a curve is"
    " flat the states are Markovian; in the grey area a process is faster than the lag and nothing is known. Gaps: no"
    " decay could be read.",
    "chapman_kolmogorov": "Probability of being in the second state some time after the first. Line: prediction of the "
    "model at its own lag. Points: the data. 95 % bands.",
    "populations": "Share of frames and targets in each state, and the stationary distribution of the Koopman matrix K."
    " They agree in equilibrium.",
    "excerpt": "State probabilities where the slowest process moves most.",
    "eigenvectors": "Each process moves probability between states of opposite sign.",
    "training": "Loss per phase (objectives differ in scale) and scores; dotted: phase boundaries. Training points are "
    "scores of batches, which are biased upwards if the batches are small.",
}


def render(
    summary: Mapping[str, Any], kinetics: Kinetics, clock: Clock, pictures: Mapping[str, Path], facts: Mapping[str, Any]
) -> str:
    """The page as text. `summary` is analysis_summary.json, `pictures` PNG files by figure name, `facts` how the run
    was made."""

    def show(name: str) -> str:
        return picture(pictures[name], CAPTIONS[name]) if name in pictures else ""

    lag = clock.say(kinetics.lag)
    return page(
        summary["run"],
        f"VAMP kinetics of the {summary['split']} split: {kinetics.frames:,} frames, {summary['targets']} target(s); "
        f"checkpoint {summary['checkpoint']}",
        notes([summary["learned"]], "learned"),
        notes(summary["warnings"], "warning"),
        _tiles(summary, kinetics, clock),
        section("Implied timescales", show("implied_timescales"), _processes(kinetics, clock)),
        section("Chapman-Kolmogorov test", show("chapman_kolmogorov")),
        section("States", show("populations"), _states(kinetics, clock), show("excerpt")),
        section(
            "Processes",
            show("eigenvectors"),
            heading(f"Koopman matrix at {lag}"),
            _matrix(kinetics.koopman.value, ".4f"),
            heading("Transitions between consecutive frames, most probable state"),
            _matrix(kinetics.transitions, ",d"),
        ),
        section("Training and scores", show("training"), _scores(summary)),
        section("How the run was made", table(["", ""], facts.items(), kind="facts")),
    )


def _tiles(summary: Mapping[str, Any], k: Kinetics, clock: Clock) -> str:
    value, lower, upper = (bound[0] for bound in k.timescales)
    test, most = k.chapman_kolmogorov, len(k.timescales.value)
    verdict = "fails" if test.fails.any() else "holds"
    reach = clock.say(test.multiples[-1] * k.lag)
    return tiles(
        [
            ("Slowest timescale", clock.say(value), f"95 % band {clock.between(lower, upper)} {clock.unit}"),
            ("VAMP-2", f"{summary['scores']['vamp2']:.3f}", f"at most {most}; the constant is not counted"),
            ("States", str(most + 1), f"learned for a lag of {clock.say(k.lag)}"),
            ("Chapman-Kolmogorov", verdict, f"deviation at most {test.deviation:.3f} up to {reach}"),
        ]
    )


def _processes(k: Kinetics, clock: Clock) -> str:
    rows = [
        (f"process {i}", clock.number(value), clock.between(lower, upper))
        for i, (value, lower, upper) in enumerate(zip(*k.timescales, strict=True), 1)
    ]
    return table(["", f"timescale ({clock.unit})", "95 % band"], rows)


def _states(k: Kinetics, clock: Clock) -> str:
    def percent(band: Band, i: int) -> str:
        value, lower, upper = (100 * bound[i] for bound in band)
        return f"{value:.1f} ({lower:.1f}–{upper:.1f})"

    def life(i: int) -> str:
        value, lower, upper = (bound[i] for bound in k.lifetimes)
        return f"{clock.number(value)} ({clock.between(lower, upper)})"

    unit = clock.unit
    header = ["", "population, %", "stationary, %", f"lifetime −τ / ln K(i, i), {unit}", f"mean stay, {unit}"]
    rows = [
        (f"state {i}", percent(k.populations, i), percent(k.stationary, i), life(i), clock.number(stay))
        for i, stay in enumerate(k.dwell_times)
    ]
    return table(header, rows)


def _matrix(values: Any, form: str) -> str:
    header = ["from \\ to", *(f"state {j}" for j in range(len(values)))]
    return table(header, [(f"state {i}", *(format(value, form) for value in row)) for i, row in enumerate(values)])


def _scores(summary: Mapping[str, Any]) -> str:
    scores = summary["scores"]
    header = ["over all pairs of frames", "VAMP-1", "VAMP-2", "VAMP-E", "singular values"]
    singular = ", ".join(f"{value:.3f}" for value in scores["singular_values"])
    row = (f"{summary['split']} split", *(f"{scores[name]:.4f}" for name in ("vamp1", "vamp2", "vampe")), singular)
    remark = "Scores are of both lobes and do not include the constant singular function."
    return table(header, [row]) + notes([remark], "remark")
