"""The colours of a report, defined once: for its figures and for the page's CSS.

Most lines have the colours of Okabe and Ito, which colour-blind readers can
distinguish, and different dashes and markers. A figure is drawn in the light colours.
In a page, each of these colours becomes a CSS variable, which has another value in dark
mode.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Colour:
    """A colour on a light and on a dark background, as ``#rrggbb``."""

    light: str
    dark: str


INK = Colour("#1b1f24", "#e8e6e3")
MUTED = Colour("#59616b", "#a5adb7")
GRID = Colour("#e1e4e8", "#31373f")
SURFACE = Colour("#ffffff", "#15181c")
# Curves in the background.
ASIDE = Colour("#b4bac2", "#5b636d")
SERIES = (
    Colour("#0072b2", "#4fa9e6"),
    Colour("#d55e00", "#ff8a3d"),
    Colour("#009e73", "#2fc79b"),
    Colour("#cc79a7", "#e79cc4"),
    Colour("#e69f00", "#f3bd3f"),
    Colour("#56b4e9", "#9ad7fb"),
    Colour("#6a5acd", "#a69bf5"),
    Colour("#7f4f24", "#c79a6b"),
    Colour("#6b7a00", "#c2cc52"),
)
# Many-, medium- and few-shot classes: they differ in lightness, too.
GROUPS = {
    "many": Colour("#3b4252", "#d8dee9"),
    "medium": Colour("#8c6bb1", "#a98bd0"),
    "few": Colour("#e7298a", "#ff6fb5"),
}
VARIABLES: dict[str, Colour] = {
    "ink": INK,
    "muted": MUTED,
    "grid": GRID,
    "surface": SURFACE,
    "aside": ASIDE,
    **{f"series-{n}": colour for n, colour in enumerate(SERIES)},
    **{f"group-{name}": colour for name, colour in GROUPS.items()},
}

# The place of each method in `SERIES`. Other names take the places that are left.
METHODS = (
    "clip2fl",
    "fedavg",
    "creff",
    "clip2fl-plus",
    "fedprox",
    "clip2flm",
    "ccvr",
    "fedavgm",
    "fedlda",
)

# Lengths of dashes and gaps in multiples of the line's width; none for a solid line.
DASHES: tuple[tuple[float, ...], ...] = ((), (4, 1.6), (4, 1.5, 1, 1.5), (1.2, 1.2))
MARKERS = "osD^v"
# More lines than this cannot be distinguished, whatever their colours.
MAX_COLOURED = 10


@dataclass(frozen=True)
class Style:
    """How a line or a point is drawn.

    Attributes
    ----------
    colour : Colour
        Its colour.
    dash : tuple of float
        Lengths of dashes and gaps in multiples of the line's width; () if solid.
    marker : str
        matplotlib's name of the marker.
    """

    colour: Colour
    dash: tuple[float, ...] = ()
    marker: str = "o"

    def of_head(self, number: int) -> "Style":
        """Return the style of a run's n-th classifier: same colour, other dashes."""
        if number == 0:
            return replace(self, dash=(), marker="o")
        return replace(
            self,
            dash=DASHES[-number % len(DASHES)],
            marker=MARKERS[number % len(MARKERS)],
        )


TEACHER = Style(INK, (1.2, 2.2))
IN_BACKGROUND = Style(ASIDE, marker="|")


def styled(number: int) -> Style:
    """Return the style of the n-th place.

    The first places differ in colour. When a colour repeats, its dashes are different.
    """
    turn, place = divmod(number, len(SERIES))
    return Style(
        SERIES[place],
        DASHES[(place + turn) % len(DASHES)],
        MARKERS[number % len(MARKERS)],
    )


def styles(methods: Mapping[str, str]) -> dict[str, Style]:
    """Return a style for each name; a method has the same in every report.

    Parameters
    ----------
    methods : mapping of str to str
        The method of each name. A name that is a method's gets the method's place;
        else the first name with this method. The others get the places left, in order.

    Returns
    -------
    dict of str to Style
    """
    places: dict[str, int] = {}
    for place, method in enumerate(METHODS):
        having = [name for name, its in methods.items() if its == method]
        if having:
            places[method if method in having else having[0]] = place
    free = (n for n in itertools.count() if n not in places.values())
    for name in methods:
        if name not in places:
            places[name] = next(free)
    return {name: styled(places[name]) for name in methods}


def css(dark: bool) -> str:
    """Return the CSS declarations of all colours, as variables."""
    return " ".join(
        f"--{name}: {colour.dark if dark else colour.light};"
        for name, colour in VARIABLES.items()
    )
