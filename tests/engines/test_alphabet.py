"""Letters for codes: one each, none that a program for sequences would misread."""

import numpy as np
import pytest

from gdyn.engines.monodecoder.alphabet import MAPS, Alphabet
from gdyn.errors import UserError

FORBIDDEN = '\0"#>=<- \r\n'
"""What breaks FASTA, MAFFT --text or foldtree2's own scripts."""


@pytest.mark.parametrize(("name", "size"), [("printable", 64), ("foldtree2", 246)])
def test_every_code_has_a_letter_of_its_own(name, size) -> None:
    letters = Alphabet(size, name).letters
    assert len(set(letters)) == len(letters) == size
    assert not set(letters) & set(FORBIDDEN)
    assert len(letters.encode(Alphabet(size, name).encoding)) == size


@pytest.mark.parametrize("name", MAPS)
def test_decode_is_the_inverse_of_encode(name) -> None:
    alphabet = Alphabet(len(MAPS[name]), name)
    codes = np.random.default_rng(0).permutation(np.arange(alphabet.codes).repeat(3))
    np.testing.assert_array_equal(alphabet.decode(alphabet.encode(codes)), codes)


def test_foldtree2_letters_are_those_of_the_original() -> None:
    """Its rule, written out: chr(code + 1), with ten characters replaced."""
    letters = Alphabet(246, "foldtree2").letters
    replaced = {'"': 248, "#": 247, ">": 249, "=": 250, "<": 251, "-": 252, " ": 253, "\r": 254, "\n": 255}
    for code in range(246):
        assert ord(letters[code]) == replaced.get(chr(code + 1), code + 1)
    assert Alphabet(40, "foldtree2").letters[:9] == "\x01\x02\x03\x04\x05\x06\x07\x08\t"


def test_all_that_mafft_takes_beside_the_replaced_is_used() -> None:
    """MAFFT --text takes all of latin-1 but eight; without quote and # that are 246."""
    assert set(MAPS["foldtree2"]) == {chr(i) for i in range(256)} - set(FORBIDDEN)


def test_printable_letters_stay_themselves_without_white_space_or_punctuation_of_formats() -> None:
    assert not set(MAPS["printable"]) & set(" \t\n;*?.,~_:'|\\()[]{}@!&%$^`")
    assert MAPS["printable"][:26].isupper()


@pytest.mark.parametrize(
    ("codes", "name", "said"),
    [
        (65, "printable", ("65 codes", "64 letters", "--alphabet foldtree2 (246)")),
        (247, "foldtree2", ("247 codes", "246 letters", "fewer codes")),
        (1000, "printable", ("1000 codes", "64 letters", "fewer codes")),
    ],
)
def test_more_codes_than_letters_names_the_limit_and_the_way_out(codes, name, said) -> None:
    with pytest.raises(UserError) as raised:
        Alphabet(codes, name)
    assert all(words in str(raised.value) for words in said)


def test_a_foreign_character_is_named() -> None:
    with pytest.raises(UserError, match="'e' is no letter"):
        Alphabet(20).decode("ABe")
