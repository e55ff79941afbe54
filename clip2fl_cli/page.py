"""One self-contained HTML page of sections, with its figures in separate files too.

The page has no script: its content security policy forbids all. Values appear on hover
by SVG's ``title``, and all of them are in tables.
"""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup, escape
from matplotlib import rc_context

from clip2fl_cli import colours
from clip2fl_cli.charts import STYLE, Chart
from clip2fl_cli.html import render
from clip2fl_cli.inline_svg import inline
from clip2fl_cli.output import OutputFolder
from clip2fl_common.shown import shown

PNG_DOTS_PER_INCH = 200
PAGE_FILE = "report.html"


@dataclass(frozen=True)
class Picture:
    """A figure with a file name and an alternative text."""

    name: str
    alt: str
    chart: Chart


@dataclass(frozen=True)
class Cell:
    """Text, for a number also its exact value as JSON, and an optional link."""

    text: str
    value: str | None = None
    link: str | None = None

    @classmethod
    def file(cls, text: str, path: Path) -> "Cell":
        """Return a cell that links to a file below the page's folder.

        The link always leads to a file, whatever its name: ``javascript:x`` is not used
        as an address.
        """
        return cls(text, link="./" + quote(os.fsencode(path)))

    @classmethod
    def number(cls, value: float | None, digits: int = 1) -> "Cell":
        """Return a number's cell: rounded, with the exact value in ``data-value``."""
        if value is None:
            return cls("-")
        return cls(f"{value:,.{digits}f}", json.dumps(value))


@dataclass(frozen=True)
class Number:
    """One of the large numbers on top: its value, unit and meaning."""

    cell: Cell
    unit: str
    label: str


@dataclass(frozen=True)
class Headline:
    """The result in words and a few numbers.

    Attributes
    ----------
    sentence : str
        The result.
    numbers : sequence of Number
        The numbers in it.
    warning : str
        A problem that the reader must know, or "".
    """

    sentence: str
    numbers: Sequence[Number]
    warning: str = ""


@dataclass(frozen=True)
class TableRow:
    """A row of cells; a marked row is highlighted."""

    cells: Sequence[Cell]
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes
    ----------
    name : str
        Id of the table in the page.
    caption : str
        Text above the table, or the text to click on if it is folded.
    header : sequence of str
        Titles of the columns.
    rows : sequence of TableRow
        Rows of the table.
    folded : bool
        Whether the table is hidden until the reader opens it.
    is_text : bool
        Whether the cells contain text, which may be wrapped, instead of numbers.
    """

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[TableRow]
    folded: bool = False
    is_text: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page with its own heading."""

    id: str
    title: str
    text: str
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


# Shapes of `colours.MARKERS` around the point (14, 5), for legends.
_MARKER_PATHS = {
    "o": "M10.5 5a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
    "s": "M11 2h6v6h-6z",
    "D": "M14 1l4 4-4 4-4-4z",
    "^": "M14 1l4 7.5h-8z",
    "v": "M14 9l4-7.5h-8z",
    "|": "M13 1h2v8h-2z",
}


def write_page(
    folder: Path,
    title: str,
    headline: Headline,
    lead: str,
    sections: Sequence[Section],
) -> Path:
    """Write ``report.html`` and, in ``figures``, each picture as PNG and SVG.

    Parameters
    ----------
    folder : Path
        Folder of the files; an earlier report in it is replaced.
    title : str
        Heading.
    headline : Headline
        The result, on top.
    lead : str
        The line below it.
    sections : sequence of Section
        Sections in the order of the page.

    Returns
    -------
    Path
        Path of the page.
    """
    # All figures are drawn before any file is written.
    pictures: dict[str, bytes] = {}
    panels: dict[str, list[Markup]] = {}
    for picture in (p for section in sections for p in section.pictures):
        pictures |= _files(picture)
        with rc_context(STYLE):
            panels[picture.name] = [
                inline(
                    part.figure,
                    part.hints,
                    f"{picture.name}-{number}",
                    shown(part.title or picture.alt),
                )
                for number, part in enumerate(picture.chart.parts())
            ]
    html = render(
        "report.html.j2",
        title=title,
        headline=headline,
        sentence=_unbroken(headline.sentence),
        lead=lead,
        sections=sections,
        panels=panels,
        variable_of={c: f"var(--{n})" for n, c in colours.VARIABLES.items()},
        marker_paths=_MARKER_PATHS,
    )
    with OutputFolder.open(folder) as place, place.subfolder("figures") as figures:
        for name, content in pictures.items():
            figures.write(name, content)
        place.write(PAGE_FILE, f"{html}\n".encode())
    return folder / PAGE_FILE


def _files(picture: Picture) -> dict[str, bytes]:
    """Return a picture as SVG and PNG, by file name."""
    svg, png = io.BytesIO(), io.BytesIO()
    figure = picture.chart.figure()
    with rc_context(STYLE):
        # Without a date and random ids, the same run gives the same bytes.
        figure.savefig(svg, format="svg", metadata={"Date": None})
        # After the first layout, all parts keep their places.
        figure.set_layout_engine("none")
        figure.savefig(png, format="png", dpi=PNG_DOTS_PER_INCH)
    return {
        f"{picture.name}.svg": svg.getvalue(),
        f"{picture.name}.png": png.getvalue(),
    }


def _unbroken(sentence: str) -> Markup:
    """Return text as HTML in which numbers and their percent signs stay together."""
    return Markup(str(escape(shown(sentence))).replace(" %", "&nbsp;%"))
