"""One self-contained HTML page of sections, with its figures in separate files too."""

import base64
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from clip2fl_cli.figures import STYLE
from clip2fl_cli.output import OutputFolder
from clip2fl_common.shown import shown

PNG_DOTS_PER_INCH = 200
PAGE_FILE = "report.html"


@dataclass(frozen=True)
class Picture:
    """A figure with a file name and an alternative text."""

    name: str
    alt: str
    figure: Figure


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


def write_page(
    folder: Path, title: str, lead: str, sections: Sequence[Section]
) -> Path:
    """Write ``report.html`` and, in ``figures``, each picture as PNG and SVG.

    Parameters
    ----------
    folder : Path
        Folder of the files; an earlier report in it is replaced.
    title, lead : str
        Heading, and the line below it.
    sections : sequence of Section
        Sections in the order of the page.

    Returns
    -------
    Path
        Path of the page.
    """
    # All figures are drawn before any file is written.
    pictures: dict[str, bytes] = {}
    images = {}
    for picture in (p for section in sections for p in section.pictures):
        svg, png = io.BytesIO(), io.BytesIO()
        with rc_context(STYLE):
            # Without a date and random ids, the same run gives the same bytes.
            picture.figure.savefig(svg, format="svg", metadata={"Date": None})
            # After the first layout, all parts keep their places.
            picture.figure.set_layout_engine("none")
            picture.figure.savefig(png, format="png", dpi=PNG_DOTS_PER_INCH)
        pictures[f"{picture.name}.svg"] = svg.getvalue()
        pictures[f"{picture.name}.png"] = png.getvalue()
        encoded = base64.b64encode(svg.getvalue()).decode("ascii")
        images[picture.name] = f"data:image/svg+xml;base64,{encoded}"
    environment = Environment(
        loader=PackageLoader("clip2fl_cli"),
        autoescape=True,
        undefined=StrictUndefined,
        # Escaping disables markup; this disables characters that reverse text.
        finalize=lambda value: shown(value) if isinstance(value, str) else value,
    )
    html = environment.get_template("report.html.j2").render(
        title=title, lead=lead, sections=sections, images=images
    )
    with OutputFolder.open(folder) as place, place.subfolder("figures") as figures:
        for name, content in pictures.items():
            figures.write(name, content)
        place.write(PAGE_FILE, f"{html}\n".encode())
    return folder / PAGE_FILE
