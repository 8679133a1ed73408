"""What a monodecoder run learned: scores on other data, the alphabet explained, strings, figures, one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from matplotlib.figure import Figure

from gdyn.engine import plain_lines
from gdyn.engines.monodecoder import figures
from gdyn.engines.monodecoder.alphabet import MAPS, Alphabet
from gdyn.engines.monodecoder.encode import open_structures, write_strings
from gdyn.engines.monodecoder.engine import Monodecoder, Weights
from gdyn.engines.monodecoder.findings import learned, score_rows, warnings
from gdyn.engines.monodecoder.layout import AMINO_ACIDS, SECONDARY
from gdyn.engines.monodecoder.page import render
from gdyn.engines.monodecoder.scores import Letter, Reading, Survey, describe, read, scores, survey
from gdyn.errors import UserError
from gdyn.evaluation import evaluate_alone
from gdyn.report import how_made, number, save_png, training_figure
from gdyn.rundir import write_json, write_text

if TYPE_CHECKING:
    from gdyn.engines.monodecoder.structures import Structures
    from gdyn.inference import Run
    from gdyn.splits import Part

CURVES = (
    ("aa", "amino acids"),
    ("ss", "secondary structure"),
    ("edge", "contacts"),
    ("angles", "angles"),
    ("codebook_perplexity", "codebook perplexity"),
)
"""What is logged and the training figure shows beside the loss."""


def evaluate(run: Run, sources: Sequence[str]) -> dict[str, Any]:
    """Scores of the run's weights on prepared files, each computed once over all their structures (see `scores`), and
    the losses as a validation logs them. None: not defined for these structures.

    Raises: UserError, MissingFile for data that cannot be used.
    """
    structures = open_structures(run, sources)
    least_plddt = cast(Monodecoder, run.engine).least_plddt
    origin = {"run": str(run.dir.path), "checkpoint": run.tag, "data": list(sources), "least_plddt": least_plddt}
    found = scores(survey(run.model, structures, least_plddt))
    return origin | _known(found) | {"losses": _losses(run, structures)}


def report(run: Run, split: str = "test") -> dict[str, Any]:
    """Read the split's structures and write `predictions/` (their strings) and `analysis/` of the run folder. Returns
    what analysis_summary.json holds.

    Raises: UserError if the split has no data.
    """
    engine = cast(Monodecoder, run.engine)
    structures, sources = open_split(run, split)
    seen = survey(run.model, structures, engine.least_plddt)
    letters, found, names = describe(seen), scores(seen), names_of(seen.codes)
    (shown,) = read(run.model, structures, np.array([median_structure(seen)]), engine.least_plddt)
    for folder in (run.dir.predictions, run.dir.analysis):
        folder.mkdir(parents=True, exist_ok=True)
    strings = _write_strings(run.dir.predictions / f"{split}.fasta", structures, seen)
    drawn = draw(seen, letters, names, shown)
    training = training_figure(run.dir.metrics_jsonl, CURVES)
    if training is not None:
        drawn["training"] = training
    pictures = {name: save_png(figure, run.dir.analysis / f"{name}.png") for name, figure in drawn.items()}
    summary = {
        "run": run.dir.path.name,
        "checkpoint": run.tag,
        "split": split,
        "data": sources,
        "least_plddt": engine.least_plddt,
        "learned": learned(found),
        "warnings": warnings(found, [letter.share for letter in letters]),
        "scores": _known(found),
        "losses": _losses(run, structures),
        "letters": [_plain_letter(letter, names) for letter in letters],
        "shown": shown.identifier,
        "files": {
            "report": str(run.dir.report_html),
            "predictions": [str(path) for path in strings],
            "figures": [str(path) for path in pictures.values()],
        },
    }
    write_text(run.dir.report_html, render(summary, found, letters, names, shown, pictures, how_made(run)))
    write_json(run.dir.analysis / "analysis_summary.json", summary)
    return summary


def open_split(run: Run, split: str) -> tuple[Structures | Part[Structures], list[str]]:
    """(structures, files). Raises: UserError if the run has no such split."""
    engine = cast(Monodecoder, run.engine)
    if split != "test" and not engine.validation:  # each has a share of the training files
        return cast("Part", engine.datasets()[split]), list(engine.train)
    sources = list(getattr(engine, split) or [])
    if not sources:
        raise UserError(f"the run has no {split} structures; choose another --split, e.g. validation.")
    return open_structures(run, sources), sources


def draw(seen: Survey, letters: Sequence[Letter], names: Sequence[str], shown: Reading) -> dict[str, Figure]:
    """All figures by name."""
    return {
        "usage": figures.usage(letters, names),
        "protein": figures.protein(shown, letters),
        "strip": figures.strip(shown, letters, names),
        "confusion": figures.confusion(seen.residues["amino"], seen.residues["amino_decoded"]),
    }


def names_of(codes: int) -> list[str]:
    """What a page calls the letters: printable ones while there are enough, then numbers."""
    return list(Alphabet(codes).letters) if codes <= len(MAPS["printable"]) else [str(code) for code in range(codes)]


def median_structure(seen: Survey) -> int:
    """The place of the structure whose contacts come back as well as the median."""
    precision = seen.contacts["average_precision"]
    defined = np.flatnonzero(~np.isnan(precision))
    ranked = defined[np.argsort(precision[defined], kind="stable")]
    return int(ranked[len(ranked) // 2]) if len(ranked) else 0


def evaluation_lines(result: dict[str, Any]) -> list[str]:
    """What `gdyn evaluate` prints."""
    counts = {name: result[name] for name in ("checkpoint", "structures", "residues")}
    losses = {name: number(value, 4) for name, value in result["losses"].items()}
    return [*plain_lines(counts), "", *_score_lines(result), "", "losses, as training logs them", *plain_lines(losses)]


def report_lines(summary: dict[str, Any]) -> list[str]:
    """What `gdyn analyze` prints."""
    files = summary["files"]
    return [
        *_score_lines(summary["scores"]),
        "",
        *(f"warning: {sentence}" for sentence in summary["warnings"]),
        *(f"predictions  {path}" for path in files["predictions"]),
        f"report       {files['report']}",
    ]


def _score_lines(scores: Mapping[str, Any]) -> list[str]:
    rows = score_rows(scores)
    width = max(len(said) for said, *_ in rows)
    lines = [f"{'':<{width}}  {'decoded':>10}  {'without a structure':>19}"]
    lines += [f"{said:<{width}}  {value:>10}  {chance:>19}" for said, value, chance, _ in rows]
    used = f"{scores['codes_used']} of {scores['codes']}"
    return [
        *lines,
        f"{'letters used':<{width}}  {used:>10}",
        f"{'codebook perplexity':<{width}}  {number(scores['codebook_perplexity']):>10}",
    ]


def _losses(run: Run, structures: Structures | Part[Structures]) -> dict[str, float]:
    """The loss and its parts, as a validation logs them."""
    found = evaluate_alone(run.engine, run.model, structures, run.config.plan.phases[-1])
    parts = ("loss", *(field.name for field in fields(Weights)))
    return {name: float(found[name]) for name in parts if name in found}


def _write_strings(path: Path, structures: Structures | Part[Structures], seen: Survey) -> list[Path]:
    """The strings of the split as `gdyn encode` writes them, in the first alphabet with enough letters."""
    name = next((name for name, letters in MAPS.items() if len(letters) >= seen.codes), None)
    if name is None:
        return []
    cuts = np.cumsum(structures.sizes)[:-1]
    codes, amino = (np.split(seen.residues[field], cuts) for field in ("codes", "amino"))
    rows = zip(structures.identifiers, codes, amino, strict=True)
    table = path.with_suffix(".tsv")
    write_strings(path, table, Alphabet(seen.codes, name), rows)
    return [path, table]


def _plain_letter(letter: Letter, names: Sequence[str]) -> dict[str, Any]:
    factors = dict(zip(AMINO_ACIDS, np.round(2**letter.enrichment, 3).tolist(), strict=True))
    angles = dict(zip(("phi", "psi", "omega"), np.degrees(letter.angles).tolist(), strict=True))
    return {
        "letter": names[letter.code],
        "code": letter.code,
        "share": letter.share,
        "secondary": _known(dict(zip(SECONDARY, letter.secondary.tolist(), strict=True))),
        "degrees": _known(angles),
        "amino_acids": factors,
    }


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON, which knows no NaN: None."""
    return {
        name: _known(value) if isinstance(value, Mapping) else None if value != value else value
        for name, value in values.items()
    }
