"""Ligand and protein files -> one HDF5 file of complexes for the diffusion engine (`layout` describes it).

The file appears whole or not at all, memory does not grow with the data, and the number of worker processes does not
change a byte of it. A pair that cannot be used is left out and listed with its reason. Legend: n ligand atoms, M atoms
of a protein.
"""

from __future__ import annotations

import csv
import functools
import importlib.metadata
import itertools
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jsonargparse.typing import PositiveFloat, PositiveInt
from tqdm import tqdm

from gdyn.engines.diffusion import crossdocked, layout
from gdyn.engines.diffusion.complexes import Complex
from gdyn.engines.diffusion.sources import (
    PROTEIN_NAME,
    File,
    Ligand,
    Pair,
    Protein,
    Skipped,
    Source,
    open_source,
    optional,
    read_ligand,
    read_pairs,
    read_protein,
)
from gdyn.errors import UserError

SAME_ATOM = 0.1
"""Å: a protein atom so close to one of the ligand is the ligand's own."""
BLOCK = 256
"""Complexes written at once."""
CHUNK = 4096
"""Rows of a chunk of the file: a complex touches one or two."""
AHEAD = 8
"""Pairs per worker that are under way."""

log = logging.getLogger("gdyn")


@dataclass(frozen=True)
class Preparation:
    """Turn pairs of a ligand and a protein file into one file of ligands in their pockets."""

    inputs: list[Path]
    """Folders (searched to the bottom) or .tar archives of <id>_ligand.sdf (.mol, .mol2) with <id>_protein.pdb or
    <id>_pocket10.pdb (.cif), gzipped or not; or .csv and .tsv tables of two paths, pocket and ligand."""
    output: Path
    """The HDF5 file to write."""
    radius: PositiveFloat = 10.0
    """The pocket is all protein atoms within so many Å of any ligand atom."""
    hydrogens: bool = False
    """Keep the ligand's hydrogens. Those of the pocket are never kept."""
    lmdb: Path | None = None
    """Instead of inputs: an LMDB of pickles, as CrossDocked2020 is distributed for TargetDiff."""
    unsafe_unpickle: bool = False
    """Read the pickles of --lmdb. They can rebuild arrays only, but read none of a source that you do not trust."""
    split: Path | None = None
    """The .pt file that says which entries of --lmdb belong to which part."""
    part: str = "train"
    """The part of --split to take."""
    workers: PositiveInt = 1
    """Processes that share the pairs."""
    overwrite: bool = False
    """Replace a file prepared earlier."""


def prepare(job: Preparation) -> int:
    """Write the file, and beside it OUTPUT.skipped.tsv if anything is left out. Returns the number of complexes.

    Raises: MissingFile, UserError if there is nothing to read, nothing usable in it, or the output must stay.
    """
    skipped: list[Skipped] = []
    taken: set[str] = set()
    with _all_or_nothing(job.output, job.overwrite) as partial:
        total, results = _lmdb_complexes(job) if job.lmdb else _pair_complexes(job)
        with (
            h5py.File(partial, "w") as file,
            tqdm(total=total, unit="complex", desc=job.output.name, disable=None) as bar,
        ):
            writer = _Writer(file)
            for result in results:
                bar.update()
                if isinstance(result, Complex) and result.identifier in taken:
                    result = Skipped(result.identifier, "an earlier complex has this identifier.")
                if isinstance(result, Skipped):
                    skipped.append(result)
                else:
                    taken.add(result.identifier)
                    writer.add(result)
            if not taken:
                raise UserError(f"nothing usable for {job.output}: {_summary(skipped)}")
            writer.finish()
            file.attrs.update(
                layout=layout.LAYOUT,
                version=layout.VERSION,
                radius=job.radius,
                hydrogens=job.hydrogens,
                provenance=json.dumps(_provenance(job)),
            )
        atoms = f"{writer.rows['ligand'] / len(taken):.1f} ligand and {writer.rows['pocket'] / len(taken):.1f} pocket"
        _write_skipped(job.output, skipped)
    log.info("wrote %s: %d complexes, on average %s atoms", job.output, len(taken), atoms)
    if skipped:
        log.info("left out %d, listed in %s: %s", len(skipped), _list_of_skipped(job.output), _summary(skipped))
    return len(taken)


def cut(identifier: str, ligand: Ligand, protein: Protein, radius: float) -> Complex:
    """The complex of a ligand and the protein atoms within `radius` Å of any of its atoms, the pocket's mean at the
    origin.

    Raises: UserError if there are none, or the protein contains the ligand.
    """
    distances = _nearest(protein.positions, ligand.positions)
    inside = distances <= radius
    if not inside.any():
        raise UserError(
            f"no protein atom is within {radius:g} Å of the ligand, the closest is {distances.min():.1f} Å away; are "
            "both in one frame?"
        )
    if distances.min() < SAME_ATOM:
        atom = {name: column[distances.argmin()] for name, column in protein.columns.items()}
        raise UserError(
            f"the protein contains the ligand or overlaps with it: {atom['atom_name'].decode()} of "
            f"{atom['residue_name'].decode()} {atom['residue_number']} in chain {atom['chain'].decode()} is "
            f"{distances.min():.2f} Å from a ligand atom."
        )
    positions = protein.positions[inside]
    centre = positions.mean(0)
    columns = {name: column[inside] for name, column in protein.columns.items()}
    return Complex(
        identifier,
        ligand.smiles,
        centre,
        {"positions": (ligand.positions - centre).astype(np.float32)} | ligand.columns,
        {"positions": (positions - centre).astype(np.float32)} | columns,
    )


def _nearest(positions: np.ndarray, ligand: np.ndarray) -> np.ndarray:
    """(M,) distance of each position from the closest ligand atom, Å."""
    blocks = np.array_split(positions, 1 + len(positions) // 1024)
    return np.concatenate([np.linalg.norm(block[:, None] - ligand, axis=-1).min(1) for block in blocks])


def _pair_complexes(job: Preparation) -> tuple[int, Iterator[Complex | Skipped]]:
    """How many results there will be, and they, in the order of the inputs."""
    if not job.inputs:
        raise UserError("no input given; name a folder, a .tar archive or a table of pairs, or --lmdb.")
    if job.split or job.unsafe_unpickle:
        raise UserError("--split and --unsafe_unpickle are for --lmdb; leave them out.")
    for module in ("rdkit.Chem", "gemmi"):
        optional(module)
    sources = [open_source(path) for path in job.inputs]
    _warn_of_small_pockets(sources, job.radius)
    found: list[Skipped] = [skipped for source in sources for skipped in source.skipped]
    pairs = (pair for source in sources for pair in read_pairs(source))
    work = functools.partial(_read_pair, radius=job.radius, hydrogens=job.hydrogens)
    total = len(found) + sum(len(source.pairs) for source in sources)
    return total, itertools.chain(found, _in_order(work, pairs, job.workers))


def _lmdb_complexes(job: Preparation) -> tuple[int, Iterator[Complex | Skipped]]:
    assert job.lmdb is not None
    if job.inputs:
        raise UserError(f"--lmdb {job.lmdb} and {job.inputs[0]} both name the input; keep one.")
    if not job.unsafe_unpickle:
        raise UserError(
            f"{job.lmdb} holds pickles, which can contain code; if you trust where it comes from, add "
            "--unsafe_unpickle. Only arrays are rebuilt, anything else is refused."
        )
    log.warning(
        "reading pickles of %s: only arrays are rebuilt, other code is refused. Formal charges are not in it and "
        "are taken as zero.",
        job.lmdb,
    )
    total, files = crossdocked.entries(job.lmdb, job.split, job.part)
    work = functools.partial(_read_entry, radius=job.radius, hydrogens=job.hydrogens)
    return total, _in_order(work, files, job.workers)


def _read_pair(pair: Pair | Skipped, radius: float, hydrogens: bool) -> Complex | Skipped:
    if isinstance(pair, Skipped):
        return pair
    try:
        return cut(pair.identifier, read_ligand(pair.ligand, hydrogens), read_protein(pair.protein), radius)
    except UserError as error:
        return Skipped(pair.identifier, str(error))


def _read_entry(entry: File, radius: float, hydrogens: bool) -> Complex | Skipped:
    try:
        identifier, ligand, protein = crossdocked.read_entry(entry, hydrogens)
        return cut(identifier, ligand, protein, radius)
    except UserError as error:
        return Skipped(entry.name, str(error))


def _in_order(
    work: Callable[[Any], Complex | Skipped], items: Iterable[Any], workers: int
) -> Iterator[Complex | Skipped]:
    """`work` of each item in the items' order, a few items ahead."""
    if workers == 1:
        yield from map(work, items)
        return
    waiting: deque[Future[Complex | Skipped]] = deque()
    # spawn: forking a process that has loaded threaded libraries can hang
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) == AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError("a worker process was killed, probably for want of memory; use fewer --workers.") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _warn_of_small_pockets(sources: list[Source], radius: float) -> None:
    """A file named pocket10 ends 10 Å from the ligand."""
    names = [names.protein for source in sources for names in source.pairs]
    shells = [int(match["shell"]) for name in names if (match := PROTEIN_NAME.fullmatch(name)) and match["shell"]]
    small = [shell for shell in shells if shell < radius]
    if small:
        log.warning(
            "%d pocket files were cut at %d Å, less than the radius of %g Å: what lies beyond is missing.",
            len(small),
            min(small),
            radius,
        )


class _Writer:
    """Appends complexes to the arrays of an open file, a block at a time."""

    def __init__(self, file: h5py.File):
        self.file = file
        self.rows = dict.fromkeys(layout.COLUMNS, 0)
        self.block: list[Complex] = []
        for part, columns in layout.COLUMNS.items():
            for name, (kind, tail) in columns.items():
                self._create(f"{part}/{name}", kind, tail)
            self._create(f"{part}/offsets", "i8", ())
            self._append(f"{part}/offsets", np.zeros(1, np.int64))
        self._create("centre", "f8", (3,))
        for name in ("identifier", "ligand/smiles"):
            self._create(name, h5py.string_dtype(), ())

    def add(self, entry: Complex) -> None:
        self.block.append(entry)
        if len(self.block) == BLOCK:
            self._write()

    def finish(self) -> None:
        if self.block:
            self._write()
        self.file["ligand/sizes"] = np.bincount(np.diff(self.file["ligand/offsets"][...]))

    def _write(self) -> None:
        for part, columns in layout.COLUMNS.items():
            entries = [getattr(entry, part) for entry in self.block]
            for name in columns:
                self._append(f"{part}/{name}", np.concatenate([entry[name] for entry in entries]))
            ends = self.rows[part] + np.cumsum([len(entry["positions"]) for entry in entries])
            self._append(f"{part}/offsets", ends)
            self.rows[part] = int(ends[-1])
        self._append("centre", np.array([entry.centre for entry in self.block]))
        self._append("identifier", [entry.identifier for entry in self.block])
        self._append("ligand/smiles", [entry.smiles for entry in self.block])
        self.block = []

    def _create(self, name: str, kind: Any, tail: tuple[int, ...]) -> None:
        self.file.create_dataset(name, (0, *tail), kind, maxshape=(None, *tail), chunks=(CHUNK, *tail))

    def _append(self, name: str, values: Any) -> None:
        array = self.file[name]
        start = len(array)
        array.resize(start + len(values), axis=0)
        array[start:] = values


def _provenance(job: Preparation) -> dict[str, Any]:
    packages = ("gdyn", "rdkit", "gemmi", "h5py")
    return {
        "inputs": [path.name for path in ([job.lmdb] if job.lmdb else job.inputs)],
        "part": job.part if job.split else None,
        "versions": {package: importlib.metadata.version(package) for package in packages if _installed(package)},
    }


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _list_of_skipped(output: Path) -> Path:
    return output.with_name(f"{output.name}.skipped.tsv")


def _write_skipped(output: Path, skipped: list[Skipped]) -> None:
    path = _list_of_skipped(output)
    if not skipped:
        path.unlink(missing_ok=True)  # an earlier file's
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([Skipped._fields, *skipped])


def _summary(skipped: list[Skipped]) -> str:
    """The first of what is left out, in a sentence."""
    if not skipped:
        return "no <id>_ligand.sdf with <id>_protein.pdb or <id>_pocket10.pdb was found."
    first = skipped[0]
    more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
    return f"{first.identifier}{more}: {first.reason}"


@contextmanager
def _all_or_nothing(output: Path, overwrite: bool) -> Iterator[Path]:
    """A file beside the output that takes its place if the block succeeds and vanishes if not.

    Raises: UserError if the output exists and must stay, or cannot be written.
    """
    if output.is_dir():
        raise UserError(f"{output} is a folder; name a file.")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists; choose another --output or add --overwrite.")
    partial = output.absolute().with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise UserError(f"cannot write beside {output}: {error}") from None
    try:
        yield partial
        partial.replace(output)
    except UserError:  # a missing input is an OSError, too
        raise
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
