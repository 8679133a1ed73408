"""What a terminal shows of a VAMP run: the numbers of a report and of an evaluation, as lines."""

from __future__ import annotations

from typing import Any

from gdyn.engine import plain_lines
from gdyn.report import number


def report_lines(summary: dict[str, Any]) -> list[str]:
    """The short tables of a report."""
    times, shares, lives = summary["timescales"], summary["populations"], summary["lifetimes"]
    lines = [f"{'process':>8} {'timescale':>12} {'95 % band':>22}   ({summary['unit']}, lag {number(summary['lag'])})"]
    for i, (value, lower, upper) in enumerate(_rows(times), 1):
        lines.append(f"{i:>8} {value:>12} {f'{lower} .. {upper}':>22}")
    lines += ["", f"{'state':>8} {'population':>12} {'95 % band':>22} {'lifetime':>12}"]
    for i, ((value, lower, upper), (life, *_)) in enumerate(zip(_rows(shares), _rows(lives), strict=True)):
        lines.append(f"{i:>8} {value:>12} {f'{lower} .. {upper}':>22} {life:>12}")
    lines += ["", *(f"warning: {sentence}" for sentence in summary["warnings"])]
    files = summary["files"]
    lines += [f"predictions  {path}" for path in files["predictions"]]
    return [*lines, f"report       {files['report']}"]


def evaluation_lines(result: dict[str, Any]) -> list[str]:
    """One line per number; scores do not include the constant singular function."""
    times = result["timescales"]
    return plain_lines(
        {
            "checkpoint": result["checkpoint"],
            "VAMP-1": f"{result['vamp1']:.6f}",
            "VAMP-2": f"{result['vamp2']:.6f}",
            "VAMP-E": f"{result['vampe']:.6f}",
            "singular values": "  ".join(f"{value:.6f}" for value in result["singular_values"]),
            f"timescales ({times['unit']}, lag {number(times['lag'])})": "  ".join(
                "—" if value is None else number(value, 4) for value in times["values"]
            ),
            "effective rank": result["effective_rank"],
        }
    )


def _rows(band: dict[str, Any]) -> list[list[str]]:
    """(value, lower, upper) of each entry, as text; a dash for what is not known."""
    columns = (band["values"], band["lower"], band["upper"])
    return [["—" if x is None else number(x) for x in row] for row in zip(*columns, strict=True)]
