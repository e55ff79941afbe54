"""A figure of several panels: as one picture for a file, or panel by panel for a page.

A file shows all panels in one picture with a legend. A page lays the panels out itself,
so that their text stays readable on a phone, and has hover texts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib import font_manager, rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.transforms import Transform

from clip2fl_cli.colours import GRID, INK, MUTED, Style
from clip2fl_cli.inline_svg import HINT
from clip2fl_common.shown import shown

# Longer names leave no room for the drawing.
MAX_NAME = 40

# For characters that matplotlib's own font does not have, where they are installed.
OTHER_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Source Han Sans",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Hiragino Sans",
    "Apple SD Gothic Neo",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Arial Unicode MS",
)


def _fonts() -> list[str]:
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(font for font in OTHER_FONTS if font in installed)]


# matplotlib's type lists every possible key; Any keeps this readable.
STYLE: Any = {
    "font.family": _fonts(),
    "font.size": 8.5,
    "text.color": INK.light,
    "axes.labelcolor": MUTED.light,
    "axes.edgecolor": MUTED.light,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK.light,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED.light,
    "ytick.color": MUTED.light,
    "grid.color": GRID.light,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.hashsalt": "clip2fl",
    # A name such as "$\\frac$" is shown as text, not as a formula.
    "text.parse_math": False,
}


@dataclass
class Hints:
    """The hover texts of a figure.

    Attributes
    ----------
    wanted : bool
        Whether the figure has any; a file has none, because areas take time to draw.
    texts : dict of str to str
        Hover text of each part, by matplotlib's ``gid``.
    """

    wanted: bool
    texts: dict[str, str] = field(default_factory=dict)

    def add(self, artist: Artist, text: str) -> None:
        """Give a part of the figure a hover text."""
        name = f"{HINT}{len(self.texts)}"
        artist.set_gid(name)
        self.texts[name] = text

    def add_column(self, axis: Axes, x: float, width: float, text: str) -> None:
        """Give an area from the bottom to the top of the axes a hover text."""
        self._add_area(axis, (x, 0, width, 1), axis.get_xaxis_transform(), text)

    def add_row(self, axis: Axes, y: float, height: float, text: str) -> None:
        """Give an area from the left to the right of the axes a hover text."""
        self._add_area(axis, (0, y, 1, height), axis.get_yaxis_transform(), text)

    def add_cell(self, axis: Axes, x: float, y: float, text: str) -> None:
        """Give the cell of a heat map around a point a hover text."""
        self._add_area(axis, (x - 0.5, y - 0.5, 1, 1), axis.transData, text)

    def _add_area(
        self,
        axis: Axes,
        box: tuple[float, float, float, float],
        transform: Transform,
        text: str,
    ) -> None:
        if not self.wanted:
            return
        x, y, width, height = box
        area = Rectangle(
            (x, y), width, height, facecolor="none", linewidth=0, transform=transform
        )
        # Unlike add_patch, this does not widen the limits of the axes.
        axis.add_artist(area)
        self.add(area, text)


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    label: str
    style: Style
    has_line: bool
    has_marker: bool


@dataclass(frozen=True)
class Panel:
    """One drawing of a figure.

    Attributes
    ----------
    title : str
        Title above the drawing.
    inches : tuple of float
        Width and height.
    draw : callable
        Draws on the axes, and adds hover texts.
    """

    title: str
    inches: tuple[float, float]
    draw: Callable[[Axes, Hints], None]


@dataclass(frozen=True)
class Part:
    """A panel as a figure of its own, with its hover texts."""

    title: str
    figure: Figure
    hints: Mapping[str, str]


@dataclass(frozen=True)
class Chart:
    """A figure of one or several panels.

    Attributes
    ----------
    panels : sequence of Panel
        At least one.
    keys : sequence of Key
        Entries of the legend that all panels share.
    columns : int
        Panels beside one another in a file.
    """

    panels: Sequence[Panel]
    keys: Sequence[Key] = ()
    columns: int = 1

    @rc_context(STYLE)
    def figure(self) -> Figure:
        """Return all panels in one figure, with a legend below."""
        columns = min(self.columns, len(self.panels))
        rows = [
            max(panel.inches[1] for panel in self.panels[start : start + columns])
            for start in range(0, len(self.panels), columns)
        ]
        legend_columns = min(2 * columns, max(len(self.keys), 1))
        legend = 0.2 * math.ceil(len(self.keys) / legend_columns)
        width = columns * self.panels[0].inches[0]
        figure = Figure((width, sum(rows) + legend), layout="constrained")
        axes = figure.subplots(
            len(rows), columns, squeeze=False, height_ratios=rows
        ).flat
        for axis, panel in zip(axes, self.panels, strict=False):
            axis.set_title(panel.title)
            panel.draw(axis, Hints(wanted=False))
        for axis in list(axes)[len(self.panels) :]:
            axis.remove()
        if self.keys:
            figure.legend(
                [_handle(key) for key in self.keys],
                [in_picture(key.label) for key in self.keys],
                loc="outside lower center",
                ncols=legend_columns,
            )
        return figure

    @rc_context(STYLE)
    def parts(self) -> list[Part]:
        """Return each panel as a figure of its own, without a legend."""
        parts = []
        for panel in self.panels:
            figure = Figure(panel.inches, layout="constrained")
            axis = figure.subplots()
            axis.set_title(panel.title)
            hints = Hints(wanted=True)
            panel.draw(axis, hints)
            parts.append(Part(panel.title, figure, hints.texts))
        return parts


def in_picture(name: str, longest: int = MAX_NAME) -> str:
    """Return a foreign name for a figure: visible and not too long.

    matplotlib omits labels that begin with an underscore from legends.
    """
    text = shown(name)
    if len(text) > longest:
        text = f"{text[: longest - 1]}…"
    return f" {text}" if text.startswith("_") else text


def _handle(key: Key) -> Line2D:
    return Line2D(
        [],
        [],
        color=key.style.colour.light,
        linestyle=((0, key.style.dash) if key.style.dash else "-")
        if key.has_line
        else "none",
        marker=key.style.marker if key.has_marker else None,
        linewidth=1.7,
    )
