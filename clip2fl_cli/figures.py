"""The figures of a report, drawn by matplotlib without a display.

All figures are narrow, so that their text stays readable on a phone. Lines have the
colours of Okabe and Ito, which colour-blind readers can distinguish, and different
dashes. Areas have the colour map cividis.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clip2fl_cli.runs import by_frequency
from clip2fl_common.shown import shown

WIDTH_INCHES = 4.8
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X<>"
# More lines than this cannot be distinguished, whatever their colours.
MAX_COLOURED = len(MARKERS)
GREY = "#aaaaaa"
# More class names than this do not fit beside an axis.
MAX_NAMES = 30
# More cells than this are too small for their numbers.
MAX_NUMBERED_CELLS = 150
# Longer names leave no room for the drawing.
MAX_NAME = 40
# Number of classes whose features are drawn; more classes merge into one cloud.
MAX_CLOUDS = 10

# matplotlib's type lists every possible key; Any keeps this readable.
STYLE: Any = {
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "svg.hashsalt": "clip2fl",
    # A name such as "$\\frac$" is shown as text, not as a formula.
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Curve:
    """One line over the rounds.

    Attributes
    ----------
    label : str
        Name of the line; empty if it is the only one.
    values : ndarray, shape [S, R]
        One row per seed, one column per round; nan if there is no value.
    """

    label: str
    values: npt.NDArray[np.float64]


def in_picture(name: str) -> str:
    """Return a foreign name for a figure: visible and not too long.

    matplotlib omits labels that begin with an underscore from legends.
    """
    text = shown(name)
    if len(text) > MAX_NAME:
        text = f"{text[: MAX_NAME - 1]}…"
    return f" {text}" if text.startswith("_") else text


def styled(number: int) -> dict[str, Any]:
    """Return colour and dashes of the n-th line of a figure.

    The first lines differ in colour and, while they last, in dashes. When a colour
    repeats, its dashes are different.
    """
    turn, colour = divmod(number, len(COLOURS))
    return {
        "color": COLOURS[colour],
        "linestyle": DASHES[(colour + turn) % len(DASHES)],
    }


@rc_context(STYLE)
def over_rounds(
    panels: Mapping[str, Sequence[Curve]], aside: Collection[str] = ()
) -> Figure:
    """Draw curves over the rounds, one panel above the other.

    Parameters
    ----------
    panels : mapping of str to sequence of Curve
        Title of each panel's vertical axis, and its curves. Several seeds are drawn
        as their mean, with a band from the smallest to the largest value.
    aside : collection of str
        Labels of curves that are drawn as thin grey lines in the background.

    Returns
    -------
    Figure
    """
    labels = list(dict.fromkeys(c.label for curves in panels.values() for c in curves))
    shown = [label for label in labels if label not in aside]
    height = 1.5 * len(panels) + 0.4 + _legend_inches(len(shown) + bool(aside))
    figure = Figure((WIDTH_INCHES, height), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        others = _others(aside)
        for curve in sorted(curves, key=lambda curve: curve.label in aside):
            rounds = np.arange(1, curve.values.shape[1] + 1)
            mean = curve.values.mean(axis=0)
            marker = "o" if len(rounds) == 1 else None
            if curve.label in aside:
                axis.plot(
                    rounds,
                    mean,
                    color=GREY,
                    linewidth=0.7,
                    zorder=1,
                    marker=marker,
                    label=next(others),
                )
                continue
            style = styled(shown.index(curve.label))
            axis.plot(
                rounds,
                mean,
                label=in_picture(curve.label),
                linewidth=1.6,
                marker=marker,
                **style,
            )
            if len(curve.values) > 1:
                axis.fill_between(
                    rounds,
                    curve.values.min(axis=0),
                    curve.values.max(axis=0),
                    color=style["color"],
                    alpha=0.15,
                    linewidth=0,
                )
        axis.set_ylabel(title)
    axes[-1].set_xlabel("round")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(figure, list(axes))
    return figure


def _others(aside: Collection[str]) -> Iterator[str]:
    """Yield labels for the grey curves: one legend entry for all of them."""
    yield f"{len(aside)} others"
    yield from itertools.repeat("_none")


def _with_count(names: Sequence[str], counts: Sequence[int] | None, c: int) -> str:
    name = in_picture(names[c])
    return name if counts is None else f"{name} ({counts[c]:,})"


@rc_context(STYLE)
def by_class(
    values: Mapping[str, Sequence[float | None]],
    names: Sequence[str],
    counts: Sequence[int] | None,
    aside: Collection[str] = (),
) -> Figure:
    """Draw per-class accuracy, with the most frequent class on top.

    Parameters
    ----------
    values : mapping of str to sequence of (float or None)
        Accuracy of each class, for each compared variant or classifier.
    names : sequence of str
        Class names in the order of ``values``.
    counts : sequence of int or None
        Training images of each class, if known.
    aside : collection of str
        Names of entries that are drawn as grey points in the background.

    Returns
    -------
    Figure
    """
    order = by_frequency(counts, len(names))
    named = len(names) <= MAX_NAMES
    shown = [label for label in values if label not in aside]
    # Side by side, so that no marker covers another.
    dodge = min(0.14, 0.8 / len(shown))
    row = max(0.34, 0.06 * len(shown))
    height = (row * len(names) + 1.0 if named else 6.0) + _legend_inches(
        len(shown) + bool(aside)
    )
    figure = Figure((WIDTH_INCHES, height), layout="constrained")
    axis = figure.subplots()

    def across(label: str) -> list[float]:
        return [np.nan if (v := values[label][c]) is None else v for c in order]

    for number, label in enumerate(shown):
        axis.plot(
            across(label),
            np.arange(len(order)) + dodge * (number - (len(shown) - 1) / 2),
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=6 if named else 3,
            linestyle="none",
            alpha=0.9,
            label=in_picture(label),
        )
    for label, entry in zip(
        [label for label in values if label in aside], _others(aside), strict=False
    ):
        axis.plot(
            across(label),
            range(len(order)),
            color=GREY,
            marker="|",
            linestyle="none",
            zorder=1,
            label=entry,
        )
    if named:
        axis.set_yticks(
            range(len(order)), [_with_count(names, counts, c) for c in order]
        )
        axis.set_ylabel("class (training images)" if counts else "class")
    else:
        axis.set_ylabel("class, by frequency rank")
    axis.set_ylim(len(order) - 0.4, -0.6)
    axis.set_xlim(-3, 103)
    axis.set_xlabel("test accuracy, %")
    _legend_below(figure, [axis])
    return figure


@rc_context(STYLE)
def heat_map(
    matrix: npt.NDArray[np.int64],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    row_title: str,
    column_title: str,
    bar_title: str,
    share_of_row: bool = False,
) -> Figure:
    """Draw counts as colours, with their numbers if there is room.

    Parameters
    ----------
    matrix : ndarray of int, shape [R, K]
        Counts.
    rows, columns : sequence of str
        Names of rows and columns.
    row_title, column_title, bar_title : str
        Titles of rows, columns and the colour bar.
    share_of_row : bool
        Colour by the percentage of the row instead of the logarithm of the count.

    Returns
    -------
    Figure
    """
    if share_of_row:
        totals = np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        shown = 100 * matrix / totals
    else:
        shown = np.log10(np.maximum(matrix, 0.5))
    height = float(np.clip(0.26 * len(rows) + 1.6, 2.5, 7.5))
    figure = Figure((WIDTH_INCHES, height), layout="constrained")
    axis = figure.subplots()
    axis.grid(visible=False)
    image = axis.imshow(shown, cmap="cividis", aspect="auto", interpolation="nearest")
    bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
    bar.set_label(bar_title)
    if not share_of_row:
        ticks = [n for n in range(6) if 10**n <= max(int(matrix.max()), 1)]
        bar.set_ticks(ticks, labels=[f"{10**n:,}" for n in ticks])
    for names, title, which in (
        (columns, column_title, axis.xaxis),
        (rows, row_title, axis.yaxis),
    ):
        which.set_label_text(title)
        if len(names) <= MAX_NAMES:
            which.set_ticks(range(len(names)), [in_picture(name) for name in names])
    if len(columns) <= MAX_NAMES:
        axis.tick_params("x", rotation=60)
    if matrix.size <= MAX_NUMBERED_CELLS:
        middle = (shown.min() + shown.max()) / 2
        for (row, column), count in np.ndenumerate(matrix):
            axis.text(
                column,
                row,
                f"{count}",
                ha="center",
                va="center",
                fontsize=7,
                color="black" if shown[row, column] > middle else "white",
            )
    return figure


def principal_plane(
    features: npt.NDArray[np.float64], text_features: npt.NDArray[np.float64] | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64] | None]:
    """Project unit features and unit prototypes on their principal plane.

    The plane is spanned by the first two principal components of features and
    prototypes together, after each of the two sets is centred at 0. Features are far
    from all prototypes; without centring the plane would show only this distance.

    Parameters
    ----------
    features : ndarray, shape [C, m, d]
        Federated features.
    text_features : ndarray or None, shape [C, d]
        Prototypes.

    Returns
    -------
    ndarray, shape [C, m, 2]
        Features in the plane.
    ndarray or None, shape [C, 2]
        Prototypes in the plane.
    """

    def centred(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
        unit = vectors / np.maximum(lengths, 1e-12)
        return np.asarray(unit - unit.reshape(-1, unit.shape[-1]).mean(axis=0))

    points = centred(features)
    # The class means determine the plane. Otherwise the noise within classes, which
    # fills all dimensions, would determine it.
    kinds = [points.mean(axis=1)]
    prototypes = None if text_features is None else centred(text_features)
    if prototypes is not None:
        kinds.append(prototypes)
    scaled = [kind / max(np.linalg.norm(kind), 1e-12) for kind in kinds]
    _, _, directions = np.linalg.svd(np.concatenate(scaled), full_matrices=False)
    # A single class or dimension gives only a line.
    plane = np.zeros((directions.shape[1], 2))
    plane[:, : min(2, len(directions))] = directions[:2].T
    return points @ plane, None if prototypes is None else prototypes @ plane


@rc_context(STYLE)
def clouds(
    features: npt.NDArray[np.float64],
    text_features: npt.NDArray[np.float64] | None,
    names: Sequence[str],
    counts: Sequence[int] | None,
) -> Figure:
    """Draw federated features and text prototypes in two dimensions.

    Parameters
    ----------
    features : ndarray, shape [C, m, d]
        Federated features.
    text_features : ndarray or None, shape [C, d]
        Prototypes.
    names : sequence of str
        Class names.
    counts : sequence of int or None
        Training images of each class, if known. With many classes, `MAX_CLOUDS`
        classes are drawn, evenly over the frequencies.

    Returns
    -------
    Figure
    """
    points, prototypes = principal_plane(features, text_features)
    order = by_frequency(counts, len(names))
    places = np.linspace(0, len(order) - 1, min(MAX_CLOUDS, len(order)))
    titles = ["federated features", "means of their classes, enlarged"]
    if prototypes is not None:
        titles.append("text prototypes, same plane")
    figure = Figure((WIDTH_INCHES, 2.9 * len(titles) + 0.6), layout="constrained")
    axes = figure.subplots(len(titles), 1)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9)
        axis.locator_params(nbins=6)
    for number, place in enumerate(places):
        c = order[round(place)]
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": "none",
        }
        large = {"markersize": 9, "markeredgecolor": "black", **style}
        axes[0].plot(*points[c].T, markersize=2.5, alpha=0.5, **style)
        label = _with_count(names, counts, c)
        axes[1].plot(*points[c].mean(axis=0), label=label, **large)
        if prototypes is not None:
            axes[2].plot(*prototypes[c], **large)
    _legend_below(figure, [axes[1]])
    return figure


@rc_context(STYLE)
def bars(panels: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw horizontal bars with their numbers, one panel above the other.

    Parameters
    ----------
    panels : mapping of str to mapping of str to float
        Title of each panel's axis; name and length of its bars.

    Returns
    -------
    Figure
    """
    lengths = [len(panel) + 2 for panel in panels.values()]
    figure = Figure((WIDTH_INCHES, 0.26 * sum(lengths) + 0.3), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=lengths)[:, 0]
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        places = range(len(panel))
        drawn = axis.barh(places, list(panel.values()), color=COLOURS[0])
        axis.set_yticks(places, [in_picture(name) for name in panel])
        axis.bar_label(drawn, fmt=" {:,.3g}", fontsize=8)
        axis.margins(x=0.15)
        axis.set_ylim(len(panel) - 0.4, -0.6)
        axis.set_xlabel(title)
    return figure


def _legend_inches(entries: int) -> float:
    """Return the height in inches of a legend with two columns."""
    return 0.2 * -(-entries // 2)


def _legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        columns = 2 if len(handles) > 1 else 1
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
