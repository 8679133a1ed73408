"""Protein structures in HDF5 files (the layout of layout.py) as a data set of the loader, read when they are asked for.

Legend: B structures of a batch, L residues of one, R of all of them, E edges, F features.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch

from gdyn.engines.monodecoder import layout
from gdyn.errors import MissingFile, UserError
from gdyn.splits import stable_key

CONTACTS = "contactPoints"
FOLDTREE2_WIDTH, FOLDTREE2_AMINO_ACIDS = 857, slice(3, 589)
"""Columns of foldtree2's `res`; those that depend on the amino acid: 566 properties and the one-hot."""
PLDDT_TOLERANCE = 1e-3
"""Above 1, for what is rounded when a B-factor is divided by 100."""
PREPARE = "prepare the structures again (gdyn prepare proteins)"

MEMORY: dict[type, Any] = {np.float32: h5py.h5t.NATIVE_FLOAT, np.int64: h5py.h5t.NATIVE_INT64}
"""What is read, as HDF5 calls it; for h5py to find out costs as much as the reading."""

Arrays = dict[str, np.ndarray]


class Structures:
    """Structures of one or more files, pooled. Reads `sizes` and `identifiers` when made, and everything else when a
    batch asks for it. May be sent to other processes: each opens the files itself, at its first batch.

    edges: links whose edges a batch has; contactPoints always is one. spectrum_2d, foldx: whether a batch has them.
    compat: foldtree2 wrote the files, whose amino acids lag behind (see `undo_lag`). cache_bytes: what is kept of the
    structures read last.

    Raises: MissingFile, UserError for a file without structures, or files that differ in the width of `res`.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        edges: Sequence[str] = (CONTACTS,),
        spectrum_2d: bool = True,
        foldx: bool = False,
        compat: bool = False,
        cache_bytes: int = 256 << 20,
    ):
        self.paths = [Path(path) for path in paths]
        if not self.paths:
            raise UserError("no file of structures is given; name at least one .h5 file.")
        self.links = tuple(dict.fromkeys([CONTACTS, *edges]))
        self.spectrum_2d, self.foldx, self.compat, self.cache_bytes = spectrum_2d, foldx, compat, cache_bytes
        indexes = [_read_index(path, compat) for path in self.paths]
        self.feature_width = _common_width(self.paths, [index.feature_width for index in indexes])
        self.identifiers = [name for index in indexes for name in index.identifiers]
        self.sizes = np.concatenate([index.residues for index in indexes])
        """Residues of every structure, (N,) int64."""
        self._starts = np.cumsum([0] + [len(index.identifiers) for index in indexes])
        self._forget()
        self._lagging = self._lagging_columns() if compat else slice(0)

    def __len__(self) -> int:
        return len(self.identifiers)

    def __getitem__(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """The batch of these structures, R residues in all, on the CPU:

        features        (R, F)     as stored
        amino_acids     (R, 20)    probabilities; a row of zeros is unknown
        spectra         (R, 160)   80 cosines and 80 sines of the phases, times log1p of the magnitudes
        angles          (R, 3)     phi, psi, omega, radians; 0 is not defined
        coordinates     (R, 3)     CA, Å
        secondary       (R, 3)     one-hot; a row of zeros is unknown
        plddt           (R,)       0..1
        lengths, keys   (B,)       int64; `stable_key` of each identifier
        edges_<link>    (2, E)     int64, rows of the batch
        spectrum_2d     (B, 2600)  if asked for: 1300 cosines, 1300 sines, likewise
        foldx           (B, 23)    if asked for; NaN where a file has none

        All others are float32.

        Raises: UserError naming file, structure, group and what was expected; IndexError.
        """
        lengths = self.sizes[indices]  # IndexError, also for those that are too small
        structures = [self._structure(int(i)) for i in np.asarray(indices) % len(self)]
        starts = np.cumsum(lengths) - lengths
        batch = {"lengths": torch.from_numpy(lengths)}
        for name in structures[0]:
            parts = [structure[name] for structure in structures]
            if name.startswith("edges_"):
                array = np.concatenate([part + start for part, start in zip(parts, starts, strict=True)], axis=1)
            else:
                array = np.concatenate(parts)
            batch[name] = torch.from_numpy(array)
        return batch

    def has_foldx(self) -> bool:
        """Whether any structure has energies."""
        return any(self._record(i).has_foldx() for i in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_files", "_cache")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    # -- one structure ------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._process = os.getpid()
        self._files: dict[Path, h5py.File] = {}
        self._cache: OrderedDict[int, Arrays] = OrderedDict()
        self._cached_bytes = 0

    def _structure(self, i: int) -> Arrays:
        """What a batch holds of structure i, from the cache or the file."""
        if self._process != os.getpid():
            self._forget()  # a forked process must not use its parent's files
        if i in self._cache:
            self._cache.move_to_end(i)
            return self._cache[i]
        arrays = self._decode(self._record(i), int(self.sizes[i]))
        nbytes = _nbytes(arrays)
        if nbytes <= self.cache_bytes:
            self._cache[i] = arrays
            self._cached_bytes += nbytes
        while self._cached_bytes > self.cache_bytes:
            self._cached_bytes -= _nbytes(self._cache.popitem(last=False)[1])
        return arrays

    def _record(self, i: int) -> _Record:
        path = self.paths[int(np.searchsorted(self._starts, i, side="right")) - 1]
        if path not in self._files:
            self._files[path] = _open(path)
        return _Record.open(path, self._files[path], self.identifiers[i])

    def _decode(self, record: _Record, length: int) -> Arrays:
        features = record.node("res", (length, self.feature_width))
        amino_acids = record.node("AA", (length, len(layout.AMINO_ACIDS)))
        if self.compat:
            amino_acids = undo_lag(amino_acids)
            features[:, self._lagging] = undo_lag(features[:, self._lagging])
        plddt = record.node("plddt", (length, 1))[:, 0]
        if not 0 <= plddt.min() <= plddt.max() <= 1 + PLDDT_TOLERANCE:
            raise record.error(
                "node/plddt/x",
                f"{plddt.min():g}..{plddt.max():g}",
                "0..1: divide confidences by 100, and write 1 for structures from experiments",
            )
        arrays = {
            "features": features,
            "amino_acids": amino_acids,
            "spectra": record.spectrum("fourier1d", (length, layout.SPECTRUM_WIDTH)),
            "angles": record.node("bondangles", (length, 3)),
            "coordinates": record.node("coords", (length, 3)),
            "secondary": record.node("ss", (length, len(layout.SECONDARY))),
            "plddt": plddt,
            "keys": np.array([stable_key(record.identifier)]),
        }
        arrays |= {f"edges_{link}": record.edges(link, length) for link in self.links}
        if self.spectrum_2d:
            arrays["spectrum_2d"] = record.spectrum("fourier2d", (1, layout.SPECTRUM_2D_WIDTH))
        if self.foldx:
            arrays["foldx"] = record.foldx()
        return arrays

    def _lagging_columns(self) -> slice:
        """The columns of `res` that depend on the amino acid, by foldtree2's width or by finding the one-hot amino
        acids."""
        if self.feature_width == FOLDTREE2_WIDTH:
            return FOLDTREE2_AMINO_ACIDS
        record, length, width = self._record(0), int(self.sizes[0]), len(layout.AMINO_ACIDS)
        features, amino_acids = record.node("res", (length, self.feature_width)), record.node("AA", (length, width))
        for column in range(self.feature_width - width + 1):
            if np.array_equal(features[:, column : column + width], amino_acids):
                return slice(column, column + width)
        warnings.warn(
            f"{self.paths[0]}: none of the {self.feature_width} columns of `res` are the amino acids of `AA`; compat "
            "mends `AA` only, and leaves `res` as it is.",
            UserWarning,
            stacklevel=3,
        )
        return slice(0)


def feature_width(path: Path) -> int:
    """Columns of `res` in a file. Raises: MissingFile, UserError."""
    return _read_index(path, compat=False).feature_width


def undo_lag(records_lc: np.ndarray) -> np.ndarray:
    """Rows of residues from foldtree2's records, (L, c): its record j carries the amino acid of residue j - 1, but for
    the first and the last, which are right. Nobody carries that of residue L - 2: a row of zeros."""
    rows_lc = records_lc.copy()
    rows_lc[1:-2] = records_lc[2:-1]
    if len(rows_lc) > 2:
        rows_lc[-2] = 0
    return rows_lc


# -- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """The group of one structure in an open file, read by h5py's low-level calls, which take half the time."""

    path: Path
    identifier: str
    group: h5py.h5g.GroupID

    @classmethod
    def open(cls, path: Path, file: h5py.File, identifier: str) -> _Record:
        try:
            group = h5py.h5g.open(file.id, f"structs/{identifier}".encode())
        except (KeyError, ValueError):
            raise UserError(f"{path} has no group /structs/{identifier}, which its index names; {PREPARE}.") from None
        return cls(path, identifier, group)

    def error(self, name: str, found: str, expected: str) -> UserError:
        return UserError(
            f"{self.path}: structure {self.identifier}: {name} is {found}; expected {expected}, or {PREPARE}."
        )

    def node(self, kind: str, shape: tuple[int, ...]) -> np.ndarray:
        """Of a node type, float32, finite."""
        name = f"node/{kind}/x"
        array = self._read(name, shape, np.float32)
        self._check_finite(name, array)
        return array

    def spectrum(self, kind: str, shape: tuple[int, int]) -> np.ndarray:
        """(rows, 2 * width): cosines of the phases, then sines, times log1p of the magnitudes. Phases themselves jump
        at π, where rounding would decide."""
        magnitudes, phases = (self.node(kind + part, shape) for part in ("r", "i"))
        if magnitudes.min() < 0:
            raise self.error(f"node/{kind}r/x", f"{magnitudes.min():g} in places", "magnitudes, 0 or more")
        sizes = np.log1p(magnitudes)
        return np.concatenate([sizes * np.cos(phases), sizes * np.sin(phases)], axis=1)

    def edges(self, link: str, length: int) -> np.ndarray:
        """(2, E) int64, 0 <= residue < length."""
        name = f"edge/res_{link}_res/edge_index"
        index = self._read(name, (2, -1), np.int64)
        if index.size and not 0 <= index.min() <= index.max() < length:
            raise self.error(name, f"{index.min()}..{index.max()}", f"residues 0..{length - 1}")
        return index

    def foldx(self) -> np.ndarray:
        """(1, 23), NaN where the file has none."""
        if not self.has_foldx():
            return np.full((1, layout.FOLDX_WIDTH), np.nan, np.float32)
        return self._read("node/Foldx/x", (layout.FOLDX_WIDTH,), np.float32)[None]

    def has_foldx(self) -> bool:
        return self._exists("node/Foldx/x")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._dataset(name).shape)

    def _links(self) -> str:
        """Names of the edges between residues that there are."""
        names = [name.decode() for name in h5py.h5g.open(self.group, b"edge")] if self._exists("edge") else []
        return ", ".join(name[4:-4] for name in names if name.startswith("res_") and name.endswith("_res"))

    def _exists(self, name: str) -> bool:
        parts = name.split("/")
        return all(self.group.links.exists("/".join(parts[: n + 1]).encode()) for n in range(len(parts)))

    def _dataset(self, name: str) -> h5py.h5d.DatasetID:
        try:
            return h5py.h5d.open(self.group, name.encode())
        except KeyError:
            expected = f"one of the links {self._links()}" if name.startswith("edge/") else "a dataset"
            raise self.error(name, "missing", expected) from None

    def _read(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """A whole dataset. shape: -1 stands for any number."""
        dataset, memory = self._dataset(name), MEMORY[dtype]
        found = tuple(dataset.shape)
        if -1 in shape and 0 in found:  # an empty list of edges may have lost its shape and type
            return np.zeros([max(n, 0) for n in shape], dtype)
        fits = len(found) == len(shape) and all(n in (m, -1) for n, m in zip(shape, found, strict=True))
        if not fits or dataset.get_type().get_class() != memory.get_class():
            numbers = "integers" if dtype is np.int64 else "floating-point numbers"
            wanted = str(shape).replace("-1", "E")
            raise self.error(name, f"{found} of {dataset.dtype}", f"{wanted} {numbers}")
        array = np.empty(found, dtype)
        try:
            dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, array, memory)
        except OSError as error:
            raise self.error(name, f"not readable ({error})", "a whole file") from None
        return array

    def _check_finite(self, name: str, array: np.ndarray) -> None:
        with np.errstate(over="ignore"):
            suspicious = not np.isfinite(array.sum())  # quicker than to look at every number, but it may overflow
        if suspicious and not np.isfinite(array).all():
            raise self.error(name, f"not finite in row {np.argwhere(~np.isfinite(array))[0, 0]}", "numbers")


class _Index(NamedTuple):
    """What is read of a file before any batch."""

    identifiers: list[str]
    residues: np.ndarray
    feature_width: int


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        raise MissingFile(f"{path} is not a file; expected structures as HDF5.")
    try:
        # Locks fail on many parallel file systems, and readers need none.
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        raise UserError(f"{path} cannot be opened as HDF5 ({error}); {PREPARE}.") from None


def _read_index(path: Path, compat: bool) -> _Index:
    """Lengths from /index where there is one, else from the shapes of all structures."""
    with _open(path) as file:
        _check_attributes(path, file, compat)
        if not isinstance(file.get("structs"), h5py.Group):
            raise UserError(f"{path} has no group /structs, but {', '.join(file) or 'nothing'}; {PREPARE}.")
        if "index" in file:
            identifiers, residues = _stored_index(path, file)
        else:
            identifiers = list(file["structs"])
            shapes = [_Record.open(path, file, name).shape("node/res/x") for name in identifiers]
            residues = np.array([shape[0] if shape else 0 for shape in shapes], np.int64)
        if not identifiers:
            raise UserError(f"{path} holds no structures; {PREPARE}.")
        if residues.min() < 1:
            raise UserError(f"{path}: structure {identifiers[residues.argmin()]} has no residues; {PREPARE}.")
        first = _Record.open(path, file, identifiers[0])
        shape = first.shape("node/res/x")
        if len(shape) != 2:
            raise first.error("node/res/x", f"{shape}", "(residues, features)")
    return _Index(identifiers, residues, shape[1])


def _check_attributes(path: Path, file: h5py.File, compat: bool) -> None:
    ours = file.attrs.get("layout") == layout.LAYOUT
    if ours and file.attrs.get("version") != layout.VERSION:
        raise UserError(
            f"{path} has version {file.attrs.get('version')} of the layout {layout.LAYOUT}, expected {layout.VERSION}; "
            f"{PREPARE}."
        )
    if file.attrs.get("amino_acids", layout.AMINO_ACIDS) != layout.AMINO_ACIDS:
        raise UserError(
            f"{path} orders the amino acids as {file.attrs['amino_acids']}, expected {layout.AMINO_ACIDS}; {PREPARE}."
        )
    if ours and compat:
        raise UserError(f"{path} was not written by foldtree2, and its amino acids are right; leave out compat.")


def _stored_index(path: Path, file: h5py.File) -> tuple[list[str], np.ndarray]:
    try:
        identifiers = file["index/identifier"].asstr()[()].tolist()
        residues = file["index/residues"][()].astype(np.int64)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: /index is damaged ({error}); expected identifier and residues. Remove /index, or {PREPARE}."
        ) from None
    if residues.shape != (len(identifiers),):
        raise UserError(
            f"{path}: /index has {len(identifiers)} identifiers and residues of shape {residues.shape}; {PREPARE}."
        )
    return identifiers, residues


def _common_width(paths: Sequence[Path], widths: Sequence[int]) -> int:
    for path, width in zip(paths, widths, strict=True):
        if width != widths[0]:
            raise UserError(
                f"{path} has {width} features per residue, {paths[0]} has {widths[0]}; prepare all files alike."
            )
    return widths[0]


def _nbytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
