"""Molecular-dynamics frames on disk as graphs with a fixed number of neighbours, read memory-mapped.

A trajectory is a directory (or the same files as an ordered list) of

    atom_types.npy       (N,)       atomic number, 0..99
    target_index.npy     (n,)       the atoms whose states are learned, 0 <= i < N
    nbr_lists.npy        (F, N, M)  M neighbours of every atom in every frame
    nbr_dists.npy        (F, N, M)  their distances, Å
    atom_directions.npy  (F, N, 3)  ferro only: a vector for every atom

Nothing is unpickled. Legend: F frames, N atoms, n targets, M neighbours, B frames of a batch.
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from gdyn.errors import MissingFile, UserError

NAMES = ("atom_types.npy", "target_index.npy", "nbr_lists.npy", "nbr_dists.npy", "atom_directions.npy")
PER_FRAME = {"nbr_lists": np.int32, "nbr_dists": np.float32, "atom_directions": np.float32}
"""The last three as tensors of a batch."""
MAX_ATOM_TYPE = 99
CHECKED_BYTES = 64 << 20
"""How much of a file is looked at before training; every other frame is checked when it is first read."""


class Trajectory:
    """One trajectory, validated and memory-mapped: resident memory does not grow with its length.

    Raises: MissingFile, UserError naming file, shapes and the rule that is broken.
    """

    def __init__(self, source: str | Path | Sequence[str | Path], ferro: bool = False):
        self.paths = _paths(source, ferro)
        self.ferro = ferro
        arrays = [_open(path) for path in self.paths]
        # Read whole; atleast_1d because a single target is often stored as a number.
        self.atom_types = _integers(np.atleast_1d(np.array(arrays[0]).squeeze()), self.paths[0])
        self.target_index = _integers(np.atleast_1d(np.array(arrays[1]).squeeze()), self.paths[1])
        self.frame_arrays = arrays[2:]
        self._seen = np.zeros(arrays[2].shape[:1], bool)  # frames that have been checked
        self._bytes_touched = 0
        self._check()

    def __reduce__(self) -> tuple[type[Trajectory], tuple[list[Path], bool]]:
        """A worker process maps the files itself; a pickled memory map is a copy of the whole file."""
        return Trajectory, (self.paths, self.ferro)

    def __len__(self) -> int:
        return len(self.frame_arrays[0])

    @property
    def n_frames(self) -> int:
        return len(self)

    def frames(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """nbr_lists (B, N, M) int32, nbr_dists (B, N, M) float32, atom_directions (B, N, 3) float32 for ferro.

        Raises: UserError naming the frame if a distance or direction is not finite or a neighbour is no atom.
        """
        batch = {}
        for (name, kind), array in zip(PER_FRAME.items(), self.frame_arrays, strict=False):
            # A view that is no memmap: those are slow to index.
            batch[name] = torch.from_numpy(np.asarray(array)[indices].astype(kind, copy=False))
        # Once is enough, and costs as much as the reading.
        if not self._seen[indices].all():
            self._check_frames(batch, indices)
            self._seen[indices] = True
        self._forget(sum(tensor.nbytes for tensor in batch.values()))
        return batch

    def _forget(self, nbytes: int) -> None:
        """Give mapped pages back now and then; the operating system keeps what it can in its cache."""
        self._bytes_touched += nbytes
        if self._bytes_touched > CHECKED_BYTES:
            self._bytes_touched = 0
            for array in self.frame_arrays:
                mapping = getattr(array, "_mmap", None)
                if mapping is not None and hasattr(mapping, "madvise"):
                    mapping.madvise(mmap.MADV_DONTNEED)

    def _check(self) -> None:
        atoms, targets = self.atom_types, self.target_index
        nbr_lists, nbr_dists = self.frame_arrays[:2]
        n = len(atoms)
        types_path, target_path, lists_path, dists_path = self.paths[:4]
        if not len(targets):
            raise UserError(f"{target_path} names no target atom; give at least one.")
        if targets.max() >= n:
            worst = int(targets.argmax())
            raise UserError(
                f"target_index[{worst}] = {targets[worst]} but the system has {n} atoms ({target_path}); indices "
                "start at 0."
            )
        if targets.min() < 0:
            raise UserError(f"target_index has the negative entry {targets.min()} ({target_path}); indices start at 0.")
        duplicates = len(targets) - len(np.unique(targets))
        if duplicates:
            warnings.warn(f"{target_path} names {duplicates} targets more than once.", UserWarning, stacklevel=3)
        if nbr_lists.ndim != 3 or nbr_lists.shape != nbr_dists.shape:
            raise UserError(
                f"nbr_lists {nbr_lists.shape} ({lists_path}) and nbr_dists {nbr_dists.shape} ({dists_path}) must have "
                "one "
                "shape (frames, atoms, neighbours)."
            )
        if nbr_lists.shape[1] != n:
            raise UserError(
                f"nbr_lists {nbr_lists.shape} ({lists_path}) is for {nbr_lists.shape[1]} atoms, atom_types for {n}."
            )
        if not np.issubdtype(nbr_lists.dtype, np.integer):
            raise UserError(
                f"{lists_path} holds {nbr_lists.dtype}; neighbour indices are integers (are the files in order?)."
            )
        for path, array in zip(self.paths[3:], self.frame_arrays[1:], strict=True):
            if not np.issubdtype(array.dtype, np.floating):
                raise UserError(
                    f"{path} holds {array.dtype}; floating-point numbers expected (are the files in order?)."
                )
        if self.ferro and self.frame_arrays[2].shape != (len(self), n, 3):
            raise UserError(
                f"atom_directions {self.frame_arrays[2].shape} ({self.paths[4]}) must be (frames, atoms, 3) = "
                f"{(len(self), n, 3)}."
            )
        if atoms.min() < 0 or atoms.max() > MAX_ATOM_TYPE:
            raise UserError(f"{types_path} holds {atoms.min()}..{atoms.max()}; atomic numbers are 0..{MAX_ATOM_TYPE}.")
        if not len(self) or not nbr_lists.shape[2]:
            raise UserError(f"{lists_path} has the shape {nbr_lists.shape}; a frame and a neighbour are the least.")
        few = max(1, CHECKED_BYTES // max(1, nbr_dists[0].nbytes))
        for start in range(0, min(len(self), few), 1024):
            self.frames(np.arange(start, min(start + 1024, few, len(self))))

    def _check_frames(self, batch: dict[str, torch.Tensor], indices: np.ndarray) -> None:
        lists, dists = batch["nbr_lists"], batch["nbr_dists"]
        # One pass over each; NaN is both the smallest and the largest.
        nearest, farthest = torch.aminmax(dists)
        if not 0 <= float(nearest) <= float(farthest) < math.inf:
            bad = indices[int((~(torch.isfinite(dists) & (dists >= 0))).any(-1).any(-1).int().argmax())]
            raise UserError(
                f"frame {bad} of {self.paths[3]} has a distance that is negative or not finite; repair the frame."
            )
        low, high = torch.aminmax(lists)
        if low < 0 or high >= len(self.atom_types):
            bad = indices[int(((lists < 0) | (lists >= len(self.atom_types))).any(-1).any(-1).int().argmax())]
            raise UserError(
                f"frame {bad} of {self.paths[2]} has neighbour indices {int(low)}..{int(high)} but the system has "
                f"{len(self.atom_types)} atoms; indices start at 0."
            )
        if self.ferro and not torch.isfinite(batch["atom_directions"].sum()):
            raise UserError(
                f"{self.paths[4]} has a direction that is not finite in frames {indices.min()}..{indices.max()}."
            )


class FramePairs:
    """All pairs of frames (t, t + tau) of one or more trajectories of the same system, as a dataset of the loader.

    Raises: UserError if a trajectory has no pair, or if the trajectories' atoms or targets differ.
    """

    def __init__(self, trajectories: Sequence[Trajectory], tau: int):
        if tau < 1:
            raise UserError(f"tau = {tau}; the lag is a positive number of frames.")
        first = trajectories[0]
        for trajectory in trajectories:
            if len(trajectory) <= tau:
                raise UserError(
                    f"{trajectory.paths[2]} has {len(trajectory)} frames, tau is {tau}; a trajectory needs more than "
                    "tau frames."
                )
            same_atoms = np.array_equal(trajectory.atom_types, first.atom_types)
            if not same_atoms or not np.array_equal(trajectory.target_index, first.target_index):
                raise UserError(
                    f"{trajectory.paths[0].parent} and {first.paths[0].parent} differ in atoms or targets; the "
                    "trajectories "
                    "of one split must be of one system."
                )
            if trajectory.frame_arrays[0].shape[2] != first.frame_arrays[0].shape[2]:
                raise UserError(
                    f"{trajectory.paths[2]} has {trajectory.frame_arrays[0].shape[2]} neighbours per atom, "
                    f"{first.paths[2]} has "
                    f"{first.frame_arrays[0].shape[2]}; prepare all trajectories of a split alike."
                )
        self.trajectories = list(trajectories)
        self.tau = tau
        self.starts = np.cumsum([0] + [len(trajectory) - tau for trajectory in trajectories])
        self.system = {
            "atom_types": torch.from_numpy(first.atom_types),
            "target_index": torch.from_numpy(first.target_index),
        }

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """B pairs as 2 B frames: first those at t, then, in the same order, those at t + tau; with atom_types (N,) and
        target_index (n,)."""
        if len(self.trajectories) == 1:
            frames = self.trajectories[0].frames(np.concatenate([indices, indices + self.tau]))
            return self.system | frames
        which = np.searchsorted(self.starts, indices, side="right") - 1
        order = np.argsort(which, kind="stable")
        parts = []
        for trajectory in np.unique(which):
            local = indices[order][which[order] == trajectory] - self.starts[trajectory]
            parts.append(self.trajectories[trajectory].frames(np.concatenate([local, local + self.tau])))
        halves = [{name: tensor.chunk(2) for name, tensor in part.items()} for part in parts]
        back = torch.from_numpy(np.argsort(order, kind="stable"))
        frames = {
            name: torch.cat([torch.cat([half[name][side] for half in halves])[back] for side in (0, 1)])
            for name in parts[0]
        }
        return self.system | frames


def _paths(source: str | Path | Sequence[str | Path], ferro: bool) -> list[Path]:
    """The files in canonical order, all existing."""
    needed = NAMES if ferro else NAMES[:4]
    sources = [Path(source)] if isinstance(source, (str, Path)) else [Path(path) for path in source]
    if len(sources) == 1:
        directory = sources[0]
        if not directory.is_dir():
            raise MissingFile(f"{directory} is not a directory; give a trajectory directory with {', '.join(needed)}.")
        sources = [directory / name for name in needed]
    if len(sources) < len(needed):
        raise UserError(
            f"{len(sources)} trajectory files given, {len(needed)} needed in the order {', '.join(needed)}."
        )
    sources = sources[: len(needed)]
    missing = [str(path) for path in sources if not path.is_file()]
    if missing:
        hint = " (the ferro model needs atom directions)" if ferro and missing == [str(sources[-1])] else ""
        raise MissingFile(f"missing {', '.join(missing)}{hint}; a trajectory has {', '.join(needed)}.")
    return sources


def _open(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        reason = str(error).split(". ")[0]  # the rest advises to unpickle
        raise UserError(
            f"{path} cannot be read as a .npy array: {reason}; write it anew with numpy.save, without pickles."
        ) from None


def _integers(values: np.ndarray, path: Path) -> np.ndarray:
    if not np.issubdtype(values.dtype, np.integer) or values.ndim != 1:
        raise UserError(f"{path} holds {values.dtype} of shape {values.shape}; a row of integers expected.")
    return values.astype(np.int64)
