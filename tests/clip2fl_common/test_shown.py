"""Names from a disk print safely, and ordinary ones as they are."""

import os

import pytest

from clip2fl_common.shown import listed, shown


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ünï-日本 a'b\"c\\d", "ünï-日本 a'b\"c\\d"),
        ("a\nWARNING b", "a\\nWARNING b"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\u202egnp.b", "a\\u202egnp.b"),
        ("a\u200bb\u00a0c\u2028", "a\\u200bb\\u00a0c\\u2028"),
        (os.fsdecode(b"caf\xe9.png"), "caf\\xe9.png"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_what_does_not_print_is_escaped(name: str, text: str) -> None:
    assert shown(name) == text
    assert shown(name).encode("utf-8").decode().isprintable()


def test_long_lists_end_in_dots() -> None:
    assert listed(["a", "b\n"]) == "a, b\\n"
    assert listed(str(n) for n in range(9)) == "0, 1, 2, 3, 4, ..."
