"""Alphabet: VQ codes as characters, so that programs for sequences (MAFFT --text, RAxML-NG) can work with structures.

Two maps, chosen by name:

printable   the 64 characters of base64 (RFC 4648): A-Z, a-z, 0-9, + and /. Nothing that a FASTA reader, MAFFT, Newick
            or a spreadsheet gives a meaning of its own (gaps, comments, quotes, ambiguity codes, white space). The
            first 26 even survive programs that ignore case. Files are ASCII.
foldtree2   foldtree2's: character code + 1, without the ten that break FASTA or MAFFT (see `REPLACED`). Control
            characters such as the tabulator are among the letters. Files are latin-1, one byte per letter, as
            MAFFT --text needs; read them as bytes or as latin-1, and strip nothing but the line feed.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gdyn.errors import UserError

Map = Literal["printable", "foldtree2"]

PRINTABLE = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
REPLACED = {0: 246, ord('"'): 248, ord("#"): 247, ord(">"): 249, ord("="): 250, ord("<"): 251} | {
    ord("-"): 252, ord(" "): 253, ord("\r"): 254, ord("\n"): 255
}  # fmt: skip
"""Characters that foldtree2 avoids, and what stands for them."""

# foldtree2 admits 248 codes, but codes 246 and 247 would share their letters with codes 34 ("#") and 33 (quote).
FOLDTREE2 = "".join(chr(REPLACED.get(code + 1, code + 1)) for code in range(246))

MAPS: dict[Map, str] = {"printable": PRINTABLE, "foldtree2": FOLDTREE2}
"""All letters of each map, in the order of the codes."""


@dataclass(frozen=True)
class Alphabet:
    """One letter per code. Raises: UserError if the map has fewer letters than there are codes."""

    codes: int
    name: Map = "printable"

    def __post_init__(self) -> None:
        limit = len(MAPS[self.name])
        if self.codes > limit:
            larger = [f"{name} ({len(letters)})" for name, letters in MAPS.items() if len(letters) >= self.codes]
            advice = f"choose --alphabet {larger[0]}" if larger else "no map has as many; train with fewer codes"
            raise UserError(f"the run has {self.codes} codes, the alphabet {self.name} {limit} letters; {advice}.")

    @property
    def letters(self) -> str:
        """(K) in the order of the codes."""
        return MAPS[self.name][: self.codes]

    @property
    def encoding(self) -> str:
        """Of a FASTA file: one byte per letter."""
        return "latin-1" if self.name == "foldtree2" else "utf-8"

    def encode(self, codes_r: Sequence[int] | np.ndarray) -> str:
        letters = self.letters
        return "".join(letters[code] for code in codes_r)

    def decode(self, text: str) -> np.ndarray:
        """The codes (R,) int64 of a string.

        Raises: UserError naming a character that is no letter.
        """
        number = {letter: code for code, letter in enumerate(self.letters)}
        foreign = next((letter for letter in text if letter not in number), None)
        if foreign is not None:
            raise UserError(f"{foreign!r} is no letter of the alphabet {self.name} with {self.codes} codes.")
        return np.array([number[letter] for letter in text], dtype=np.int64)
