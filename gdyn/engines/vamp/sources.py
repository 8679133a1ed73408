"""Trajectory files of other programs, read frame by frame: MDAnalysis, ASE and GDyNet's .npz behind one face.

The .npz layout: the original GDyNet's, and a compact variant for storage. F frames, N atoms, n targets; other keys are
ignored.

    traj_coords            (F, N, 3)               Å, or instead
    traj_coords_mA         (F, N, 3) int16         0.001 Å
    lattices               (3, 3) or (F, 3, 3)     Å, rows are the cell vectors; absent: open boundaries
    atom_types             (N,)                    atomic numbers, 0..99
    target_index           (n,)                    optional
    atom_directions        (F, N, 3)               optional, for the ferro model, or instead
    atom_directions_milli  (F, N, 3) int16         in 0.001 of its unit
    frame_time, time_unit  number, string          optional: time from one frame to the next

This module imports the optional readers when a file needs them.
"""

from __future__ import annotations

import logging
import math
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from gdyn.errors import MissingFile, UserError
from gdyn.extras import optional

SYMBOLS = (
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y "
    "Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os "
    "Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn "
    "Nh Fl Mc Lv Ts Og"
).split()
"""Element symbols by atomic number; 0 is an unknown element."""
ALONE_MDANALYSIS = {".pdb", ".ent", ".pqr", ".gro"}
"""Single files that MDAnalysis reads better than ASE. A lone .xyz is not here: MDAnalysis would drop its cell."""
Reader = Literal["auto", "mdanalysis", "ase", "npz"]

log = logging.getLogger("gdyn")


class Frame(NamedTuple):
    """One moment of a trajectory."""

    number: int
    """Its index in the trajectory, from 0."""
    positions: np.ndarray
    """(N, 3) float64, Å."""
    cell: np.ndarray | None
    """(3, 3) float64, Å, rows are the cell vectors; None: open boundaries."""
    periodic: np.ndarray
    """(3,) bool, one per cell vector."""
    directions: np.ndarray | None = None
    """(N, 3) float32 where the file holds them."""


class Source:
    """A trajectory: what does not change in time as attributes, the frames as an iterator."""

    atom_types: np.ndarray
    """(N,) int32 atomic numbers."""
    target_index: np.ndarray | None = None
    has_directions: bool = False
    frame_time: float = 1.0
    time_unit: str = "frames"
    n_frames: int

    def frames(self, which: range) -> Iterator[Frame]:
        raise NotImplementedError

    def select(self, selection: str) -> np.ndarray:
        """Ascending indices of the atoms an MDAnalysis selection names in the first frame.

        Raises: UserError if it cannot be understood or names no atom.
        """
        mda = optional("MDAnalysis")
        try:
            indices = self._universe().select_atoms(selection).indices
        except (mda.SelectionError, mda.NoDataError, AttributeError) as error:
            raise UserError(f"selection {selection!r} does not work on this trajectory: {error}") from None
        if not len(indices):
            raise UserError(f"selection {selection!r} names no atom; there are {_inventory(self.atom_types)}.")
        return np.sort(indices)

    def _universe(self) -> Any:
        """Atoms with `element`, `type` and `name` (all the symbol), for files that are not MDAnalysis' own."""
        universe = optional("MDAnalysis").Universe.empty(len(self.atom_types))
        for attribute in ("elements", "types", "names"):
            universe.add_TopologyAttr(attribute, [SYMBOLS[number] for number in self.atom_types])
        return universe


def open_source(
    inputs: Sequence[Path], reader: Reader = "auto", atomic_numbers: dict[str, int] | None = None
) -> Source:
    """Open a trajectory: one .npz, one file for ASE, or a topology and its trajectories for MDAnalysis.

    Raises: MissingFile, UserError naming the file.
    """
    missing = [str(path) for path in inputs if not Path(path).exists()]
    if missing or not inputs:
        raise MissingFile(f"no such file: {', '.join(missing)}" if inputs else "no trajectory file given")
    suffix = Path(inputs[0]).suffix.lower()
    if reader == "auto":
        alone = "npz" if suffix == ".npz" else "mdanalysis" if suffix in ALONE_MDANALYSIS else "ase"
        reader = "mdanalysis" if len(inputs) > 1 else alone  # type: ignore[assignment]
    if reader == "mdanalysis":
        return MDAnalysisSource(inputs, atomic_numbers or {})
    if len(inputs) > 1:
        raise UserError(f"{len(inputs)} files given, the {reader} reader takes one; make a directory of each.")
    return AseSource(inputs[0]) if reader == "ase" else NpzSource(inputs[0])


class NpzSource(Source):
    """GDyNet's .npz and its compact variant (see the top of this file). Frames are streamed out of the archive."""

    def __init__(self, path: Path):
        self.path = Path(path)
        small = self._small("atom_types", "target_index", "frame_time", "time_unit")
        coordinates = {"traj_coords", "traj_coords_mA"} & self.keys
        if not coordinates or "atom_types" not in small:
            raise UserError(f"{path} holds {', '.join(sorted(self.keys))}; traj_coords and atom_types are needed.")
        types = np.atleast_1d(small["atom_types"].squeeze())
        if types.ndim != 1 or types.dtype.kind not in "iu" or types.min() < 0 or types.max() >= len(SYMBOLS):
            raise UserError(f"atom_types of {path} is {types.dtype} {types.shape}; a row of atomic numbers expected.")
        self.atom_types = types.astype(np.int32)
        if "target_index" in small:
            self.target_index = np.atleast_1d(small["target_index"].squeeze())
        self.frame_time = float(small.get("frame_time", self.frame_time))
        self.time_unit = str(small.get("time_unit", self.time_unit))
        self.has_directions = bool({"atom_directions", "atom_directions_milli"} & self.keys)
        self.n_frames = self._shape("traj_coords")[0]

    def _small(self, *names: str) -> dict[str, np.ndarray]:
        """Those arrays that the archive has; remembers all names in `keys`."""
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                self.keys = set(archive.files)
                return {name: archive[name] for name in names if name in self.keys}
        # ValueError: pickled; AttributeError: not an archive
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, AttributeError) as error:
            raise UserError(f"{self.path} cannot be read as an .npz archive of plain arrays: {error}") from None

    def frames(self, which: range) -> Iterator[Frame]:
        lattice = self._stream("lattices", which, (3, 3)) if "lattices" in self.keys else None
        directions = self._stream("atom_directions", which) if self.has_directions else None
        for number, positions in zip(which, self._stream("traj_coords", which), strict=True):
            cell = None if lattice is None else next(lattice)
            direction = None if directions is None else next(directions).astype(np.float32)
            yield Frame(number, positions, cell, np.full(3, cell is not None), direction)

    def _member(self, key: str) -> tuple[str, float]:
        """The name in the archive and the factor that turns its numbers into Å (or the unit of a direction)."""
        for suffix in ("_mA", "_milli"):
            if key + suffix in self.keys:
                return key + suffix, 1e-3
        return key, 1.0

    def _shape(self, key: str) -> tuple[int, ...]:
        name, _ = self._member(key)
        with zipfile.ZipFile(self.path) as archive, archive.open(name + ".npy") as file:
            shape, _ = self._header(file, name)
        return shape

    def _header(self, file: Any, name: str) -> tuple[tuple[int, ...], np.dtype]:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
        except ValueError as error:
            raise UserError(f"{name} of {self.path} is not an array: {error}") from None
        if fortran or dtype.kind not in "fi":
            order = "F" if fortran else "C"
            raise UserError(f"{name} of {self.path} is {dtype} in {order} order; numbers in C order expected.")
        last = (3, 3) if name == "lattices" else (len(self.atom_types), 3)
        if shape[-2:] != last or len(shape) not in ((2, 3) if name == "lattices" else (3,)):
            raise UserError(f"{name} of {self.path} is {shape}; (frames, {last[0]}, 3) expected.")
        return shape, dtype

    def _stream(self, key: str, which: range, constant: tuple[int, ...] = ()) -> Iterator[np.ndarray]:
        """The chosen frames of one array as float64, read one after another; an array of shape `constant` repeats."""
        name, unit = self._member(key)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(name + ".npy") as file:
                shape, dtype = self._header(file, name)
                steady = shape == constant
                shape = (1, *shape) if steady else shape
                if not steady and shape[0] != self.n_frames:
                    raise UserError(f"{name} of {self.path} has {shape[0]} frames, traj_coords {self.n_frames}.")
                size, begin = dtype.itemsize * math.prod(shape[1:]), file.tell()
                for frame in which:
                    file.seek(begin + (0 if steady else frame) * size)
                    yield np.frombuffer(file.read(size), dtype).reshape(shape[1:]).astype(np.float64) * unit
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise UserError(f"{name} of {self.path} is damaged: {error}") from None


class MDAnalysisSource(Source):
    """Whatever MDAnalysis reads: a topology, and trajectories that continue one another.

    atomic_numbers: atom type in the topology -> atomic number, for topologies that do not know elements.
    """

    def __init__(self, inputs: Sequence[Path], atomic_numbers: dict[str, int]):
        self.inputs = [str(path) for path in inputs]
        mda = optional("MDAnalysis")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about attributes we do not use
            try:
                self.universe = mda.Universe(*self.inputs)
            except Exception as error:  # parsers raise anything; it always means that the file cannot be read
                raise UserError(f"MDAnalysis cannot read {' '.join(self.inputs)}: {error}") from None
            self.atom_types = self._numbers(atomic_numbers)
        self.n_frames = self.universe.trajectory.n_frames
        with warnings.catch_warnings(record=True) as complaints:
            warnings.simplefilter("always")
            step = float(self.universe.trajectory.dt)
        if not complaints and step > 0:  # MDAnalysis warns where it makes up 1 ps
            self.frame_time, self.time_unit = step, "ps"

    def frames(self, which: range) -> Iterator[Frame]:
        try:
            for moment in self.universe.trajectory[which.start : which.stop : which.step]:
                cell = None if moment.dimensions is None else moment.triclinic_dimensions.astype(np.float64)
                yield Frame(moment.frame, moment.positions.astype(np.float64), cell, np.full(3, cell is not None))
        except (OSError, ValueError, EOFError, IndexError) as error:
            raise UserError(f"MDAnalysis stops reading {' '.join(self.inputs)}: {error}") from None

    def _universe(self) -> Any:
        return self.universe

    def _numbers(self, atomic_numbers: dict[str, int]) -> np.ndarray:
        atoms = self.universe.atoms
        kinds = atoms.types if hasattr(atoms, "types") else atoms.names
        if not atomic_numbers:
            if not hasattr(atoms, "elements"):
                self.universe.guess_TopologyAttrs(to_guess=["elements"])
                log.info("elements guessed from the atom names or types of %s", self.inputs[0])
            known = {symbol: number for number, symbol in enumerate(SYMBOLS)}
            numbers = [known.get(str(element).capitalize()) for element in atoms.elements]
        else:
            numbers = [atomic_numbers.get(str(kind)) for kind in kinds]
        unknown = sorted({str(kind) for kind, number in zip(kinds, numbers, strict=True) if number is None})
        if unknown:
            raise UserError(
                f"{self.inputs[0]} does not say which element the atom types {', '.join(unknown)} are; "
                f"add e.g. --atomic_numbers.{unknown[0]} 6 for each type."
            )
        return np.array(numbers, dtype=np.int32)


class AseSource(Source):
    """Whatever ASE reads: extended XYZ, .traj, XDATCAR, vasprun.xml, CIF, ... The same atoms in every frame."""

    def __init__(self, path: Path):
        self.path = Path(path)
        first = next(self._images(slice(0, 1)), None)
        if first is None:
            raise UserError(f"{path} holds no frame.")
        self.atom_types = first.numbers.astype(np.int32)

    @cached_property
    def n_frames(self) -> int:  # type: ignore[override]
        return sum(1 for _ in self._images(slice(None)))

    def frames(self, which: range) -> Iterator[Frame]:
        for frame, atoms in zip(which, self._images(slice(which.start, which.stop, which.step)), strict=True):
            if not np.array_equal(atoms.numbers, self.atom_types):
                raise UserError(
                    f"frame {frame} of {self.path} has {_inventory(atoms.numbers)}, frame 0 has "
                    f"{_inventory(self.atom_types)}; a trajectory keeps its atoms and their order."
                )
            # an open direction may come without a cell vector; any will do
            cell = np.where(atoms.pbc[:, None], atoms.cell, atoms.cell.complete()) if atoms.pbc.any() else None
            yield Frame(frame, atoms.positions.astype(np.float64), cell, atoms.pbc)

    def _images(self, which: slice) -> Iterator[Any]:
        read = optional("ase.io").iread
        try:
            yield from read(self.path, index=which)
        except Exception as error:  # parsers raise anything; it always means that the file cannot be read
            raise UserError(f"ASE cannot read {self.path}: {error or type(error).__name__}") from None


def _inventory(atom_types: np.ndarray) -> str:
    """What a person calls the atoms: "32 S, 4 Li"."""
    numbers, counts = np.unique(atom_types, return_counts=True)
    return ", ".join(f"{count} {SYMBOLS[number]}" for number, count in zip(numbers, counts, strict=True))
