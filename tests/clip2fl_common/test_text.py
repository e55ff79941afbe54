"""Text from elsewhere is on one line, and all of it can be seen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_common.text import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Größe 猫 e\u0301", "Größe 猫 e\u0301"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x1b[2J\x9b2J\x07\x00\x7f", r"\x1b[2J\x9b2J\x07\x00\x7f"),
        ("a\u2028b\u2029c\x85d", r"a\u2028b\u2029c\x85d"),
        ("\u202eabc\u2066\u200f\ufeff\u00ad", r"\u202eabc\u2066\u200f\ufeff\xad"),
        ("\udcff", r"\udcff"),
        # Characters that nobody sees, of which messages can be made.
        ("\U000e0041", r"\U000e0041"),
        # Persian needs this joiner.
        ("می\u200cخواهم", "می\u200cخواهم"),
    ],
)
def test_what_cannot_be_seen_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text(st.characters()))
def test_result_is_one_line_of_utf_8(text: str) -> None:
    shown = visible(text)
    assert len(shown.splitlines()) <= 1
    shown.encode("utf-8")
    assert visible(shown) == shown
