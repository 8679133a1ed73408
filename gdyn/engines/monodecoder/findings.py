"""What scores mean, in plain sentences: the findings, and what must be known before they are believed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gdyn.engines.monodecoder.scores import FAR
from gdyn.report import number

FEW = 0.25
"""Of the codes: a perplexity below is a collapsed codebook."""
RARE = 0.001
"""Share of the residues below which a letter is hardly used."""
FEW_RESIDUES = 100
"""Per letter: with fewer, what is said of letters is noise."""


ROWS: tuple[tuple[str, str, float, str], ...] = (
    ("amino acid accuracy, %", "aa_accuracy", 100, "always the most frequent"),
    ("amino acid cross-entropy, nats", "aa_cross_entropy", 1, "frequencies of the set"),
    ("amino acid perplexity (20: nothing known)", "aa_perplexity", 1, "frequencies of the set"),
    ("secondary structure accuracy, %", "ss_accuracy", 100, "always the most frequent"),
    ("contacts, average precision", "contact_average_precision", 1, "the nearest in the chain"),
    (f"contacts {FAR} or more residues apart, average precision", "contact_average_precision_long", 1, "likewise"),
    (f"precision of the L most probable, {FAR} or more apart", "contact_precision_at_l", 1, "likewise"),
    ("backbone angles, mean error, °", "angle_mae_degrees", 1, "always the mean"),
    ("phi, mean error, °", "phi_mae_degrees", 1, "always the mean"),
    ("psi, mean error, °", "psi_mae_degrees", 1, "always the mean"),
    ("omega, mean error, °", "omega_mae_degrees", 1, "always the mean"),
)
"""What the row says, the score, in which unit, and what is done without a structure."""


def score_rows(scores: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """What ROWS says of these scores, as text; a dash for what is not defined (NaN, or None as in JSON)."""

    def say(value: float | None, factor: float) -> str:
        return number(math.nan if value is None else factor * value)

    chance = scores["chance"]
    return [(said, say(scores[name], factor), say(chance[name], factor), how) for said, name, factor, how in ROWS]


def learned(scores: dict[str, Any]) -> str:
    """Letters in use, and how well amino acids, secondary structure, contacts and angles come back."""
    perplexity, chance = scores["codebook_perplexity"], scores["chance"]
    return (
        f"{scores['codes_used']} of {scores['codes']} letters are used, as varied as {perplexity:.1f} equally frequent "
        f"ones: {math.log2(perplexity):.2f} bits per residue. From the letters the decoders name "
        f"{percent(scores['aa_accuracy'])} of the amino acids (without a structure: {percent(chance['aa_accuracy'])}) "
        f"and {percent(scores['ss_accuracy'])} of the secondary structure ({percent(chance['ss_accuracy'])}), find "
        f"contacts with an average precision of {number(scores['contact_average_precision'])} "
        f"({number(chance['contact_average_precision'])}), and miss backbone angles by "
        f"{number(scores['angle_mae_degrees'])}° on average ({number(chance['angle_mae_degrees'])}°)."
    )


def warnings(scores: dict[str, Any], usage: list[float]) -> list[str]:
    """One sentence each. `usage`: the share of each code."""
    chance, found = scores["chance"], []
    if scores["codebook_perplexity"] < FEW * scores["codes"]:
        found.append(
            f"The codebook has collapsed: {scores['codebook_perplexity']:.1f} letters' worth of {scores['codes']}. "
            "Train longer, revive unused codes earlier, or take fewer codes."
        )
    rare = sum(share < RARE for share in usage)
    if rare:
        found.append(f"{rare} of {scores['codes']} letters cover less than {percent(RARE)} of the residues each.")
    for name, score in (("Amino acids", "aa_accuracy"), ("Secondary structure", "ss_accuracy")):
        if scores[score] <= chance[score]:
            found.append(
                f"{name}: no better than always giving the most frequent answer ({percent(scores[score])} against "
                f"{percent(chance[score])})."
            )
    if scores["angle_mae_degrees"] >= chance["angle_mae_degrees"]:
        found.append(
            f"Backbone angles: no better than always giving their means ({number(scores['angle_mae_degrees'])}° "
            f"against {number(chance['angle_mae_degrees'])}°)."
        )
    if scores["aa_cross_entropy"] >= chance["aa_cross_entropy"]:
        found.append(
            f"The probabilities of amino acids ({number(scores['aa_cross_entropy'], 4)} nats) say no more than their "
            f"frequencies in this set ({number(chance['aa_cross_entropy'], 4)} nats): overconfident, or not learned."
        )
    for pairs, score in (
        ("Contacts", "contact_average_precision"),
        (f"Contacts of residues {FAR} or more apart", "contact_average_precision_long"),
    ):
        if scores[score] <= chance[score]:
            found.append(
                f"{pairs} come back no better (average precision {number(scores[score])}) than by nearness in the "
                f"chain alone ({number(chance[score])})."
            )
    if scores["residues"] < FEW_RESIDUES * scores["codes"]:
        found.append(
            f"{scores['residues']:,} residues are few for {scores['codes']} letters: what is said of single letters is "
            "uncertain."
        )
    return found


def percent(share: float) -> str:
    return "—" if math.isnan(share) else f"{100 * share:.3g} %"
