"""What every engine's report is made of: figure style, training curves, one self-contained HTML page, no scripts."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from gdyn.rundir import read_metrics

if TYPE_CHECKING:
    from gdyn.inference import Run

# Okabe and Ito's colours, which colour-blind readers can tell apart, then Tol's for those who have many states.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#882255", "#999933", "#444444", "#AA9988")
INK, PALE, SHADE = "#1f2933", "#8896a5", "#e4e7eb"

STYLE: Any = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": SHADE,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}

styled = matplotlib.rc_context(STYLE)
"""Decorator of functions that draw."""


def colour(i: int) -> str:
    return PALETTE[i % len(PALETTE)]


def number(value: float, digits: int = 3) -> str:
    """As a person writes it: 0.0123, 113, 21,500; an em dash for what is not known."""
    if not math.isfinite(value):
        return "—"
    if abs(value) >= 10**digits:
        return f"{float(f'{value:.{digits}g}'):,.0f}"
    return f"{value:.{digits}g}"


def save_png(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    path.write_bytes(buffer.getvalue())
    return path


@styled
def training_figure(metrics_jsonl: Path, scores: Sequence[tuple[str, str]] = ()) -> Figure | None:
    """Loss, one panel a phase because objectives have different scales, above the `scores` (key, label), one row each,
    over all phases with their boundaries marked. None if nothing was logged yet."""
    rows = [row for row in read_metrics(metrics_jsonl) if row["split"] in ("train", "validation")]
    if not rows:
        return None
    phases = [(str(name), list(part)) for name, part in groupby(rows, key=lambda row: row["phase"])]
    scores = [(key, label) for key, label in scores if any(key in row for row in rows)]
    figure = Figure(figsize=(9, 2.6 + 2.4 * len(scores)))
    grid = figure.add_gridspec(1 + len(scores), len(phases))
    for i, (name, part) in enumerate(phases):
        axes = figure.add_subplot(grid[0, i])
        _curves(axes, part, "loss")
        axes.set(title=f"phase {name}", xlabel="optimizer step", ylabel="loss" if i == 0 else "")
        if i == 0:
            axes.legend()
    for i, (key, label) in enumerate(scores, 1):
        axes = figure.add_subplot(grid[i, :])
        for _, part in phases:
            _curves(axes, part, key)
        for _, part in phases[1:]:
            axes.axvline(part[0]["step"], color=PALE, linestyle=":", linewidth=1.2)
        axes.set(xlabel="optimizer step", ylabel=label)
    return figure


def _curves(axes: Any, rows: Sequence[dict[str, Any]], key: str) -> None:
    for split, tint, marker in (("train", PALETTE[5], ""), ("validation", PALETTE[0], "o")):
        points = [(row["step"], row[key]) for row in rows if row["split"] == split and row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=tint, marker=marker, markersize=3.5, label=split)


def how_made(run: Run) -> dict[str, Any]:
    """How the run was made, for the page."""
    last = (run.dir.starts() or [{}])[-1]
    return {
        **run.config.hyper_parameters,
        "parameters": f"{sum(p.numel() for p in run.model.parameters()):,}",
        "checkpoint": run.tag,
        "git commit": last.get("git_commit") or "unknown",
        "versions": ", ".join(f"{name} {version}" for name, version in last.get("versions", {}).items() if version),
        "run folder": run.dir.path,
    }


def plain(values: np.ndarray) -> Any:
    """Nested lists for JSON, which knows neither NaN nor infinity: None."""
    if np.issubdtype(values.dtype, np.floating):
        unknown = ~np.isfinite(values)
        values = values.astype(object)
        values[unknown] = None
    return values.tolist()


def table(header: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "numbers") -> str:
    """Text is escaped; the first column names the row. `kind`: "numbers" or "facts", long text."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    body = "".join(
        f"<tr><th>{escape(str(first))}</th>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return f'<div class="scroll"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def picture(path: Path, caption: str) -> str:
    """A PNG inside the page, so that the page can be sent on its own."""
    data = base64.b64encode(path.read_bytes()).decode()
    text = escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def tiles(facts: Iterable[tuple[str, str, str]]) -> str:
    """The few numbers to remember: (name, value, remark)."""
    cells = (
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(remark)}</small></div>'
        for name, value, remark in facts
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def notes(sentences: Sequence[str], kind: str) -> str:
    """A box of sentences; `kind`: "learned", "warning" or "remark". Empty without sentences."""
    lines = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f'<div class="box {kind}">{lines}</div>' if lines else ""


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def page(title: str, subtitle: str, *parts: str) -> str:
    """The whole HTML document. `parts` are HTML from the functions above."""
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head><body><main>'
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>{''.join(parts)}</main></body></html>\n"
    )


_CSS = """
body { margin: 0; background: #f5f7fa; color: #1f2933; }
body { font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
* { box-sizing: border-box; }
main { max-width: 960px; margin: 0 auto; padding: 32px 24px 64px; }
header { border-bottom: 3px solid #0072B2; margin-bottom: 24px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
header p { color: #52606d; margin: 6px 0 14px; }
h2 { font-size: 20px; margin: 0 0 12px; }
h3 { font-size: 15px; margin: 14px 0 4px; color: #52606d; }
section { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px; padding: 20px 24px; margin: 20px 0; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin: 20px 0; }
@media (max-width: 700px) { .tiles { grid-template-columns: repeat(2, 1fr); } }
.tile { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px; padding: 14px 18px; }
.tile span, .tile small { display: block; color: #52606d; font-size: 13px; }
.tile b { font-size: 26px; font-weight: 600; }
.box { border-radius: 10px; padding: 4px 20px; margin: 20px 0; border-left: 5px solid; }
.box p { margin: 10px 0; }
.learned { background: #e8f2f9; border-color: #0072B2; font-size: 17px; }
.warning { background: #fdf3e1; border-color: #E69F00; }
.remark { border: 0; padding: 0; margin: 0; color: #52606d; font-size: 14px; }
figure { margin: 8px 0 16px; break-inside: avoid; }
img { display: block; width: 100%; height: auto; }
figcaption { color: #52606d; font-size: 14px; margin-top: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 8px 0 14px; font-size: 15px; }
.numbers { font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: right; border-bottom: 1px solid #e4e7eb; }
th:first-child { text-align: left; }
thead th { color: #52606d; font-weight: 600; font-size: 13px; border-bottom: 2px solid #cbd2d9; }
tbody th { font-weight: 600; }
.facts th { white-space: nowrap; vertical-align: top; }
.facts td { text-align: left; overflow-wrap: anywhere; }
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } }
"""
