"""Structure files, wherever they lie: named one by one, in folders, in archives."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gdyn.engines.monodecoder.chains import Unusable, split_name
from gdyn.errors import MissingFile, UserError

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz")
PIECE = 32
"""Files that are converted together: little to lose at an interruption, few parts to merge."""
BROKEN = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged archive raises."""

Content = bytes | Path | Unusable


@dataclass(frozen=True)
class Entry:
    """One structure file."""

    source: str
    """Where it is, for people."""
    name: str
    content: Content

    def read(self) -> bytes:
        """Raises: Unusable."""
        if isinstance(self.content, Unusable):
            raise self.content
        if isinstance(self.content, bytes):
            return self.content
        try:
            return self.content.read_bytes()
        except OSError as error:
            raise Unusable(f"it cannot be read: {error.strerror}") from None


def find(inputs: list[Path]) -> Iterator[Path]:
    """Structure files and archives, those in folders sorted and without hidden ones. Raises: MissingFile, UserError."""
    for given in inputs:
        if not given.exists():
            raise MissingFile(f"{given} does not exist; a structure file, a folder or an archive expected.")
        if not given.is_dir():
            if not _wanted(given.name):
                known = ".pdb, .ent, .cif (each also .gz), .tar, .tar.gz, .tgz, .tar.xz"
                raise UserError(f"{given} is neither a structure file nor an archive of them; known: {known}.")
            yield given
            continue
        inside = sorted(path for path in given.rglob("*") if _wanted(path.name) and path.is_file())
        if not inside:
            raise UserError(f"{given} holds no .pdb, .ent or .cif file (or .gz of one) and no archive of them.")
        yield from inside


def is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVES)


def pieces(paths: list[Path], wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Entry]]]:
    """(number, entries) of those pieces that `wanted` says yes to, in order; only these are read from archives. Of
    several files with one identifier the first counts. What cannot be unpacked becomes an entry that says so."""
    taken: dict[str, str] = {}
    piece: list[Entry] = []
    number = 0
    for count, (source, name, load) in enumerate(_listing(paths)):
        if count // PIECE != number and piece:
            yield number, piece
            piece = []
        number = count // PIECE
        first = taken.setdefault(_stem(name), source)
        if wanted(number):
            # the object, not the text: a file may be given twice
            piece.append(Entry(source, name, load() if first is source else Unusable(same_identifier(first))))
    if piece:
        yield number, piece


def same_identifier(source: str) -> str:
    return f"{source} has the same identifier"


def _wanted(name: str) -> bool:
    """Whether a file of this name is a structure or an archive; hidden ones are none (macOS leaves some)."""
    return not name.startswith(".") and (is_archive(name) or _stem(name) != name)


def _stem(name: str) -> str:
    """The name without the suffixes of a structure file; as it is if it has none."""
    try:
        return split_name(name)[0]
    except Unusable:
        return name


def _listing(paths: list[Path]) -> Iterator[tuple[str, str, Callable[[], Content]]]:
    """(source, name, how to get at its content) of each structure file, those in archives one after the other."""
    for path in paths:
        if is_archive(path.name):
            yield from _members(path)
        else:
            yield str(path), path.name, partial(Path, path)


def _members(archive: Path) -> Iterator[tuple[str, str, Callable[[], Content]]]:
    read = 0
    try:
        with tarfile.open(archive) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # otherwise all of them stay in memory
                read += 1
                name = Path(member.name).name
                if member.isfile() and _wanted(name) and not is_archive(name):
                    yield f"{archive}/{member.name}", name, partial(_extract, tar, member)
    except BROKEN as error:
        problem = Unusable(f"the archive is broken behind {read} members: {error}")
        yield str(archive), archive.name, lambda: problem


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Content:
    try:
        stream = tar.extractfile(member)
        assert stream is not None
        return stream.read()
    except BROKEN as error:
        return Unusable(f"the archive is broken here: {error}")
