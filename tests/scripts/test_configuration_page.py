"""The reference page has every key, as the code has it."""

import sys
from typing import Annotated, Literal

import pytest
from pydantic import Field

from clip2fl_common.config import ConfigError, RunConfig, known_keys
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


def test_allowed_values_are_those_that_the_configuration_accepts() -> None:
    """Just outside each limit a value is refused with that key's name."""
    outside = {"≥ 0": -1, "≥ 1": 0, "≥ 8": 7, "> 0": 0, "< 1": 1, "≤ 1": 2}
    checked = 0
    for key, (_, _, words, _) in rows().items():
        for limit, value in outside.items():
            kind, *bounds = words.replace(", ", " ").split(" ", 1)
            if kind in ("integer", "number") and bounds and limit in bounds[0]:
                typed = float(value) if kind == "number" else value
                with pytest.raises(ConfigError, match=key):
                    RunConfig.from_run_config({**default_config(), key: typed})
                checked += 1
    assert checked > 30


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (bool, "true, false"),
        (str, "string"),
        (Literal["a", "b"], '`"a"`, `"b"`'),
        (Annotated[int, Field(ge=1)], "integer ≥ 1"),
        (Annotated[float, Field(gt=0, le=1)], "number > 0, ≤ 1"),
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
