"""Structures to strings over the learned alphabet: a FASTA file and a table beside it."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import numpy as np
import torch

from gdyn.engines.monodecoder.alphabet import Alphabet, Map
from gdyn.engines.monodecoder.prepare import Preparation, prepare, read_skipped
from gdyn.engines.monodecoder.scores import BATCH_RESIDUES, UNKNOWN, amino_sequence, batches, codes_of, labels
from gdyn.errors import MissingFile, UserError

if TYPE_CHECKING:
    from gdyn.engines.monodecoder.engine import Monodecoder
    from gdyn.engines.monodecoder.structures import Structures
    from gdyn.inference import Run
    from gdyn.ranks import RankContext

PREPARED = (".h5", ".hdf5")
COLUMNS = ("identifier", "sequence", "residues", "codes", "hex", "amino_acids", "unknown")
"""Of the table: name, letters, their number, the codes in decimals, the bytes of the letters as MAFFT's hex2maffttext
takes them, amino acids (X: unknown), how many are unknown."""

Row = tuple[str, np.ndarray, np.ndarray]
"""Identifier, codes (L,), amino acids (L,) or UNKNOWN."""


def encode(
    run: Run,
    inputs: Sequence[str | Path],
    output: Path,
    here: RankContext,
    alphabet: Map = "printable",
    batch_residues: int = BATCH_RESIDUES,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the strings of all structures in `inputs`, in their order, to `output` and a table to its .tsv. Both files
    appear whole or not at all. Inputs are prepared .h5 files, or whatever `gdyn prepare proteins` reads.

    Returns counts, paths, and `unread`: why each structure that could not be read is left out.
    Raises: UserError, MissingFile; also if no structure can be read.
    """
    letters = Alphabet(codes_of(run.model), alphabet)
    paths = [Path(item) for item in inputs]
    table = _check_output(output, paths, overwrite)
    with tempfile.TemporaryDirectory(prefix="gdyn-encode-") as scratch:
        sources, unread = prepared(paths, Path(scratch), here)
        parts = [(name, open_structures(run, [str(source)], name)) for source, name in sources]
        _check_identifiers(parts)
        structures, residues = write_strings(
            output, table, letters, (row for _, part in parts for row in _rows(run, part, batch_residues))
        )
    return {
        "run": str(run.dir.path),
        "checkpoint": run.tag,
        "alphabet": alphabet,
        "letters": letters.codes,
        "structures": structures,
        "residues": residues,
        "unread": unread,
        "output": str(output),
        "table": str(table),
    }


def encode_lines(result: dict[str, Any]) -> list[str]:
    """What `gdyn encode` prints."""
    return [
        f"{result['structures']:,} structures, {result['residues']:,} residues in {result['letters']} letters "
        f"({result['alphabet']}), checkpoint {result['checkpoint']}",
        *(f"warning: {name} is left out: {reason}" for name, reason in result["unread"].items()),
        f"strings  {result['output']}",
        f"table    {result['table']}",
    ]


def prepared(inputs: Sequence[Path], scratch: Path, here: RankContext) -> tuple[list[tuple[Path, str]], dict[str, str]]:
    """(prepared files in the order of `inputs`, and what the user calls them; why structures were left out). Structure
    files, folders and archives are converted into `scratch`.

    Raises: MissingFile, UserError.
    """
    missing = next((path for path in inputs if not path.exists()), None)
    if missing is not None:
        raise MissingFile(f"{missing} does not exist; give prepared .h5 files, structure files, folders or archives.")
    files: list[tuple[Path, str]] = []
    unread: dict[str, str] = {}
    for ready, group in groupby(inputs, key=lambda path: path.suffix in PREPARED and path.is_file()):
        if ready:
            files += [(path, str(path)) for path in group]
            continue
        sources, converted = list(group), scratch / f"{len(files)}.h5"
        unread |= convert(sources, converted, here)
        files.append(
            (converted, ", ".join(map(str, sources)) if len(sources) < 4 else f"{sources[0]} to {sources[-1]}")
        )
    return files, unread


def convert(sources: list[Path], output: Path, here: RankContext) -> dict[str, str]:
    """Structure files into a prepared file. Returns why structures were left out, by name.

    Raises: UserError if there is none that can be read.
    """
    prepare(Preparation(inputs=sources, output=output), here)
    return {f"{row['source']} {row['chain']}".strip(): row["reason"] for row in read_skipped(output)}


def write_strings(output: Path, table: Path, alphabet: Alphabet, rows: Iterator[Row]) -> tuple[int, int]:
    """Write both files; returns the numbers of structures and residues."""
    structures = residues = 0
    # The FASTA file is renamed last, so that its presence means that both are whole.
    with _whole(output, alphabet.encoding) as fasta, _whole(table, "utf-8") as cells:
        writer = csv.writer(cells, delimiter="\t", lineterminator="\n")  # quotes fields in which letters are tabs
        writer.writerow(COLUMNS)
        for identifier, codes, amino in rows:
            text = alphabet.encode(codes)
            _write(fasta, f">{identifier}\n{text}\n", identifier)
            decimals, hexadecimals = " ".join(map(str, codes)), text.encode("latin-1").hex(" ")
            unknown = int((amino == UNKNOWN).sum())
            writer.writerow([identifier, text, len(codes), decimals, hexadecimals, amino_sequence(amino), unknown])
            structures, residues = structures + 1, residues + len(codes)
    return structures, residues


def _rows(run: Run, structures: Structures, batch_residues: int) -> Iterator[Row]:
    """Letters do not depend on the batch, but for codes equally near within rounding."""
    for indices in batches(structures.sizes, batch_residues):
        batch = structures[indices]
        with torch.inference_mode():
            codes = run.model.encode(batch).numpy()  # type: ignore[operator]
        amino = labels(batch["amino_acids"])
        ends = batch["lengths"].cumsum(0).tolist()
        for index, start, end in zip(indices, [0, *ends], ends, strict=False):
            yield structures.identifiers[index], codes[start:end], amino[start:end]


def open_structures(run: Run, sources: Sequence[str], named: str | None = None) -> Structures:
    """Prepared files as the run reads them. `named`: what messages call them.

    Raises: UserError if there is no structure in them, or not what the run was trained on; MissingFile.
    """
    structures, named = cast("Monodecoder", run.engine).structures(list(sources)), named or ", ".join(sources)
    if not len(structures):
        raise UserError(f"{named} holds no structure.")
    expected = run.model.encoder.features  # type: ignore[union-attr]
    if structures.feature_width != expected:
        raise UserError(
            f"the structures in {named} have {structures.feature_width} features per residue, the run was trained on "
            f"{expected}; prepare them with the options of the training data (gdyn prepare proteins), and give the "
            ".h5 file."
        )
    return structures


def _check_identifiers(parts: Sequence[tuple[str, Structures]]) -> None:
    """Raises: UserError if two structures have the same name."""
    seen: dict[str, str] = {}
    for source, part in parts:
        for identifier in part.identifiers:
            if identifier in seen:
                raise UserError(f"{identifier} is in {seen[identifier]} and again in {source}; give each once.")
            seen[identifier] = source


def _check_output(output: Path, inputs: Sequence[Path], overwrite: bool) -> Path:
    """The table's path. Raises: UserError, MissingFile before the work, not after it."""
    table = output.with_suffix(".tsv")
    if table == output:
        raise UserError(f"--output {output}: the table beside it has this name; choose another, e.g. .fasta.")
    if not output.parent.is_dir():
        raise MissingFile(f"--output {output}: the folder {output.parent} does not exist.")
    for path in (output, table):
        if path.is_dir():
            raise UserError(f"--output {output}: {path} is a folder.")
        if any(path.resolve() == item.resolve() for item in inputs):
            raise UserError(f"--output {output}: {path} is an input; choose another.")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; choose another --output, or replace it with --overwrite.")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"--output {output}: the folder {output.parent} cannot be written.")
    return table


def _write(file: TextIO, text: str, identifier: str) -> None:
    try:
        file.write(text)
    except UnicodeEncodeError:
        raise UserError(
            f"{identifier} cannot be a name in a {file.encoding} file; rename it, or choose --alphabet printable."
        ) from None


@contextmanager
def _whole(path: Path, encoding: str) -> Iterator[TextIO]:
    """A file that appears at `path` only when it is finished."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding=encoding, newline="") as file:  # letters may be line ends elsewhere
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
