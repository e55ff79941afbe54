"""Damaged and hostile tables of a comparison: refused in one line, nothing written.

Each case changes the table or the JSON file beside it, which are sound before.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from clip2fl_cli import comparison_table
from clip2fl_cli.comparison_table import Compared, rounds_csv
from clip2fl_cli.results import Results
from clip2fl_cli.summary import Origin
from tests.clip2fl_cli.commands import refused, run, tree
from tests.clip2fl_cli.made_up import write_run
from tests.clip2fl_cli.test_hostile_files import (
    DEEP,
    NO_FILES,
    Damage,
    changed,
    content,
    replaced,
    without,
)

KEY = "variant,seed,round,"
FIRST = "plain,1,1,"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Return the table of two runs, of two rounds and of one, without run folders."""
    runs = {
        "plain": [write_run(tmp_path / "runs" / "plain-seed1", [50.0, 60.0])],
        "other": [write_run(tmp_path / "runs" / "other-seed1", [40.0])],
    }
    place = tmp_path / "kept"
    place.mkdir()
    made = Compared(
        "x", "plain", runs, [], Origin("command", "2026-01-02", "a machine")
    )
    (place / "x.csv").write_text(rounds_csv(runs))
    (place / "x.json").write_text(Results.of(made).json)
    return place / "x.csv"


def set_cell(line: int, column: str, to: str) -> Damage:
    """Return a function that sets a cell of the table; line 1 is the header."""

    def damage(file: Path) -> None:
        rows = [text.split(",") for text in file.read_text().split("\n")]
        rows[line - 1][rows[0].index(column)] = to
        file.write_text("\n".join(map(",".join, rows)))

    return damage


def edit(change: Callable[[list[str]], object]) -> Damage:
    """Return a function that damages the table's lines."""

    def damage(file: Path) -> None:
        lines = file.read_text().split("\n")
        change(lines)
        file.write_text("\n".join(lines))

    return damage


def both(*damages: Damage) -> Damage:
    """Return a function that applies several damages."""

    def damage(file: Path) -> None:
        for one in damages:
            one(file)

    return damage


BALANCED, CLASS = "accuracy.fedavg.balanced", "accuracy.fedavg.per_class.1"
ACCURACY = [
    *(f"accuracy.fedavg.{c}" for c in ("top1", "balanced", "many", "medium", "few")),
    *(f"accuracy.fedavg.per_class.{c}" for c in (0, 1)),
]

# Damage of the table, and the expected message besides the file's name.
TABLES: dict[str, tuple[Damage, str]] = {
    # A folder may have any name, and is read as a run's folder.
    **{f"is {said}": (damage, said) for said, damage in NO_FILES.items()
       if said != "a folder"},
    "missing": (lambda file: file.unlink(), "No such file"),
    "empty": (content(""), "is empty"),
    "not UTF-8": (content(b"\xff\xfe"), "is not UTF-8"),
    "JSON": (content("{}"), "the first columns must be variant, seed, round"),
    "order of columns": (replaced(KEY, "seed,variant,round,"), "the first columns"),
    "twice": (replaced("test_images", "round"), "a column comes twice"),
    "header only": (edit(lambda lines: lines.__delitem__(slice(1, None))),
                    "ends before plain, 1, 1 comes"),
    "a row less": (edit(lambda lines: lines.pop(2)),
                   "'other, 1, 1', but by the JSON file it must be of plain, 1, 2"),
    "end": (edit(lambda lines: lines.__delitem__(slice(3, None))),
            "ends before other, 1, 1"),
    "a row more": (edit(lambda lines: lines.insert(4, lines[3])),
                   "line 5 belongs to no run"),
    "empty line": (edit(lambda lines: lines.insert(2, "")), "line 3 has 0 cells"),
    "variant": (replaced(FIRST, "plan,1,1,"), "line 2 is of 'plan, 1, 1'"),
    "seed": (replaced(FIRST, "plain,1.0,1,"), "line 2 is of 'plain, 1.0, 1'"),
    "round": (replaced(FIRST, "plain,1,01,"), "line 2 is of 'plain, 1, 01'"),
    "escape": (replaced(FIRST, "\x1b[2J,1,1,"), r"line 2 is of '\x1b[2J"),
    "a cell more": (replaced(FIRST, FIRST + ","), "cells, but the header has"),
    "cut off": (edit(lambda lines: lines.__setitem__(3, lines[3][:-9])), "line 4 has "),
    "quote": (replaced(FIRST, 'plain,1,"1,'), "line 2 is not CSV"),
    "quoted break": (replaced(FIRST, 'plain,1,"1\n",'), "line 2 is not CSV"),
    "text after a quote": (replaced(FIRST, '"plain"x,1,1,'), "line 2 is not CSV"),
    "long field": (replaced(FIRST, "x" * 200_000 + ",1,1,"), "field larger than"),
    "text": (set_cell(2, "losses.client", "low"), "client = 'low', but it must be a "),
    "formula": (set_cell(2, BALANCED, "=1+1"), f"{BALANCED} = '=1+1'"),
    "NaN": (set_cell(2, BALANCED, "nan"), f"{BALANCED} = 'nan'"),
    "infinite": (set_cell(2, "losses.client", "1e999"), "losses.client = inf"),
    "many digits": (set_cell(2, "bytes.up", "9" * 5000), "it must be a number"),
    "underscore": (set_cell(2, "bytes.up", "1_0"), "bytes.up = '1_0'"),
    "other digits": (set_cell(2, "bytes.up", "\u0661"), "it must be a number"),
    "blank": (set_cell(2, "bytes.up", " 1"), "bytes.up = ' 1'"),
    "percent": (set_cell(3, BALANCED, "500"), f"line 3: {BALANCED} = 500"),
    "hole": (set_cell(3, BALANCED, ""), f"{BALANCED} = None"),
    "class": (set_cell(3, CLASS, "-1"), "accuracy.fedavg.per_class.1 = -1"),
    "fraction": (set_cell(2, "bytes.up", "1.5"), "bytes.up = 1.5"),
    "no bytes": (set_cell(2, "bytes.down", ""), "bytes.down is missing"),
    "negative": (set_cell(2, "seconds.clients", "-1"), "seconds.clients = -1"),
    "images": (set_cell(2, "test_images", "0.5"), "test_images = 0.5"),
    "other head": (edit(lambda lines: lines.__setitem__(
                       0, lines[0].replace("fedavg", "f\u202e"))),
                   "has 0 columns of accuracy.fedavg.per_class"),
    "class columns": (replaced("fedavg.per_class.1", "fedavg.per_class.7"),
                      "per_class must be numbered from 0"),
    "a class less": (replaced(CLASS, "mine"), "has 1 columns of accuracy.fedavg.per"),
    "stray head": (replaced("test_images", "accuracy.b.top1"),
                   "line 2 has an accuracy of 'b', which the JSON file does not list"),
    "empty head": (both(*(set_cell(4, c, "") for c in ACCURACY)),
                   "the last evaluated round of other-seed1 must have an accuracy"),
    "no column": (replaced("bytes.down", "bytes.sideways"), "bytes.down is missing"),
    "no losses' name": (replaced("losses.client", "losses."), "losses."),
    "mechanism": (replaced("test_images", "privacy.luck"), "privacy.luck"),
}  # fmt: skip
# Damage of the JSON file.
RECORDS: dict[str, tuple[Damage, str]] = {
    **{f"is {said}": (damage, said) for said, damage in NO_FILES.items()},
    "missing": (lambda file: file.unlink(), "No such file"),
    "empty": (content(""), "is empty"),
    "nested": (content(DEEP), "is nested too deeply"),
    "a run's summary": (without("facts"), "facts is missing"),
    "no command": (without("command"), "command is missing"),
    "date": (changed("date", to="today\n"), "date = 'today"),
    "date and more": (changed("date", to="2026-01-02\n# x"), "date = "),
    "hardware": (changed("hardware", to=2), "hardware = 2"),
    "no heads": (changed("heads", to={}), "heads has no entry for 'plain'"),
    "heads": (changed("heads", "plain", to=[]), "heads.plain = []"),
    "a head more": (changed("heads", "plain", to=["fedavg", "b"]),
                    "has 0 columns of accuracy.b.per_class"),
    "no facts": (changed("facts", to={}), "facts has no entry for 'plain-seed1'"),
    "facts": (changed("facts", "plain-seed1", to=[]), "facts.plain-seed1 = []"),
    "config": (changed("shared_facts", "config", to=[]), "shared_facts.config = []"),
    "value": (changed("shared_facts", "config", "x", to={}), "shared_facts.config.x"),
    "no seed": (without("shared_facts", "config", "seed"), "config.seed is missing"),
    "classes": (changed("facts", "plain-seed1", "class_names", to=["a", "b", "c"]),
                "train_images_per_class has 2 entries, but class_names has 3"),
    "rounds": (changed("facts", "plain-seed1", "config", "federation.rounds", to=0),
               "federation.rounds = 0"),
    "a round more": (changed("facts", "plain-seed1", "config", "federation.rounds",
                             to=3), "line 4 is of 'other, 1, 1'"),
    "rounds and rounds": (changed("facts", "other-seed1", "config",
                                  "federation.rounds", to=100_000), "ends before"),
    "outside": (changed("runs", "plain", to=["../x"]), "'../x' has a separator"),
    "no runs": (changed("runs", to={}), "runs = {}"),
    "code": (changed("shared_facts", "code", to=None), "code = None"),
}  # fmt: skip


def test_sound_table_is_accepted(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise the cases below prove nothing. Unknown columns are ignored."""
    assert run(monkeypatch, "report", table) == 0
    page = capsys.readouterr().out
    replaced("test_images", "=mine")(table)
    table.write_text(table.read_text().replace("\n", "\r\n"))
    assert run(monkeypatch, "report", table) == 0
    assert capsys.readouterr().out == page


@pytest.mark.parametrize(("damage", "said"), TABLES.values(), ids=TABLES)
def test_damaged_table_is_one_line(
    table: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Damage,
    said: str,
) -> None:
    damage(table)
    before = tree(table.parent)
    line = refused(monkeypatch, capsys, "report", table)
    assert "x.csv" in line
    assert said in line
    assert tree(table.parent) == before


@pytest.mark.parametrize(("damage", "said"), RECORDS.values(), ids=RECORDS)
def test_damaged_json_beside_a_table_is_one_line(
    table: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Damage,
    said: str,
) -> None:
    damage(table.with_suffix(".json"))
    assert said in refused(monkeypatch, capsys, "report", table)


@pytest.mark.parametrize(
    ("limit", "said"),
    [("MAX_TABLE_BYTES", "has more than 200 bytes"), ("MAX_LINE", "line 1 has more")],
)
def test_large_table_is_one_line(
    table: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: str,
    said: str,
) -> None:
    monkeypatch.setattr(comparison_table, limit, 200)
    assert said in refused(monkeypatch, capsys, "report", table)


def test_names_from_the_json_file_are_only_shown(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names become no new line, markup or escape sequence."""
    file = table.with_suffix(".json")
    name = "<b>|\n\x1b[2J\u202e"
    for field in ("name", "command", "hardware", "baseline"):
        changed(field, to=name)(file)
    document = json.loads(file.read_text())
    for field in ("runs", "heads"):
        document[field] = {name: document[field].pop("plain"), **document[field]}
    file.write_text(json.dumps(document))
    text = table.read_text().replace("\nplain,", "\n<b>|\\n\\x1b[2J\\u202e,")
    table.write_text(text)
    assert run(monkeypatch, "report", table) == 0
    page = capsys.readouterr().out
    assert all(line.isprintable() for line in page.split("\n"))
    assert r"| \<b\>\|\\n\\x1b\[2J\\u202e | fedavg | 1 | 55.0 |" in page
