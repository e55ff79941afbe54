"""Names from outside are shown, and do nothing: in pages, pictures, tables, terminals.

A run comes with the names of its classes, methods, phases and teacher; the name of its
folder is whoever's made it.
"""

import io
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.text import Text
from rich.console import Console

from clip2fl_cli import console as module
from clip2fl_cli.charts import STYLE, Chart
from clip2fl_cli.colours import styled
from clip2fl_cli.comparison import PlannedRun
from clip2fl_cli.comparison_report import write_comparison_report
from clip2fl_cli.figures import (
    Curve,
    Estimate,
    Points,
    bars_panel,
    by_class,
    estimates_panel,
    heat_map,
    over_rounds,
)
from clip2fl_cli.holdings import Holdings
from clip2fl_cli.progress import ComparisonProgress
from clip2fl_cli.report import write_run_report
from clip2fl_cli.runs import FinishedRun
from clip2fl_cli.summary import Origin, class_table, main_table, markdown
from clip2fl_common.config import RunConfig
from tests.clip2fl_cli.commands import run
from tests.clip2fl_cli.html_page import Page
from tests.clip2fl_cli.made_up import write_run
from tests.defaults import default_config

NAMES = {
    "script": "<script>alert(1)</script>",
    "attribute": '"><img src=x onerror=alert(1)>',
    "quote": "' onmouseover='alert(1)",
    "template": "{{ 7 * 7 }}{% raw %}",
    "formula": r"$\frac{1}{$",
    "odd dollar": "$\\notacommand$ $",
    "escape": "\x1b[2J\x1b]0;title\x07",
    "lines": "one\ntwo\r\nthree",
    "separators": "a\u2028b\u2029c\x85d",
    "bidi": "abc\u202etxt.exe\u2066",
    "zero": "a\x00b",
    "cell": "a | b |\n|---|",
    "link": "[click](javascript:alert(1))",
    "image": "![x](http://example.org/x.png)",
    "markup": "[red]a[/red] :smiley: [/]",
    "underscore": "_hidden",
    "none": "_none",
    "entity": "&lt;b&gt;",
    "comment": "--><b>",
    "data": "]]><svg onload=alert(1)>",
    "long": "x" * 500,
    "chinese": "\u732b",
}
TEACHER = "</td><script>alert(2)</script>\u202e|"


def renamed(run: FinishedRun, names: Sequence[str]) -> FinishedRun:
    """Return a run that has these names in every place for names."""
    facts = run.facts
    classes = [f"{name[:400]}{n}" for name in names for n in ("", " 2")]
    facts["class_names"] = classes
    facts["train_images_per_class"] = list(range(len(classes)))
    facts["shot_groups"]["medium"] = list(range(2, len(classes)))
    several = " ".join(names)[:400]
    facts["config"] |= {"method": several, "dataset.name": several}
    facts["config"] |= dict.fromkeys(names, several)
    facts["versions"] = {name: name for name in names}
    facts["code"] = several
    facts["teacher"] = {"name": f"{TEACHER}{several}"}
    (run.folder / "config.json").write_text(json.dumps(facts))
    lines = run.rounds
    for line in lines:
        line["losses"] |= dict.fromkeys(names, 1.0)
        line["seconds"] |= dict.fromkeys(names, 1.0)
        accuracy = {**line["accuracy"]["fedavg"], "per_class": [50.0] * len(classes)}
        line["accuracy"] = dict.fromkeys(names[:20], accuracy)
    text = "\n".join(json.dumps(line) for line in lines)
    (run.folder / "metrics.jsonl").write_text(text)
    return FinishedRun.read(run.folder)


def elements(page: Path) -> Any:
    """Return the structure of a page, without its texts."""
    found: list[tuple[str, tuple[str, ...]]] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
            found.append((tag, tuple(sorted(name for name, _ in attrs))))

    Parser().feed(page.read_text("utf-8"))
    return found


def test_page_and_pictures_show_names_and_nothing_else(tmp_path: Path) -> None:
    """Hostile names change no element, attribute or address of the page."""
    harmless = [f"harmless {n}" for n in range(len(NAMES))]
    expected = write_run_report(
        renamed(write_run(tmp_path / "a", [50.0]), harmless),
        write_run_alike(tmp_path / "c", harmless),
    )
    page = write_run_report(
        renamed(write_run(tmp_path / "b", [50.0]), [*NAMES.values()]),
        write_run_alike(tmp_path / "\x1b<b>", [*NAMES.values()]),
    )
    assert elements(page) == elements(expected)
    assert "script" not in {tag for tag, _ in elements(page)}
    text = page.read_text("utf-8")
    assert all(line.isprintable() for line in text.split("\n"))
    for name in ("&lt;script&gt;alert(1)&lt;/script&gt;", r"\x1b[2J", r"\u202etxt"):
        assert name in text
    assert all(a.startswith(("data:", "#")) for a in Page(page).addresses)
    pictures = sorted((tmp_path / "b" / "figures").glob("*.svg"))
    assert len(pictures) == len(Page(page).figures) > 3
    for picture in pictures:
        # Also well-formed: control characters are no XML.
        found = {element.tag for element in ElementTree.parse(picture).iter()}
        assert not [tag for tag in found if tag.endswith(("}script", "}a"))]


def write_run_alike(folder: Path, names: Sequence[str]) -> FinishedRun:
    """Return another run with the same classes, for a comparison."""
    return renamed(write_run(folder, [50.0]), names)


def test_page_forbids_scripts_and_anything_from_elsewhere(tmp_path: Path) -> None:
    page = write_run_report(write_run(tmp_path / "a", [50.0])).read_text("utf-8")
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page


def cells(row: str) -> list[str]:
    """Return the cells of a Markdown row: what a backslash escapes is text."""
    assert row.startswith("|") and row.endswith("|")
    return re.sub(r"\\.", "", row)[1:-1].split("|")


FOLDERS = [
    "javascript:alert(1)",
    "http:",
    "data:text,html",
    "?q#f",
    'a"b',
    "a b%20c",
    os.fsdecode(b"\xff\xfe"),
    "\u732b",
    "a\n\x1b[2Jb",
]


def test_folder_of_any_name_is_linked_as_a_folder(tmp_path: Path) -> None:
    """Resolve each link as a browser does, relative to the page."""
    runs = {name: [write_run(tmp_path / name, [50.0])] for name in FOLDERS}
    page = write_comparison_report(tmp_path, "x", runs, FOLDERS[0])
    links = [a for a in Page(page).addresses if not a.startswith(("data:", "#"))]
    assert len(links) == len(FOLDERS)
    for name, link in zip(FOLDERS, links, strict=True):
        assert link.startswith("./")
        assert link.isascii()
        address = urlsplit(urljoin("file:///folder/report.html", link))
        assert (address.scheme, address.query, address.fragment) == ("file", "", "")
        assert unquote_to_bytes(address.path) == (
            b"/folder/" + os.fsencode(name) + b"/report.html"
        )


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_markdown_shows_names_and_nothing_else(tmp_path: Path, name: str) -> None:
    """A table keeps its cells, and no name becomes markup."""
    runs = {name: [renamed(write_run(tmp_path / "a", [50.0]), [name])]}
    for table, width in ((main_table(runs, name), 11), (class_table(runs), 4)):
        rows = table.split("\n")
        assert [len(cells(row)) for row in rows] == [width] * len(rows)
    text = markdown(runs, name, name, Origin.here("command"))
    assert all(line.isprintable() for line in text.split("\n"))
    # Apart from escaped characters, there is neither a tag nor a link.
    bare = re.sub(r"\\.", "", text)
    assert "<" not in bare
    assert "](" not in bare
    assert "$" not in bare


def drawn_texts(figure: Any) -> list[str]:
    """Return the texts of a figure that was drawn as for a page."""
    with rc_context(STYLE):
        figure.savefig(io.BytesIO(), format="svg")
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize("name", ["$x^2$", r"$\frac$", "_a", "_none", "a\x1bb"])
def test_pictures_show_names_as_they_are(name: str) -> None:
    """No name becomes a formula, and no name is missing in a legend."""
    shown = name.replace("\x1b", r"\x1b")
    style = styled(0)
    curves = {"y": [Curve(name, np.ones((1, 3)), style)]}
    estimate = Estimate(name, 1.0, (0.5, 1.5), [1.0], style)
    matrix = np.array([[1, 2]])
    for chart in (
        over_rounds(curves),
        by_class([Points("line", [1.0], style)], [name], None),
        by_class([Points(name, [1.0], style)], ["class"], None),
        Chart([bars_panel("seconds", {name: 1.0})]),
        Chart([estimates_panel("accuracy", [estimate])]),
        heat_map(
            matrix,
            rows=["row"],
            columns=[name, "b"],
            row_title="",
            column_title="",
            bar_title="",
        ),
    ):
        figure = chart.figure()
        assert shown in [text.strip() for text in drawn_texts(figure)]
        assert not any(text.get_parse_math() for text in figure.findobj(Text))


def test_bars_of_names_that_look_alike_stay_apart() -> None:
    """Two names with the same beginning get two bars."""
    values = {"x" * 60 + "a": 1.0, "x" * 60 + "b": 2.0}
    figure = Chart([bars_panel("seconds", values)]).figure()
    places = [patch.get_extents() for patch in figure.axes[0].patches]
    assert len(places) == 2
    assert not places[0].overlaps(places[1])


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_terminal_shows_names_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Names cause no escape sequences, no rich markup and no new lines."""
    held = Holdings((name, "b"), np.array([[1, 2]]))
    monkeypatch.setattr(Holdings, "of", lambda _: held)
    assert run(monkeypatch, "partition") == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 6
    assert all(line.isprintable() for line in shown)
    if name.isprintable():
        assert name in shown[1]


def test_messages_show_names_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name = "[red]:smiley:[/]\x1b[2J\nclip2fl: all is well\u202e"
    assert run(monkeypatch, "report", tmp_path / name) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert r"[red]:smiley:[/]\x1b[2J\nclip2fl: all is well\u202e" in line


def test_progress_shows_a_variant_as_it_is() -> None:
    config = RunConfig.from_run_config(default_config())
    stream = io.StringIO()
    console = Console(file=stream, width=120, force_terminal=True, color_system=None)
    planned = PlannedRun("[bold]x[/bold] [/]", 1, config)
    with ComparisonProgress([planned], 0, console) as progress:
        progress.started(planned)
    assert "[bold]x[/bold] [/], seed 1" in stream.getvalue()


def test_long_message_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "partition", "--set", f'method="{"x" * 50_000}"') == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < module.MAX_MESSAGE + 100
