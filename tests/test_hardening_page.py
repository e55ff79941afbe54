"""docs/hardening.md against the program: who decides what, and which tests show it."""

import dataclasses
import re
from pathlib import Path

from client_app.site_policy import SitePolicy
from clip2fl_common.config import known_keys
from tests.defaults import ROOT

PAGE = (ROOT / "docs" / "hardening.md").read_text("utf-8")


def section(title: str) -> list[list[str]]:
    """Return the cells of a section's table, without its head."""
    text = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[2:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_key_has_one_row_that_says_who_decides() -> None:
    rows = section("Who decides what")
    keys = [key for row in rows for key in quoted(row[0])]
    assert sorted(keys) == known_keys()
    assert all(re.match("server|site|the greater", row[1]) for row in rows)


def test_every_rule_of_a_site_bounds_something() -> None:
    rules = {rule for row in section("Who decides what") for rule in quoted(row[2])}
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(SitePolicy)}
    assert rules == fields


def test_tests_that_the_page_names_exist() -> None:
    sources = "".join(
        path.read_text("utf-8") for path in Path(ROOT / "tests").rglob("*.py")
    )
    rows = section("Faults found and fixed")
    assert len(rows) >= 16
    for row in rows:
        names = quoted(row[3])
        assert names, row[0]
        for name in names:
            known = f"def {name}(" in sources or (ROOT / "tests" / name).exists()
            assert known, f"{name} is no test"
