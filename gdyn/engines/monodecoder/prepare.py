"""Structure files -> one HDF5 file in the layout of `layout`.

The inputs are cut into pieces of a few files. Worker processes, and MPI ranks, turn pieces into files of their own, and
rank 0 then copies these into one: so the result depends on neither, memory does not grow with the inputs, and a run
that was stopped goes on with the pieces that are missing. `positions` and the godnodes are alike in all structures of a
length, which share one copy of them by hard links.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import shutil
import signal
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from gdyn import __version__
from gdyn.engines.monodecoder.chains import Chain, Rule, Unusable, confidence, read_chains
from gdyn.engines.monodecoder.features import features, peptide_bonds
from gdyn.engines.monodecoder.layout import AMINO_ACIDS, LAYOUT, POSITION_BASE, POSITION_WIDTH, VERSION
from gdyn.engines.monodecoder.sources import PIECE, Entry, find, is_archive, pieces, same_identifier
from gdyn.errors import MissingFile, UserError
from gdyn.extras import optional
from gdyn.nn.positions import encode_positions

if TYPE_CHECKING:
    from gdyn.ranks import RankContext

FEWEST = 3
"""Residues: one in the middle has all its angles."""
FILE_FORMAT = ("v110", "v110")
"""HDF5 1.10 stores small groups and datasets in two thirds of the space that the oldest format takes."""
COMPRESSION: dict[str, Any] = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
FINGERPRINT = "fingerprint.json"

log = logging.getLogger("gdyn")


@dataclass(frozen=True)
class Preparation:
    """Turn protein structures into one HDF5 file of graphs for the Monodecoder engine, one structure per chain."""

    inputs: list[Path]
    """PDB and mmCIF files (.pdb, .ent, .cif, each also .gz), folders and .tar, .tar.gz or .tar.xz archives of them."""
    output: Path
    """The HDF5 file to write. What is not in it, and why, is listed beside it in OUTPUT.skipped.tsv."""
    plddt: Rule = "auto"
    """Whether the B-factor column is pLDDT; "auto" goes by what the file says of its origin, else by the numbers."""
    properties: Path | None = None
    """CSV of amino-acid properties: a column for each one-letter code, a row for each property; other columns are
    ignored, missing values are 0."""
    frames: bool = False
    """Give the encoder the absolute frame and step of each residue, as foldtree2 does; they turn with the molecule."""
    min_residues: PositiveInt = FEWEST
    """Skip shorter chains."""
    max_residues: PositiveInt = 3000
    """Skip longer chains: one of 3000 residues takes 1.5 GB of memory to prepare."""
    workers: PositiveInt = 1
    """Processes that share the files; under mpirun or srun: of each rank."""
    overwrite: bool = False
    """Replace a file prepared earlier."""


def prepare(job: Preparation, here: RankContext) -> dict[str, int]:
    """Write the file and say on rank 0 what it holds; returns the counts. Every rank must call this.

    Raises: MissingFile, UserError if nothing can be used or written, on all ranks.
    """
    folder = job.output.absolute().with_name(f".{job.output.name}.partial")
    with here.together():
        for package in ("gemmi", "pydssp"):
            optional(package)
        if job.output.exists() and not job.overwrite:
            raise UserError(f"{job.output} exists; choose another --output or add --overwrite.")
        if not FEWEST <= job.min_residues <= job.max_residues:
            limits = f"--min_residues {job.min_residues} and --max_residues {job.max_residues}"
            raise UserError(f"{limits} leave no chain; at least {FEWEST}, and no less than the first, are expected.")
        paths = list(find(job.inputs))
        properties = read_properties(job.properties) if job.properties else np.zeros((len(AMINO_ACIDS), 0))
        if here.main:
            _begin(folder, _fingerprint(job, paths, properties))
    with here.together():
        try:
            convert(job, paths, properties, folder, here)
        except KeyboardInterrupt:
            log.info("interrupted; what is finished is in %s, and the same command goes on from there", folder)
            raise
    with here.together():
        found = _merge(job, folder) if here.main else {}
    return found


def read_properties(path: Path) -> np.ndarray:
    """(20, P), in the order of AMINO_ACIDS. Raises: MissingFile, UserError."""
    if not path.is_file():
        raise MissingFile(f"--properties {path} is not a file; a CSV with a column for each amino acid expected.")
    try:
        rows = list(csv.DictReader(path.read_text("utf-8-sig").splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--properties {path} cannot be read as CSV: {error}.") from None
    missing = [letter for letter in AMINO_ACIDS if not rows or letter not in rows[0]]
    if missing:
        raise UserError(f"--properties {path} has no column or no row for {', '.join(missing)}; a header is needed.")
    values = np.zeros((len(AMINO_ACIDS), len(rows)))
    for column, row in enumerate(rows):
        for place, letter in enumerate(AMINO_ACIDS):
            text = (row[letter] or "").strip()
            try:
                values[place, column] = 0 if text.lower() in ("", "na", "nan") else float(text)
            except ValueError:
                where = f"--properties {path}: row {column + 1}, column {letter}"
                raise UserError(f'{where} is "{text}"; a number expected.') from None
    return values


def convert(job: Preparation, paths: list[Path], properties: np.ndarray, folder: Path, here: RankContext) -> None:
    """Turn this rank's share of the pieces that are not yet in the folder into parts there. Raises: UserError."""

    def wanted(number: int) -> bool:
        return number % here.world_size == here.rank and not _report(folder, number).exists()

    work = ((job, properties, folder, number, entries) for number, entries in pieces(paths, wanted))
    todo = PIECE * sum(wanted(number) for number in range(-(-len(paths) // PIECE)))
    total = None if any(is_archive(path.name) for path in paths) else min(todo, len(paths))
    with tqdm(total=total, unit="file", desc=job.output.name, disable=None if here.main else True) as bar:
        if job.workers == 1:
            for task in work:
                bar.update(_convert(*task))
            return
        # not fork: MPI and threads do not survive it
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__, "gemmi", "pydssp"])
        with ProcessPoolExecutor(job.workers, context, initializer=_leave_interrupts_to_the_parent) as pool:
            running: set[Future[int]] = set()
            try:
                for task in work:
                    running.add(pool.submit(_convert, *task))
                    if len(running) > 2 * job.workers:
                        running = _collect(running, bar)
                while running:
                    running = _collect(running, bar)
            except BrokenProcessPool:
                raise UserError(
                    "a worker process was killed, perhaps for want of memory; start again with fewer --workers or a "
                    "lower --max_residues: what is finished is kept."
                ) from None
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _collect(running: set[Future[int]], bar: tqdm) -> set[Future[int]]:
    """Wait for a task; what still runs."""
    done, running = wait(running, return_when=FIRST_COMPLETED)
    bar.update(sum(future.result() for future in done))
    return running


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _convert(job: Preparation, properties: np.ndarray, folder: Path, number: int, entries: list[Entry]) -> int:
    """Write a part, and its report last: with it the part counts. Returns how many entries it was made of."""
    report: dict[str, Any] = {"structures": [], "skipped": [], "decisions": Counter(), "incomplete": 0}
    with h5py.File(_part(folder, number), "w", libver=FILE_FORMAT) as file:
        for entry in entries:
            try:
                chains = read_chains(entry.name, entry.read())
            except Unusable as problem:
                report["skipped"].append([entry.source, "", str(problem)])
                continue
            for chain in chains:
                try:
                    _check(chain, job)
                    plddt, decision = confidence(chain, job.plddt)
                except Unusable as problem:
                    report["skipped"].append([entry.source, chain.identifier, str(problem)])
                    continue
                arrays = features(chain.letters, chain.backbone, plddt, properties, job.frames)
                _write(file.create_group(str(len(report["structures"]))), arrays)
                report["structures"].append([entry.source, chain.identifier, len(chain.letters)])
                report["decisions"][decision] += 1
                report["incomplete"] += chain.incomplete
    _write_json(_report(folder, number), report)
    return len(entries)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)


def _check(chain: Chain, job: Preparation) -> None:
    """Raises: Unusable."""
    length = len(chain.letters)
    if length < job.min_residues:
        raise Unusable(f"it has {length} residues with N, CA and C, less than --min_residues {job.min_residues}")
    if length > job.max_residues:
        raise Unusable(f"it has {length} residues, more than --max_residues {job.max_residues}")
    breaks = int((~peptide_bonds(chain.backbone)).sum())
    if breaks > max(1, length // 4):
        raise Unusable(f"its {length} residues are in {breaks + 1} pieces; it is no chain")


def _write(group: h5py.Group, arrays: dict[str, np.ndarray]) -> None:
    for name, values in arrays.items():
        packing = {"chunks": values.shape, **COMPRESSION} if values.size else {}
        group.create_dataset(name, data=values, **packing)


def _merge(job: Preparation, folder: Path) -> dict[str, int]:
    """Copy the parts into the output, list what was skipped, log both, and remove the parts. Raises: UserError."""
    reports = sorted(folder.glob("*.json"))
    reports.remove(folder / FINGERPRINT)
    merged, skipped = folder / "merged.h5", []
    taken: dict[str, str] = {}
    lengths: list[int] = []
    decisions: Counter[str] = Counter()
    incomplete = 0
    with h5py.File(merged, "w", libver=FILE_FORMAT) as file:
        structures = file.create_group("structs")
        shared = _Shared()
        for path in tqdm(reports, unit="part", desc="merging", disable=None):
            report = json.loads(path.read_text())
            skipped += report["skipped"]
            decisions.update(report["decisions"])
            incomplete += report["incomplete"]
            with h5py.File(path.with_suffix(".h5")) as part:
                for number, (source, identifier, length) in enumerate(report["structures"]):
                    # the object, not the text: one file may have two chains of a name
                    if taken.setdefault(identifier, source) is not source:
                        skipped.append([source, identifier, same_identifier(taken[identifier])])
                        continue
                    part.copy(str(number), structures, identifier)
                    shared.link(structures[identifier]["node"], length)
                    lengths.append(length)
        file["index/identifier"] = np.array(list(taken), dtype=h5py.string_dtype())
        file["index/residues"] = np.array(lengths, dtype=np.int32)
        file.attrs.update(layout=LAYOUT, version=VERSION, amino_acids=AMINO_ACIDS)
        file.attrs["prepared"] = json.dumps(
            {"gdyn": __version__, "properties": job.properties and job.properties.name, **_options(job)}
        )
    if not taken:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"no structure can be used, so nothing was written: {_reasons(skipped)}.")
    _finish(job, folder, merged, skipped)
    found = {"structures": len(lengths), "residues": sum(lengths), "skipped": len(skipped), "incomplete": incomplete}
    _tell(job, found, decisions, skipped)
    return found


class _Shared:
    """What depends on a structure's length alone: written once for each, linked to afterwards."""

    def __init__(self) -> None:
        self._of_length: dict[int, dict[str, h5py.Group]] = {}

    def link(self, node: h5py.Group, length: int) -> None:
        if length not in self._of_length:
            values = encode_positions(torch.arange(length), POSITION_WIDTH, POSITION_BASE).numpy()
            ones = np.ones((1, 5), np.float32)
            _write(node, {"positions/x": values, "godnode/x": ones, "godnode4decoder/x": ones})
            self._of_length[length] = {name: node[name] for name in ("positions", "godnode", "godnode4decoder")}
            return
        for name, group in self._of_length[length].items():
            node[name] = group


def _finish(job: Preparation, folder: Path, merged: Path, skipped: list[list[str]]) -> None:
    listing = skipped_list(job.output)
    if skipped:
        rows = ["source\tchain\treason", *("\t".join(" ".join(cell.split()) for cell in row) for row in skipped)]
        listing.write_text("\n".join(rows) + "\n")
    else:
        listing.unlink(missing_ok=True)
    merged.replace(job.output)
    shutil.rmtree(folder, ignore_errors=True)


def skipped_list(output: Path) -> Path:
    """The table of what a file does not hold, and why."""
    return output.with_name(f"{output.name}.skipped.tsv")


def read_skipped(output: Path) -> list[dict[str, str]]:
    """Its rows: source, chain, reason. None if nothing was skipped."""
    listing = skipped_list(output)
    return list(csv.DictReader(listing.open(), delimiter="\t", quoting=csv.QUOTE_NONE)) if listing.exists() else []


def _tell(job: Preparation, found: dict[str, int], decisions: Counter[str], skipped: list[list[str]]) -> None:
    size = job.output.stat().st_size
    log.info(
        "wrote %s: %d structures, %d residues, %.1f MB (%.0f bytes per residue)",
        *(job.output, found["structures"], found["residues"], size / 1e6, size / found["residues"]),
    )
    log.info("B-factors: %s", ", ".join(f"{words} in {count}" for words, count in decisions.most_common()))
    if found["incomplete"]:
        log.info("%d residues without a whole backbone (N, CA, C) were left out", found["incomplete"])
    if skipped:
        log.info("skipped %d, listed in %s: %s", len(skipped), skipped_list(job.output), _reasons(skipped))


def _reasons(skipped: list[list[str]], most: int = 5) -> str:
    counts = Counter(reason for *_, reason in skipped).most_common()
    told = [f"{count} x {reason}" for reason, count in counts[:most]]
    return "; ".join([*told, f"{len(counts) - most} other reasons"] if len(counts) > most else told)


def _begin(folder: Path, fingerprint: dict[str, Any]) -> None:
    """The folder of the parts, empty unless it is from the same inputs and options. Raises: UserError."""
    path = folder / FINGERPRINT
    if path.exists():
        before = json.loads(path.read_text())
        changed = [name for name in fingerprint if before.get(name) != fingerprint[name]]
        if not changed:
            log.info("going on with %d parts that an earlier run finished", len(list(folder.glob("*.json"))) - 1)
            return
        log.info("starting anew: other %s than in the run that left %s", ", ".join(changed), folder)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _write_json(path, fingerprint)
    except OSError as error:
        raise UserError(f"cannot write beside {folder}: {error}") from None


def _fingerprint(job: Preparation, paths: list[Path], properties: np.ndarray) -> dict[str, Any]:
    """What parts must have in common to be merged."""
    files = hashlib.sha256()
    for path in paths:
        status = path.stat()
        files.update(f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    values = hashlib.sha256(properties.tobytes()).hexdigest()
    return _options(job) | {"inputs": files.hexdigest(), "properties": values, "version": [__version__, VERSION]}


def _options(job: Preparation) -> dict[str, Any]:
    """Those that the result depends on, but for the properties."""
    return {name: getattr(job, name) for name in ("plddt", "frames", "min_residues", "max_residues")}


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:07d}.h5"


def _report(folder: Path, number: int) -> Path:
    return folder / f"{number:07d}.json"
