"""Raw trajectories -> trajectory directories for the Vamp engine (the files are described in `frames`).

The directory appears whole or not at all, memory does not grow with the trajectory, and the number of worker processes
does not change the result. Legend: F frames, N atoms, k neighbours.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from tqdm import tqdm

from gdyn.engines.vamp.frames import MAX_ATOM_TYPE, NAMES, Trajectory
from gdyn.engines.vamp.neighbours import KNearest, Perovskite
from gdyn.engines.vamp.sources import Frame, Reader, Source, open_source
from gdyn.errors import UserError

TYPES, TARGETS, LISTS, DISTS, DIRECTIONS = NAMES
PROVENANCE = "prepare.json"
BLOCKS_PER_WORKER = 16
"""Pieces a worker's share is cut into, for an even load and a progress bar that moves."""

BATCH_PAIRS = 2**18
"""Atom pairs handled at once where many small frames share one NumPy call."""
TINY_VOLUME = 1e-3
"""Å³"""

log = logging.getLogger("gdyn")


@dataclass(frozen=True)
class Preparation:
    """Turn one trajectory into a directory of graphs: the k nearest neighbours of every atom in every frame."""

    inputs: list[Path]
    """One .npz (GDyNet's layout), one file that ASE reads (.extxyz, .traj, XDATCAR, ...), or a topology and its
    trajectories for MDAnalysis (.pdb/.gro/.tpr/.psf/.data + .xtc/.dcd/.trr/...)."""
    output: Path
    """The directory to write."""
    neighbours: PositiveInt | None = None
    """Neighbours per atom; default 12, or all other atoms of a smaller system with open boundaries."""
    select: str | None = None
    """The target atoms as an MDAnalysis selection, e.g. "element Li" or "resname ALA and name CA"."""
    target_index: list[NonNegativeInt] | Path | None = None
    """The target atoms as indices into the input (from 0), or a .npy file of them; default: those an .npz holds."""
    atoms: str | None = None
    """The atoms that form the graph as an MDAnalysis selection, e.g. "protein and not element H"; default all."""
    atom_labels: bool = False
    """Give every atom a type of its own, 1..N, instead of its atomic number; for molecules, where the place in the
    molecule says more than the element."""
    start: NonNegativeInt = 0
    """First frame."""
    stop: PositiveInt | None = None
    """The frame to stop before; default: the end."""
    stride: PositiveInt = 1
    """Take every stride-th frame."""
    max_cutoff: PositiveFloat = 20.0
    """Å within which every atom must have its neighbours."""
    open_boundaries: bool = False
    """Ignore the cell, e.g. for a whole molecule taken out of its solvent."""
    ferro: Perovskite | None = None
    """Write the local polarisation around every B atom of a perovskite, C/m², as atom directions."""
    frame_time: PositiveFloat | None = None
    """Time between frames of the input, if the file does not know it."""
    time_unit: str | None = None
    """Its unit; default: what the file says, else ps."""
    reader: Reader = "auto"
    """Who reads the input."""
    atomic_numbers: dict[str, int] | None = None
    """Atom type in the topology -> atomic number, for topologies without elements (LAMMPS): --atomic_numbers.1 56."""
    workers: PositiveInt = 1
    """Processes that share the frames."""
    overwrite: bool = False
    """Replace a directory prepared earlier."""


def prepare(job: Preparation) -> dict[str, Any]:
    """Write the directory and return its provenance, which also lies in it as prepare.json.

    Raises: MissingFile, UserError naming file, frame and atom.
    """
    source = open_source(job.inputs, job.reader, job.atomic_numbers)
    frames = range(source.n_frames)[job.start : job.stop : job.stride]
    if not frames:
        wanted = f"{job.start}:{'' if job.stop is None else job.stop}:{job.stride}"
        raise UserError(f"frames {wanted} are none of the {source.n_frames} in {job.inputs[-1]}.")
    kept = source.select(job.atoms) if job.atoms else np.arange(len(source.atom_types))
    targets = _targets(job, source, kept)
    types = _types(job, source.atom_types[kept])
    k = _neighbours(job, source, frames[:1], len(kept))
    if job.ferro:
        job.ferro.check(source.atom_types)
    with _all_or_nothing(job.output, job.overwrite) as folder:
        np.save(folder / TYPES, types)
        np.save(folder / TARGETS, targets)
        widths = {LISTS: k, DISTS: k} | ({DIRECTIONS: 3} if job.ferro or source.has_directions else {})
        _allocate(folder, {name: (len(frames), len(kept), width) for name, width in widths.items()})
        farthest = _fill_all(job, folder, frames, kept)
        found = {
            "frames": len(frames),
            "atoms": len(kept),
            "targets": len(targets),
            "neighbours": k,
            "farthest_neighbour": round(farthest, 4),
            **_time(job, source),
        }
        text = json.dumps(found | _provenance(job), indent=2, default=str)
        (folder / PROVENANCE).write_text(text + "\n")
    log.info("wrote %s: %s; the model's cutoff should reach the farthest neighbour", job.output, _sentence(found))
    return found


def check(directory: Path, ferro: bool = False) -> str:
    """Read a whole trajectory directory and say what it holds.

    Args:
        directory: a trajectory directory.
        ferro: atom directions must be there too.

    Raises: MissingFile, UserError naming what is wrong.
    """
    trajectory = Trajectory(directory, ferro)
    for frames in _blocks(range(len(trajectory)), size=max(1, 2**20 // len(trajectory.atom_types))):
        trajectory.frames(np.array(frames))
    atoms, targets = len(trajectory.atom_types), len(trajectory.target_index)
    return f"✓ Data valid: {atoms} atoms, {targets} targets, {len(trajectory)} frames"


def _targets(job: Preparation, source: Source, kept: np.ndarray) -> np.ndarray:
    """(n,) int32 among the kept atoms."""
    if job.select and job.target_index is not None:
        raise UserError("--select and --target_index both name the targets; keep one.")
    if job.select:
        wanted = source.select(job.select)
    elif isinstance(job.target_index, Path):
        try:
            wanted = np.atleast_1d(np.load(job.target_index, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            where = f"--target_index {job.target_index}"
            raise UserError(f"{where} is neither a .npy file ({error}) nor a list like [4, 7].") from None
    elif job.target_index is not None:
        wanted = np.array(job.target_index)
    elif source.target_index is not None:
        wanted = source.target_index
    elif job.ferro:
        wanted = np.flatnonzero(~np.isnan(job.ferro.charges("b", source.atom_types)))
    else:
        raise UserError('which atoms are the targets? Say --select "element Li", for example, or --target_index "[4]".')
    if wanted.ndim != 1 or not len(wanted) or wanted.dtype.kind not in "iu":
        raise UserError(f"target_index is {wanted.dtype} {wanted.shape}; a row of at least one atom index expected.")
    lost = np.setdiff1d(wanted, kept)
    if len(lost):
        raise UserError(f"target atom {lost[0]} is not among the {len(kept)} atoms of the graph; indices start at 0.")
    return np.searchsorted(kept, wanted).astype(np.int32)


def _types(job: Preparation, numbers: np.ndarray) -> np.ndarray:
    """(N,) int32 within the model's table of atom types."""
    if job.atom_labels:
        numbers = np.arange(1, len(numbers) + 1)
    if numbers.min() < 0 or numbers.max() > MAX_ATOM_TYPE:
        raise UserError(f"atom types are {numbers.min()}..{numbers.max()}; the model knows 0..{MAX_ATOM_TYPE}.")
    return numbers.astype(np.int32)


def _neighbours(job: Preparation, source: Source, first: range, atoms: int) -> int:
    frame = next(source.frames(first))
    if frame.cell is not None and not job.open_boundaries:
        return job.neighbours or 12
    k = job.neighbours or min(12, atoms - 1)
    if not 0 < k < atoms:
        raise UserError(f"{k} neighbours wanted, but {atoms} atoms with open boundaries have {atoms - 1} each.")
    return k


def _time(job: Preparation, source: Source) -> dict[str, Any]:
    """Time between the frames written."""
    step = job.frame_time or source.frame_time
    unit = job.time_unit or ("ps" if job.frame_time else source.time_unit)
    return {"frame_time": step * job.stride, "time_unit": unit}


def _provenance(job: Preparation) -> dict[str, Any]:
    versions = {}
    for package in ("gdyn", "numpy", "vesin", "MDAnalysis", "ase"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "source": [{"file": path.name, "bytes": path.stat().st_size} for path in job.inputs],
        "options": asdict(job),
        "versions": versions,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _sentence(found: dict[str, Any]) -> str:
    return (
        f"{found['frames']} frames of {found['frame_time']:g} {found['time_unit']}, {found['atoms']} atoms, "
        f"{found['targets']} targets, {found['neighbours']} neighbours up to {found['farthest_neighbour']:.2f} Å"
    )


@contextmanager
def _all_or_nothing(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside the output that takes its place if the block succeeds and vanishes if not.

    Raises: UserError if the output exists and must stay, or cannot be written.
    """
    if output.exists():
        if not overwrite:
            raise UserError(f"{output} exists; choose another --output or add --overwrite.")
        if not (output / PROVENANCE).exists():
            raise UserError(f"{output} has no {PROVENANCE}, so gdyn prepare did not make it; remove it yourself.")
    partial, old = (output.absolute().with_name(f".{output.name}.{os.getpid()}.{word}") for word in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write beside {output}: {error}") from None
    try:
        yield partial
        if output.exists():
            output.rename(old)
        partial.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _allocate(folder: Path, shapes: dict[str, tuple[int, int, int]]) -> None:
    """Arrays of full size, still empty. Raises: UserError if the disk is too full: a memory map would die of it."""
    needed, free = sum(4 * math.prod(shape) for shape in shapes.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{needed / 1e9:.1f} GB are needed, {folder.parent} has {free / 1e9:.1f} GB left; use --stride."
        )
    for name, shape in shapes.items():
        np.lib.format.open_memmap(folder / name, "w+", np.int32 if name == LISTS else np.float32, shape)


def _fill_all(job: Preparation, folder: Path, frames: range, kept: np.ndarray) -> float:
    """Fill the arrays in the folder; returns the largest distance, Å."""
    with tqdm(total=len(frames), unit="frame", desc=job.output.name, disable=None) as bar:
        if job.workers == 1:
            return _fill(job, folder, frames, 0, kept, bar)
        size = -(-len(frames) // (job.workers * BLOCKS_PER_WORKER))
        farthest = 0.0
        # spawn: forking a process that has loaded threaded libraries can hang
        with ProcessPoolExecutor(job.workers, mp_context=get_context("spawn")) as pool:
            futures = {}
            for number, block in enumerate(_blocks(frames, size)):
                futures[pool.submit(_fill, job, folder, block, number * size, kept)] = len(block)
            try:
                for future in as_completed(futures):
                    farthest = max(farthest, future.result())
                    bar.update(futures[future])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return farthest


def _fill(job: Preparation, folder: Path, frames: range, row: int, kept: np.ndarray, bar: tqdm | None = None) -> float:
    """Fill rows row, row + 1, ... of the arrays with these frames; returns the largest distance, Å."""
    source = open_source(job.inputs, job.reader, job.atomic_numbers)
    lists, dists = (np.lib.format.open_memmap(folder / name, "r+") for name in (LISTS, DISTS))
    path = folder / DIRECTIONS
    directions = np.lib.format.open_memmap(path, "r+") if path.exists() else None
    search = KNearest(lists.shape[2], job.max_cutoff)
    farthest = 0.0
    moments = (_checked(frame, job.open_boundaries) for frame in source.frames(frames))
    while batch := list(itertools.islice(moments, max(1, BATCH_PAIRS // len(kept) ** 2))):
        rows = slice(row, row + len(batch))
        lists[rows], dists[rows] = search.find([frame._replace(positions=frame.positions[kept]) for frame in batch])
        if directions is not None:
            directions[rows] = [_directions(frame, job.ferro, source.atom_types)[kept] for frame in batch]
        farthest = max(farthest, float(dists[rows].max()))
        row += len(batch)
        if bar is not None:
            bar.update(len(batch))
    return farthest


def _checked(frame: Frame, open_boundaries: bool) -> Frame:
    """The frame, without its cell if boundaries are open. Raises: UserError for coordinates or a cell that are none."""
    if not np.isfinite(frame.positions).all():
        atom = int(np.argmin(np.isfinite(frame.positions).all(axis=1)))
        where = f"frame {frame.number}: atom {atom} of the input is at {frame.positions[atom]}"
        raise UserError(f"{where}; repair or leave out the frame.")
    if open_boundaries or frame.cell is None:
        return frame._replace(cell=None, periodic=np.zeros(3, dtype=bool))
    if not np.isfinite(frame.cell).all() or abs(np.linalg.det(frame.cell)) < TINY_VOLUME:
        cell = frame.cell.tolist()
        raise UserError(f"frame {frame.number}: the cell {cell} has no volume; repair it or add --open_boundaries.")
    return frame


def _directions(frame: Frame, ferro: Perovskite | None, atom_types: np.ndarray) -> np.ndarray:
    """(N, 3) float32, finite."""
    directions = ferro.polarisation(frame, atom_types) if ferro else frame.directions
    if directions is None or not np.isfinite(directions).all():
        raise UserError(f"frame {frame.number}: a direction is missing or not finite; repair or leave out the frame.")
    return directions


def _blocks(frames: range, size: int) -> Iterator[range]:
    return (frames[first : first + size] for first in range(0, len(frames), size))
