"""The figures of a report, drawn by matplotlib without a display.

Colours of lines are in `clip2fl_cli.colours`. Areas have the colour map cividis.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from clip2fl_cli.charts import Chart, Hints, Key, Panel, in_picture
from clip2fl_cli.colours import (
    IN_BACKGROUND,
    INK,
    MUTED,
    SURFACE,
    Colour,
    Style,
)
from clip2fl_cli.runs import by_frequency
from clip2fl_common.shown import shown

# Inches of a panel that stands alone, and of one beside others.
WIDE = 4.2
NARROW = 4.0
# More class names than this do not fit beside an axis.
MAX_NAMES = 30
# More cells than this are too small for their numbers.
MAX_NUMBERED_CELLS = 150
# More hover texts than this make a page slow.
MAX_HINTS = 1024
# More places than this on the axis of rounds cannot be hit by a pointer.
MAX_HINTED_ROUNDS = 60
# Longer names leave no room beside an axis.
MAX_TICK_NAME = 24
# Text on colours of a heat map; not exactly white, which is a page's background.
ON_DARK, ON_LIGHT = "#fefefe", "#101010"


@dataclass(frozen=True)
class Curve:
    """One line over the rounds.

    Attributes
    ----------
    label : str
        Name of the line.
    values : ndarray, shape [S, R]
        One row per seed, one column per round; nan if there is no value.
    style : Style
        Its colour and dashes.
    """

    label: str
    values: npt.NDArray[np.float64]
    style: Style

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean over the seeds, shape [R]."""
        return np.asarray(self.values.mean(axis=0))


@dataclass(frozen=True)
class Points:
    """The accuracy of each class, for one classifier."""

    label: str
    values: Sequence[float | None]
    style: Style


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval and the single values.

    Attributes
    ----------
    label : str
        Name of the row.
    mean : float
        The mean.
    interval : tuple of float or None
        Limits of the interval; None if it is unknown.
    values : sequence of float
        Single values, drawn as small points.
    style : Style
        Its colour.
    """

    label: str
    mean: float
    interval: tuple[float, float] | None
    values: Sequence[float]
    style: Style


def three_digits(value: float) -> str:
    """Return a number with three digits, or with all of a larger one's whole part.

    Parameters
    ----------
    value : float
        The number, of any size.

    Returns
    -------
    str
        For example "0.457", "3.94" and "1,521"; never a power of ten for seconds.
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def over_rounds(
    panels: Mapping[str, Sequence[Curve]],
    top: float | None = None,
    form: Callable[[float], str] = three_digits,
) -> Chart:
    """Draw curves over the rounds.

    Parameters
    ----------
    panels : mapping of str to sequence of Curve
        Title and curves of each panel. Several seeds are drawn as their mean, with a
        band from the smallest to the largest value.
    top : float or None
        End of the vertical axis, which all panels then share from 0 on.
    form : callable
        Writes the numbers of hover texts.

    Returns
    -------
    Chart
        Two panels beside one another. Curves in the style `IN_BACKGROUND` share an
        entry of the legend.
    """
    curves = {curve.label: curve for group in panels.values() for curve in group}

    def panel(title: str, group: Sequence[Curve]) -> Panel:
        def draw(axis: Axes, hints: Hints) -> None:
            _draw_curves(axis, hints, group, form)
            if top is not None:
                # A line at 0 stays visible above the axis.
                axis.set_ylim(-0.02 * top, top)

        return Panel(title, (NARROW, 2.5), draw)

    return Chart(
        [panel(title, group) for title, group in panels.items()],
        _keys(curves.values(), has_line=True, has_marker=False),
        columns=2,
    )


def _draw_curves(
    axis: Axes, hints: Hints, curves: Sequence[Curve], form: Callable[[float], str]
) -> None:
    rounds = max(curve.values.shape[1] for curve in curves)
    for curve in curves:
        behind = curve.style == IN_BACKGROUND
        known = ~np.isnan(curve.mean)
        # Rounds without a value are bridged; sites may evaluate only some rounds.
        x = (np.flatnonzero(known) + 1).astype(float)
        axis.plot(
            x,
            curve.mean[known],
            color=curve.style.colour.light,
            linestyle=(0, curve.style.dash) if curve.style.dash else "-",
            linewidth=0.8 if behind else 1.7,
            marker="o" if len(x) == 1 else None,
            zorder=1.5 if behind else 2.5,
        )
        if len(curve.values) > 1 and not behind:
            axis.fill_between(
                x,
                curve.values.min(axis=0)[known],
                curve.values.max(axis=0)[known],
                color=curve.style.colour.light,
                alpha=0.15,
                linewidth=0,
            )
    axis.set_xlim((0.5, 1.5) if rounds == 1 else (1, rounds))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.set_xlabel("round")
    # Areas over the whole height, each with the values of its round.
    step = math.ceil(rounds / MAX_HINTED_ROUNDS)
    for number in range(1, rounds + 1, step):
        texts = [
            f"{shown(curve.label)}: {form(curve.mean[number - 1])}"
            for curve in curves
            if number <= curve.values.shape[1] and not np.isnan(curve.mean[number - 1])
        ]
        hint = "\n".join([f"round {number}", *texts])
        hints.add_column(axis, number - step / 2, step, hint)


def _keys(
    entries: Iterable[Curve | Points], has_line: bool, has_marker: bool
) -> list[Key]:
    """Return the entries of a legend: one for all entries in the background."""
    keys, others = [], 0
    for entry in entries:
        if entry.style == IN_BACKGROUND:
            others += 1
        else:
            keys.append(Key(entry.label, entry.style, has_line, has_marker))
    if others:
        keys.append(Key(f"{others} others", IN_BACKGROUND, has_line, has_marker))
    return keys


def _with_count(names: Sequence[str], counts: Sequence[int] | None, c: int) -> str:
    name = in_picture(names[c], MAX_TICK_NAME)
    return name if counts is None else f"{name} ({counts[c]:,})"


def by_class(
    entries: Sequence[Points], names: Sequence[str], counts: Sequence[int] | None
) -> Chart:
    """Draw per-class accuracy, with the most frequent class on top.

    Parameters
    ----------
    entries : sequence of Points
        Accuracy of each class, for each compared variant or classifier.
    names : sequence of str
        Class names in the order of the values.
    counts : sequence of int or None
        Training images of each class, if known.

    Returns
    -------
    Chart
    """
    order = by_frequency(counts, len(names))
    named = len(names) <= MAX_NAMES
    front = [entry for entry in entries if entry.style != IN_BACKGROUND]
    # Side by side, so that no marker covers another.
    dodge = min(0.14, 0.8 / max(len(front), 1))
    row = max(0.3, 0.06 * len(front))

    def draw(axis: Axes, hints: Hints) -> None:
        for entry in entries:
            behind = entry.style == IN_BACKGROUND
            shift = (
                0.0 if behind else dodge * (front.index(entry) - (len(front) - 1) / 2)
            )
            values = (entry.values[c] for c in order)
            axis.plot(
                [np.nan if value is None else value for value in values],
                np.arange(len(order)) + shift,
                color=entry.style.colour.light,
                marker=entry.style.marker,
                markersize=5.5 if named else 2.5,
                markeredgewidth=1 if behind else 0,
                linestyle="none",
                zorder=1.5 if behind else 2.5,
            )
        if named:
            axis.set_yticks(
                range(len(order)), [_with_count(names, counts, c) for c in order]
            )
        else:
            axis.set_ylabel("class, by frequency rank")
        axis.set_ylim(len(order) - 0.4, -0.6)
        axis.set_xlim(-3, 103)
        axis.set_xlabel("test accuracy, %")
        if len(order) <= MAX_HINTS:
            for place, c in enumerate(order):
                texts = [
                    f"{shown(entry.label)}: "
                    + ("-" if (v := entry.values[c]) is None else f"{v:.1f} %")
                    for entry in entries
                ]
                hint = "\n".join([shown(names[c]), *texts])
                hints.add_row(axis, place - 0.5, 1, hint)

    height = row * len(names) + 0.8 if named else 6.0
    return Chart(
        [Panel("", (WIDE, height), draw)],
        _keys(entries, has_line=False, has_marker=True),
    )


def heat_map(
    matrix: npt.NDArray[np.int64],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    row_title: str,
    column_title: str,
    bar_title: str,
    share_of_row: bool = False,
) -> Chart:
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
        Show the percentage of the row instead of the count.

    Returns
    -------
    Chart
    """
    percent = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    colour = percent if share_of_row else np.log10(np.maximum(matrix, 0.5))

    def draw(axis: Axes, hints: Hints) -> None:
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        image = axis.imshow(
            colour, cmap="cividis", aspect="auto", interpolation="nearest"
        )
        bar = axis.figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label(bar_title)
        if share_of_row:
            bar.locator = MaxNLocator(5)
        else:
            ticks = [n for n in range(6) if 10**n <= max(int(matrix.max()), 1)]
            bar.set_ticks(ticks, labels=[f"{10**n:,}" for n in ticks])
        for names, title, which in (
            (columns, column_title, axis.xaxis),
            (rows, row_title, axis.yaxis),
        ):
            which.set_label_text(title)
            if len(names) <= MAX_NAMES:
                which.set_ticks(
                    range(len(names)), [in_picture(n, MAX_TICK_NAME) for n in names]
                )
            else:
                which.set_major_locator(MaxNLocator(6, integer=True))
        if len(columns) <= MAX_NAMES:
            axis.tick_params("x", rotation=60)
        middle = (colour.min() + colour.max()) / 2
        for (row, column), count in np.ndenumerate(matrix):
            if matrix.size <= MAX_NUMBERED_CELLS:
                axis.text(
                    column,
                    row,
                    f"{percent[row, column]:.0f}" if share_of_row else f"{count}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=ON_LIGHT if colour[row, column] > middle else ON_DARK,
                )
            if matrix.size <= MAX_HINTS:
                names = (
                    f"{row_title} {shown(rows[row])}, "
                    f"{column_title.partition(',')[0]} {shown(columns[column])}"
                )
                number = (
                    f"{percent[row, column]:.1f} % ({count:,} images)"
                    if share_of_row
                    else f"{count:,} {bar_title}"
                )
                hints.add_cell(axis, column, row, f"{names}: {number}")

    height = float(np.clip(0.26 * len(rows) + 1.6, 2.5, 7.5))
    return Chart([Panel("", (WIDE, height), draw)])


def bars_panel(
    title: str, values: Mapping[str, float], colours: Mapping[str, Colour] | None = None
) -> Panel:
    """Return a panel of horizontal bars with their numbers.

    Parameters
    ----------
    title : str
        Title of the panel.
    values : mapping of str to float
        Name and length of each bar.
    colours : mapping of str to Colour, or None
        Colour of each bar; grey if it has none.

    Returns
    -------
    Panel
    """
    known = colours or {}

    def draw(axis: Axes, hints: Hints) -> None:
        places = range(len(values))
        drawn = axis.barh(
            places,
            list(values.values()),
            height=0.62,
            color=[known.get(name, MUTED).light for name in values],
        )
        for bar, (name, value) in zip(drawn, values.items(), strict=True):
            hints.add(bar, f"{shown(name)}: {three_digits(value)}")
        axis.set_yticks(places, [in_picture(name, MAX_TICK_NAME) for name in values])
        axis.tick_params("y", length=0)
        axis.bar_label(drawn, fmt=three_digits, fontsize=8, padding=3)
        axis.margins(x=0.18)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.grid(visible=False, axis="y")
        axis.set_ylim(len(values) - 0.4, -0.6)

    return Panel(title, (NARROW, _row_inches(len(values))), draw)


def estimates_panel(
    title: str, estimates: Sequence[Estimate], reference: float | None = None
) -> Panel:
    """Return a panel with a row for each estimate: values, mean and interval.

    Parameters
    ----------
    title : str
        Title of the panel.
    estimates : sequence of Estimate
        The rows, the first on top.
    reference : float or None
        Place of a vertical line.

    Returns
    -------
    Panel
    """

    def draw(axis: Axes, hints: Hints) -> None:
        if reference is not None:
            axis.axvline(reference, color=INK.light, linewidth=0.9)
        for row, estimate in enumerate(estimates):
            colour = estimate.style.colour.light
            if estimate.interval is not None:
                axis.plot(estimate.interval, (row, row), color=colour, linewidth=2)
            axis.plot(
                estimate.values,
                [row + 0.28] * len(estimate.values),
                color=colour,
                marker="|",
                markersize=4.5,
                linestyle="none",
            )
            axis.plot(
                estimate.mean,
                row,
                color=colour,
                # The background's marker, a tick, stands for single values here.
                marker="o"
                if estimate.style == IN_BACKGROUND
                else estimate.style.marker,
                markersize=6.5,
                markeredgecolor=SURFACE.light,
            )
            text = f"{shown(estimate.label)}: {estimate.mean:.1f}"
            if estimate.interval is not None:
                low, high = estimate.interval
                text += f" [{low:.1f}, {high:.1f}]"
            hints.add_row(axis, row - 0.5, 1, text)
        axis.set_yticks(
            range(len(estimates)),
            [in_picture(estimate.label, MAX_TICK_NAME) for estimate in estimates],
        )
        axis.tick_params("y", length=0)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.margins(x=0.08)
        axis.set_ylim(len(estimates) - 0.4, -0.6)

    return Panel(title, (NARROW, _row_inches(len(estimates))), draw)


def _row_inches(rows: int) -> float:
    return 0.26 * rows + 0.75
