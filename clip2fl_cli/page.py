"""One self-contained HTML page of sections, and its pictures beside it."""

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
    """A figure with a file name and a text for those who do not see it."""

    name: str
    alt: str
    figure: Figure


@dataclass(frozen=True)
class Cell:
    """Text, the exact value behind it as JSON where it is a number, and a link."""

    text: str
    value: str | None = None
    link: str | None = None

    @classmethod
    def file(cls, text: str, path: Path) -> "Cell":
        """Return a cell that links to a file below the page's folder.

        Whatever the file is called, the link stays one to a file: a name such as
        ``javascript:x`` is no address of its own.
        """
        return cls(text, link="./" + quote(os.fsencode(path)))

    @classmethod
    def number(cls, value: float | None, digits: int = 1) -> "Cell":
        """Return a number's cell: rounded to the eye, exact in ``data-value``."""
        if value is None:
            return cls("-")
        return cls(f"{value:,.{digits}f}", json.dumps(value))


@dataclass(frozen=True)
class TableRow:
    """Cells; a marked row stands out."""

    cells: Sequence[Cell]
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes
    ----------
    name : str
        Its id in the page.
    caption : str
        Above it; or what to click on where it is folded.
    header : sequence of str
        Titles of the columns.
    rows : sequence of TableRow
        Its body.
    folded : bool
        Whether it is hidden until asked for.
    is_text : bool
        Whether its cells are text that may be broken, rather than numbers.
    """

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[TableRow]
    folded: bool = False
    is_text: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own."""

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
        Where they go; what an earlier report wrote there is replaced.
    title, lead : str
        Heading and the line below it.
    sections : sequence of Section
        In their order.

    Returns
    -------
    Path
        The page.
    """
    # Everything is drawn before anything is written.
    pictures: dict[str, bytes] = {}
    images = {}
    for picture in (p for section in sections for p in section.pictures):
        svg, png = io.BytesIO(), io.BytesIO()
        with rc_context(STYLE):
            # Without a date and random ids, the same run gives the same bytes.
            picture.figure.savefig(svg, format="svg", metadata={"Date": None})
            # Once laid out, the places of all parts stay.
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
        # Escaping keeps markup out; this keeps out what turns text around.
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
