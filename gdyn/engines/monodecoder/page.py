"""The HTML page of a monodecoder run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gdyn.engines.monodecoder.findings import percent, score_rows
from gdyn.engines.monodecoder.layout import AMINO_ACIDS
from gdyn.engines.monodecoder.scores import FAR, Letter, Reading
from gdyn.report import heading, notes, number, page, picture, section, table, tiles

CAPTIONS = {
    "usage": "Share of residues with each letter, most frequent first, by their secondary structure (DSSP). Dashed: "
    "what it would be if all letters were equally frequent.",
    "protein": "Left: the CA trace, each residue in the colour of its letter; a dot where the chain begins. Right: "
    "contacts (CA closer than 8 Å), above the diagonal those of the structure, below it their probability decoded from "
    "the letters. The better it is decoded, the more symmetric the map.",
    "strip": "Top to bottom: secondary structure of the structure, the decoded one, the string. Letters are coloured "
    "in their order from the one with most strand (dark) to the one with most helix (bright).",
    "confusion": "Of each true amino acid, the percentage decoded as each one. Neighbours on the axes are similar; a "
    "column that stands out is an amino acid that is said when nothing is known.",
    "training": "Loss per phase, and some of its parts, without their weights: cross-entropies in nats, of angles "
    "smooth L1; dotted: phase boundaries. Training losses have the schedules' present weights, those of validation "
    "their last ones, so that epochs compare. Codebook perplexity in training is that of the running usage.",
}


def render(
    summary: Mapping[str, Any],
    scores: Mapping[str, Any],
    letters: Sequence[Letter],
    names: Sequence[str],
    shown: Reading,
    pictures: Mapping[str, Path],
    facts: Mapping[str, Any],
) -> str:
    """The page as text. `summary` is analysis_summary.json, `scores` its scores, `names` what the letters are called,
    `pictures` PNG files by figure name, `facts` how the run was made."""

    def show(name: str) -> str:
        return picture(pictures[name], CAPTIONS[name]) if name in pictures else ""

    text = (" " if len(names[-1]) > 1 else "").join(names[code] for code in shown.codes)
    return page(
        summary["run"],
        f"Structural alphabet on the {summary['split']} split: {scores['structures']:,} structures, "
        f"{scores['residues']:,} residues; checkpoint {summary['checkpoint']}",
        notes([summary["learned"]], "learned"),
        notes(summary["warnings"], "warning"),
        _tiles(scores),
        section("What comes back from the letters", _scores(scores, summary["least_plddt"])),
        section("The alphabet", show("usage"), _alphabet(letters, names)),
        section(
            f"One protein: {shown.identifier}",
            notes(["Of the set, the one whose contacts come back as well as the median."], "remark"),
            show("protein"),
            show("strip"),
            heading("Its string"),
            table(["", ""], [("letters", text), ("amino acids", shown.sequence)], kind="facts"),
        ),
        section("Amino acids", show("confusion")),
        section("Training", show("training"), _losses(summary["losses"])),
        section("How the run was made", table(["", ""], facts.items(), kind="facts")),
    )


def _tiles(scores: Mapping[str, Any]) -> str:
    chance = scores["chance"]
    return tiles(
        [
            (
                "Letters used",
                f"{scores['codes_used']} of {scores['codes']}",
                f"as varied as {scores['codebook_perplexity']:.1f} equally frequent ones",
            ),
            (
                "Amino acids right",
                percent(scores["aa_accuracy"]),
                f"{percent(chance['aa_accuracy'])} without a structure; perplexity {number(scores['aa_perplexity'])}",
            ),
            (
                "Secondary structure right",
                percent(scores["ss_accuracy"]),
                f"{percent(chance['ss_accuracy'])} without a structure",
            ),
            (
                "Contacts found",
                number(scores["contact_average_precision"]),
                f"average precision; {number(chance['contact_average_precision'])} by nearness in the chain",
            ),
        ]
    )


def _scores(scores: Mapping[str, Any], least_plddt: float | None) -> str:
    remarks = [
        "Each number once over the whole set; those of contacts are means over structures.",
        "Residues near in the chain are nearly always in contact, so pairs are also ranked by nearness in the chain "
        f"alone. Those {FAR} or more residues apart say more of the fold.",
        "The encoder reads the amino acids, so their accuracy measures how much of them the letters keep.",
    ]
    if least_plddt is not None:
        remarks.append(
            f"As in training, residues with a pLDDT below {least_plddt:g} do not count for secondary structure, "
            "contacts and angles."
        )
    header = ["", "decoded", "without a structure", "which is"]
    return table(header, score_rows(scores)) + notes(remarks, "remark")


def _alphabet(letters: Sequence[Letter], names: Sequence[str]) -> str:
    header = ["letter", "code", "share, %", "loop / helix / strand, %", "phi, °", "psi, °", "frequent amino acids"]
    ranked = sorted((letter for letter in letters if letter.share > 0), key=lambda letter: -letter.share)
    rows = [
        (
            names[letter.code],
            letter.code,
            f"{100 * letter.share:.2f}",
            " / ".join("—" if math.isnan(share) else f"{100 * share:.0f}" for share in letter.secondary),
            *(
                "—" if math.isnan(angle) else f"{np.degrees(angle):.0f}".replace("-", "−")
                for angle in letter.angles[:2]
            ),
            enriched(letter),
        )
        for letter in ranked
    ]
    remark = "Amino acids with the factor by which they are more frequent than in the whole set, if 1.5 or more."
    unused = [names[letter.code] for letter in letters if letter.share == 0]
    never = [f"Never used: {', '.join(unused)}."] if unused else []
    return table(header, rows) + notes([remark, *never], "remark")


def enriched(letter: Letter, most: int = 4, least: float = 1.5) -> str:
    """The amino acids most typical of a letter, e.g. "G 7.1, N 3.0"."""
    best = [i for i in np.argsort(-letter.enrichment)[:most] if 2 ** letter.enrichment[i] >= least]
    return ", ".join(f"{AMINO_ACIDS[i]} {2 ** letter.enrichment[i]:.1f}" for i in best) or "—"


def _losses(losses: Mapping[str, float]) -> str:
    rows = [(name, number(value, 4)) for name, value in losses.items()]
    return heading("Losses of this split, as training logs them") + table(["", "mean"], rows)
