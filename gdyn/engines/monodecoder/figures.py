"""Figures of a learned alphabet. Each function draws one matplotlib Figure from arrays.

Letters are coloured by their place between strand and helix, so that similar ones look similar, in a map that
colour-blind readers can read, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from gdyn.engines.monodecoder.layout import AMINO_ACIDS, SECONDARY
from gdyn.engines.monodecoder.scores import UNKNOWN, Letter, Reading
from gdyn.report import PALE, PALETTE, SHADE, styled

SECONDARY_COLOURS = (PALE, PALETTE[1], PALETTE[0])
"""Of loop, helix, strand."""
GROUPS = "GPAVILMCFYWHKRDENQST"
"""Amino acids, the similar ones side by side."""
ROW = 60
"""Residues per row of a strip."""
MOST_ROWS = 10


def order_of(letters: Sequence[Letter]) -> np.ndarray:
    """Place of each code between strand-like (0) and helix-like (K - 1); codes without residues are in the middle."""
    leaning = np.nan_to_num([letter.secondary[1] - letter.secondary[2] for letter in letters])
    return np.argsort(np.argsort(leaning, kind="stable"))


def colours_of(letters: Sequence[Letter]) -> np.ndarray:
    """(K, 4) RGBA of each code."""
    shade = order_of(letters) / max(1, len(letters) - 1)
    return np.asarray(matplotlib.colormaps["viridis"](0.05 + 0.93 * shade))


@styled
def usage(letters: Sequence[Letter], names: Sequence[str]) -> Figure:
    """Share of each letter, most frequent first, divided by the secondary structure of its residues. Dashed: all
    letters equally frequent."""
    ranked = sorted(letters, key=lambda letter: -letter.share)
    figure = Figure(figsize=(9, 4))
    axes = figure.add_subplot()
    places, bottom = np.arange(len(ranked)), np.zeros(len(ranked))
    for i, (kind, tint) in enumerate(zip(SECONDARY, SECONDARY_COLOURS, strict=True)):
        part = np.array([100 * letter.share * np.nan_to_num(letter.secondary[i]) for letter in ranked])
        axes.bar(places, part, bottom=bottom, width=0.8, color=tint, label=kind)
        bottom += part
    rest = np.maximum(np.array([100 * letter.share for letter in ranked]) - bottom, 0)
    if rest.max() > 1e-9:
        axes.bar(places, rest, bottom=bottom, width=0.8, color="none", edgecolor=PALE, label="unknown")
    even = f"evenly used: {100 / len(ranked):.3g} %"
    axes.axhline(100 / len(ranked), color="black", linestyle="--", linewidth=1, label=even)
    axes.set(ylabel="share of residues, %", xlabel="letter")
    axes.set(xlim=(-0.7, len(ranked) - 0.3), ylim=(0, 106 * ranked[0].share))
    step = -(-len(ranked) * len(names[-1]) // 64)
    axes.set_xticks(places[::step], [names[letter.code] for letter in ranked[::step]], family="monospace", fontsize=10)
    axes.grid(visible=False, axis="x")
    axes.legend()
    return figure


@styled
def confusion(amino: np.ndarray, decoded: np.ndarray) -> Figure:
    """Rows: true amino acids (R,), each row sums to 1; columns: the most probable decoded one."""
    counts = np.zeros((20, 20))
    known = amino != UNKNOWN
    np.add.at(counts, (amino[known], decoded[known]), 1)
    place = [AMINO_ACIDS.index(letter) for letter in GROUPS]
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)[np.ix_(place, place)]
    figure = Figure(figsize=(7, 6), layout="compressed")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (i, j), share in np.ndenumerate(shares):
        if share >= 0.05:
            ink = "white" if share > 0.55 else "black"
            axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_xticks(range(20), list(GROUPS))
    axes.set_yticks(range(20), list(GROUPS))
    axes.set(xlabel="decoded amino acid", ylabel="true amino acid")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="share of the true amino acid", shrink=0.8)
    return figure


@styled
def protein(reading: Reading, letters: Sequence[Letter]) -> Figure:
    """Left the CA trace coloured by letter, seen from where it is widest; right, above the diagonal, the contacts of
    the structure, below it their decoded probability."""
    figure = Figure(figsize=(10, 5.2))
    left, right = figure.subplots(1, 2)
    _draw_trace(left, reading.coordinates, colours_of(letters)[reading.codes])
    shades = colours_of(letters)[np.argsort(order_of(letters))]
    scale = matplotlib.cm.ScalarMappable(cmap=ListedColormap(shades))
    bar = figure.colorbar(scale, ax=left, location="bottom", shrink=0.6, aspect=20)
    bar.set_label("letters in their order")
    bar.set_ticks([0, 1], labels=["most strand", "most helix"])
    length = len(reading.codes)
    shown = np.where(np.triu(np.ones((length, length), bool), 1), reading.contacts, reading.probabilities)
    np.fill_diagonal(shown, np.nan)
    edge = (0.5, length + 0.5)
    image = right.imshow(shown, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", extent=(*edge, *edge[::-1]))
    right.plot(edge, edge, color=PALE, linewidth=0.8)
    right.text(0.97, 0.97, "structure", ha="right", va="top", transform=right.transAxes)
    right.text(0.03, 0.03, "decoded", ha="left", va="bottom", transform=right.transAxes)
    right.set(xlabel="residue", ylabel="residue", title="contacts")
    right.grid(visible=False)
    figure.colorbar(image, ax=right, location="bottom", shrink=0.6, aspect=20, label="probability of contact")
    figure.suptitle(reading.identifier, fontsize=12)
    return figure


def _draw_trace(axes: Any, coordinates_l3: np.ndarray, tints_l4: np.ndarray) -> None:
    """A chain in the plane of its two largest extents, what is near drawn over what is far."""
    centred = coordinates_l3 - coordinates_l3.mean(0)
    _, _, axes_33 = np.linalg.svd(centred, full_matrices=False)
    if np.linalg.det(axes_33) < 0:
        axes_33[2] *= -1  # a mirrored fold would be another one
    xyz = centred @ axes_33.T
    # Of each residue the two half steps, which go on straight where the neighbours' begin: the white margins, by which
    # crossings show depth, do not cut them.
    middle = np.concatenate([xyz[:1], (xyz[:-1] + xyz[1:]) / 2, xyz[-1:]])
    bends = np.stack([middle[:-1], xyz, middle[1:]], 1)[:, :, :2]
    for residue in np.argsort(xyz[:, 2], kind="stable"):
        axes.plot(*bends[residue].T, color="white", linewidth=5, solid_capstyle="butt")
        axes.plot(*bends[residue].T, color=tints_l4[residue], linewidth=2.6, solid_capstyle="round")
    axes.plot(*xyz[0, :2], "o", color="black", markersize=6)
    axes.annotate("N", xyz[0, :2], xytext=(6, 6), textcoords="offset points")
    axes.set(title="CA trace by letter")
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_axis_off()


@styled
def strip(reading: Reading, letters: Sequence[Letter], names: Sequence[str]) -> Figure:
    """The string below the secondary structure of the structure and the decoded one, in rows of ROW residues, at most
    MOST_ROWS of them."""
    length = min(len(reading.codes), ROW * MOST_ROWS)
    rows = -(-length // ROW)
    figure = Figure(figsize=(9, 0.9 + 0.72 * rows))
    axes = figure.add_subplot()
    tints, kinds = colours_of(letters), np.array([matplotlib.colors.to_rgba(tint) for tint in SECONDARY_COLOURS])
    for row in range(rows):
        part = slice(ROW * row, min(ROW * (row + 1), length))
        top = 4.0 * row
        bands = (
            (top, 0.55, _tints(kinds, reading.secondary[part])),
            (top + 0.6, 0.55, kinds[reading.secondary_decoded[part]]),
            (top + 1.25, 1.6, tints[reading.codes[part]]),
        )
        for y, height, colours in bands:
            axes.imshow(colours[None], extent=(0.5, 0.5 + len(colours), y + height, y), interpolation="nearest")
        for i, code in enumerate(reading.codes[part] if len(names[-1]) == 1 else ()):
            ink = "black" if tints[code][:3] @ (0.3, 0.6, 0.1) > 0.45 else "white"
            at = (i + 1, top + 2.05)
            axes.text(*at, names[code], ha="center", va="center", fontsize=8, family="monospace", color=ink)
        axes.text(-0.4, top + 2.05, str(part.start + 1), ha="right", va="center", fontsize=9)
    axes.set(xlim=(-4, ROW + 1), ylim=(4.0 * rows - 1, -0.4), aspect="auto")
    axes.set_axis_off()
    more = "" if length == len(reading.codes) else f", the first {length} of {len(reading.codes)} residues"
    axes.set_title(f"{reading.identifier}{more}: DSSP, decoded, letters")
    handles = [Patch(color=tint, label=kind) for kind, tint in zip(SECONDARY, SECONDARY_COLOURS, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _tints(kinds: np.ndarray, secondary: np.ndarray) -> np.ndarray:
    """(L, 4): SHADE where the secondary structure is unknown."""
    return np.concatenate([kinds, [matplotlib.colors.to_rgba(SHADE)]])[secondary]
