"""One self-contained HTML page of sections, and its pictures beside it."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from clip2fl_cli.figures import STYLE
from server_app.durable import write_whole

PNG_DOTS_PER_INCH = 200


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
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    images = {}
    for picture in (p for section in sections for p in section.pictures):
        svg = io.BytesIO()
        # Without a date and random ids, the same run gives the same bytes.
        with rc_context(STYLE):
            picture.figure.savefig(svg, format="svg", metadata={"Date": None})
        (figures / f"{picture.name}.svg").write_bytes(svg.getvalue())
        # Once laid out, the places of all parts stay.
        picture.figure.set_layout_engine("none")
        picture.figure.savefig(figures / f"{picture.name}.png", dpi=PNG_DOTS_PER_INCH)
        encoded = base64.b64encode(svg.getvalue()).decode("ascii")
        images[picture.name] = f"data:image/svg+xml;base64,{encoded}"
    environment = Environment(
        loader=PackageLoader("clip2fl_cli"), autoescape=True, undefined=StrictUndefined
    )
    html = environment.get_template("report.html.j2").render(
        title=title, lead=lead, sections=sections, images=images
    )
    page = folder / "report.html"
    write_whole(page, html + "\n")
    return page
