"""The reference page has every key, as the code has it."""

import math
import re
import sys
from typing import Annotated, Literal

import pytest
from pydantic import Field

from clip2fl_common.config import ConfigError, RunConfig, Scalar, known_keys
from clip2fl_common.config_types import Rule
from scripts import configuration_page
from scripts.configuration_page import PAGE, allowed, main, page
from tests.defaults import ROOT, default_config


def rows() -> dict[str, list[str]]:
    """Return the page's rows by their key."""
    lines = PAGE.read_text("utf-8").splitlines()
    cells = [line.strip("|").split("|") for line in lines if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row] for row in cells}


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == page((ROOT / "pyproject.toml").read_text("utf-8"))


def test_every_key_has_its_default_and_a_meaning() -> None:
    found = rows()
    assert sorted(found) == known_keys()
    for key, default in default_config().items():
        shown = f'"{default}"' if isinstance(default, str) else str(default).lower()
        assert found[key][1] == f"`{shown}`"
        assert len(found[key][3]) > 10


BOUND = re.compile(r"([≥>≤<]) ([0-9.,e-]+[0-9])")


def accepts(key: str, value: Scalar) -> bool:
    """Tell whether a value is within its key's range."""
    try:
        RunConfig.from_run_config({**default_config(), key: value})
    except ConfigError as error:
        assert key in str(error)
        # A contradiction with another key names both, and no range.
        return "but it must be" not in str(error)
    return True


def test_allowed_values_are_those_that_the_configuration_accepts() -> None:
    """At each limit a value is in range, and just outside it is not."""
    checked = 0
    for key, (_, _, words, _) in rows().items():
        if not words.startswith(("integer", "number")):
            continue
        for sign, text in BOUND.findall(words):
            limit = float(text.replace(",", ""))
            towards = -math.inf if sign in "≥>" else math.inf
            if words.startswith("integer"):
                inside: Scalar = int(limit)
                outside: Scalar = int(limit) + (-1 if sign in "≥>" else 1)
            else:
                inside, outside = limit, math.nextafter(limit, towards)
            assert accepts(key, inside) == (sign in "≥≤"), (key, inside)
            # Zero may be allowed apart from a range, as a switch.
            assert not accepts(key, outside) or outside == 0, (key, outside)
            checked += 1
    assert checked > 60


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (bool, "true, false"),
        (str, "string"),
        (Literal["a", "b"], '`"a"`, `"b"`'),
        (Annotated[int, Field(ge=1)], "integer ≥ 1"),
        (Annotated[float, Field(gt=0, le=1)], "number > 0, ≤ 1"),
        (
            Annotated[float, Field(le=1e6), Rule("0 or ≥ 2", bool)],
            "number 0 or ≥ 2, ≤ 1,000,000",
        ),
        (Annotated[str, Rule("a word", bool)], "a word"),
    ],
)
def test_types_in_words(hint: object, words: str) -> None:
    assert allowed(hint) == words


def test_check_tells_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["configuration_page", "--check"])
    assert main() == 0
    monkeypatch.setattr(configuration_page, "PAGE", ROOT / "README.md")
    assert main() == 1
    assert "run 'make docs'" in capsys.readouterr().out
