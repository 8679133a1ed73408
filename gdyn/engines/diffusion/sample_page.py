"""The HTML page of sampled molecules: how good they are, in plain words, and what they look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gdyn.engines.diffusion.quality import Row, largest_fragment, sanitised
from gdyn.extras import optional
from gdyn.report import PALETTE, heading, notes, number, page, picture, save_png, section, styled, table, tiles
from gdyn.rundir import write_text

PICTURES = 10
"""Molecules shown of a pocket."""
POCKETS = 20
"""Pockets whose molecules are shown: a page that no browser opens helps nobody."""
WIDTH, HEIGHT = 200, 150
"""Pixels of a molecule."""
GRID = f"display: grid; grid-template-columns: repeat(auto-fill, {WIDTH}px); gap: 8px"

MEANINGS = {
    "number": "How many molecules were sampled.",
    "valid": "RDKit can sanitise the largest fragment: no atom has too many bonds, rings make sense, elements known.",
    "connected": "All atoms hang together. A loose atom makes a molecule unconnected, not invalid.",
    "uniqueness": "Different molecules, of the valid ones. Low: the model repeats itself.",
    "novelty": "Of the different ones, those that are not in the training data.",
    "qed": "Drug-likeness from 0 to 1, mean over the valid; what chemists find attractive has 0.67 on average.",
    "diversity": "1 − mean similarity of two molecules of a pocket (Tanimoto, Morgan fingerprints, radius 2).",
    "atom_stability": "Atoms whose bonds, by EDM's table of distances, add up to a valence of their element. Without "
    "hydrogens: do not exceed it.",
    "molecule_stability": "Molecules all of whose atoms are stable.",
    "clash_free": "Molecules with no atom closer to the pocket than 0.75 of the sum of van der Waals radii.",
    "pb_pass": "All of PoseBusters' checks hold: bonds, angles, rings, internal energy and fit in the pocket.",
}
CAPTION = "Atoms per molecule, all molecules; QED of the valid ones."
NO_CHECKS = ("pb_pass", "pb_checked")
LABELS = {"qed": "QED", "pb_pass": "PoseBusters", "clash_free": "clash-free"}


def write_report(
    output_dir: Path,
    rows: Sequence[Row],
    summary: Mapping[str, Row],
    molecules: Mapping[str, Sequence[Any]],
    settings: Mapping[str, Any],
) -> Path:
    """Write samples.html, one page that can be sent on its own, and its figure, samples.png. Returns the page's path.

    rows, summary: of `quality` for `molecules`; settings: how they were made, name -> value.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    everything = summary["all"]
    figure = _figure(rows)
    shown = picture(save_png(figure, output_dir / "samples.png"), CAPTION) if figure else ""
    path = output_dir / "samples.html"
    text = page(
        f"{len(rows):,} sampled molecules",
        f"in {len(molecules):,} pocket(s)",
        notes([_in_words(everything)], "learned"),
        notes(_warnings(rows), "warning"),
        _tiles(everything),
        section("Per pocket", _pockets(summary)),
        section("What fails most", _checks(everything)),
        section("Sizes and drug-likeness", shown) if shown else "",
        section("Molecules", _gallery(rows, molecules)),
        section("What the numbers mean", table(["", ""], [(_label(k), v) for k, v in MEANINGS.items()], kind="facts")),
        section("How they were made", table(["", ""], settings.items(), kind="facts")),
    )
    write_text(path, text)
    return path


@styled
def _figure(rows: Sequence[Row]) -> Figure | None:
    if not rows:
        return None
    figure = Figure(figsize=(9, 3))
    left, right = figure.subplots(1, 2)
    sizes = [row["atoms"] for row in rows]
    width = 1 + (max(sizes) - min(sizes)) // 40
    left.hist(sizes, bins=np.arange(min(sizes), max(sizes) + width + 1, width) - 0.5, color=PALETTE[0])
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set(xlabel="atoms", ylabel="molecules")
    right.hist([row["qed"] for row in rows if row["qed"] is not None], bins=20, range=(0, 1), color=PALETTE[2])
    right.set(xlabel="QED", ylabel="valid molecules")
    return figure


def draw(molecule: Any) -> str:
    """SVG of the largest fragment; empty without atoms. What RDKit cannot sanitise is drawn as it was built."""
    chem, drawing = optional("rdkit.Chem", "sample"), optional("rdkit.Chem.Draw.rdMolDraw2D", "sample")
    fragment = largest_fragment(molecule)
    if fragment is None:
        return ""
    with optional("rdkit.rdBase", "sample").BlockLogs():
        valid = sanitised(fragment)
        flat = chem.Mol(fragment if valid is None else valid)
        flat.RemoveAllConformers()
        flat.UpdatePropertyCache(strict=False)
        chem.FastFindRings(flat)
        optional("rdkit.Chem.rdDepictor", "sample").Compute2DCoords(flat)
        canvas = drawing.MolDraw2DSVG(WIDTH, HEIGHT)
        canvas.drawOptions().prepareMolsBeforeDrawing = valid is not None
        canvas.drawOptions().clearBackground = False
        canvas.DrawMolecule(flat)
        canvas.FinishDrawing()
    return str(canvas.GetDrawingText()).partition("?>")[2].strip()


def _label(name: str) -> str:
    return LABELS.get(name, name.removeprefix("pb_").replace("_", " "))


def _share(value: float | None) -> str:
    return "—" if value is None else f"{_bare(value)}\N{NO-BREAK SPACE}%"


def _bare(value: float | None) -> str:
    """A share in a column of shares."""
    return "—" if value is None else f"{100 * value:.0f}"


def _score(value: float | None) -> str:
    return "—" if value is None else number(value, 2)


def _in_words(everything: Row) -> str:
    if not everything["number"]:
        return "No molecules were sampled."
    parts = [f"{_share(everything['valid'])} of the molecules are valid"]
    if everything["uniqueness"] is not None:
        parts.append(f"{_share(everything['uniqueness'])} of these differ from each other")
        parts.append(f"{_share(everything['novelty'])} of the different ones are new")
    if everything["pb_pass"] is not None:
        parts.append(f"{_share(everything['pb_pass'])} of all pass every check of PoseBusters")
    return "; ".join(parts) + "."


def _warnings(rows: Sequence[Row]) -> list[str]:
    failed = sum(row["pb_pass"] is None for row in rows)
    if not failed:
        return []
    return [f"PoseBusters could not check {failed} of {len(rows)} molecules; its shares leave them out."]


def _tiles(everything: Row) -> str:
    return tiles(
        [
            ("Valid", _share(everything["valid"]), f"{_share(everything['connected'])} in one piece"),
            ("QED", _score(everything["qed"]), "drug-likeness of the valid, 0 to 1"),
            ("Diversity", _score(everything["diversity"]), "within a pocket; 0: all alike"),
            ("PoseBusters", _share(everything["pb_pass"]), f"{_share(everything['clash_free'])} without a clash"),
        ]
    )


def _pockets(summary: Mapping[str, Row]) -> str:
    means = ("qed", "diversity")
    rows = [
        (
            name,
            *(
                _score(part[key]) if key in means else f"{part[key]:,}" if key == "number" else _bare(part[key])
                for key in MEANINGS
            ),
        )
        for name, part in summary.items()
    ]
    remark = "Shares in %; QED and diversity from 0 to 1."
    return table(["", *map(_label, MEANINGS)], rows) + notes([remark], "remark")


def _checks(everything: Row) -> str:
    shares = {name: share for name, share in everything.items() if name.startswith("pb_") and name not in NO_CHECKS}
    failing = sorted(
        ((1 - share, name) for name, share in shares.items() if share is not None and share < 1), reverse=True
    )
    if not shares:
        return notes(["PoseBusters checked no molecule."], "remark")
    if not failing:
        return notes([f"All {len(shares)} checks of PoseBusters hold for all molecules."], "remark")
    remark = (
        f"The other {len(shares) - len(failing)} checks hold for all. One that cannot be made, since the molecule is "
    )
    header = ["check of PoseBusters", "molecules that fail"]
    body = table(header, [(_label(name), _share(share)) for share, name in failing])
    return body + notes([remark + "invalid, counts as failed."], "remark")


def _gallery(rows: Sequence[Row], molecules: Mapping[str, Sequence[Any]]) -> str:
    """Of each pocket the molecules with the highest QED; the invalid come last."""
    parts = []
    pockets = [name for name, group in molecules.items() if group]
    for name in pockets[:POCKETS]:
        pairs = zip((row for row in rows if row["pocket"] == name), molecules[name], strict=True)
        ranked = sorted(pairs, key=lambda pair: -1.0 if pair[0]["qed"] is None else pair[0]["qed"], reverse=True)
        parts.append(heading(name))
        cards = "".join(_card(row, molecule) for row, molecule in ranked[:PICTURES])
        parts.append(f'<div style="{GRID}">{cards}</div>')
        if len(ranked) > PICTURES:
            rest = f"The {PICTURES} with the highest QED; {len(ranked) - PICTURES} more are not shown."
            parts.append(notes([rest], "remark"))
    if len(pockets) > POCKETS:
        parts.append(notes([f"The first {POCKETS} pockets; {len(pockets) - POCKETS} more are not shown."], "warning"))
    return "".join(parts) if pockets else notes(["There are none."], "remark")


def _card(row: Row, molecule: Any) -> str:
    facts = ["invalid" if row["qed"] is None else f"QED {row['qed']:.2f}"]
    if row["fragments"] > 1:
        facts.append(f"largest of {row['fragments']} parts")
    if row["clashes"]:
        facts.append("1 clash" if row["clashes"] == 1 else f"{row['clashes']} clashes")
    if row["pb_pass"]:
        facts.append("passes PoseBusters")
    caption = escape(f"{row['number']}: {', '.join(facts)}")
    return f'<figure title="{escape(row["smiles"])}">{draw(molecule)}<figcaption>{caption}</figcaption></figure>'
