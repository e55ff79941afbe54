"""The figure of federated features and text prototypes, on their principal plane."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from clip2fl_cli.charts import Chart, Hints, Key, Panel, in_picture
from clip2fl_cli.colours import GROUPS, MUTED, SURFACE, Style
from clip2fl_cli.figures import MAX_TICK_NAME, NARROW
from clip2fl_cli.runs import by_frequency
from clip2fl_common.shown import shown

# Number of classes whose features are drawn; more classes merge into one cloud.
MAX_CLOUDS = 10
# Height of a label, in points.
LABEL_HEIGHT = 10.0
# Number of points drawn for each class.
MAX_POINTS = 20


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
    points = _centred(features)
    # The class means determine the plane. Otherwise the noise within classes, which
    # fills all dimensions, would determine it.
    kinds = [points.mean(axis=1)]
    prototypes = None if text_features is None else _centred(text_features)
    if prototypes is not None:
        kinds.append(prototypes)
    scaled = [kind / max(np.linalg.norm(kind), 1e-12) for kind in kinds]
    _, _, directions = np.linalg.svd(np.concatenate(scaled), full_matrices=False)
    # A single class or dimension gives only a line.
    plane = np.zeros((directions.shape[1], 2))
    plane[:, : min(2, len(directions))] = directions[:2].T
    return points @ plane, None if prototypes is None else prototypes @ plane


def _centred(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return unit vectors around their mean."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit = vectors / np.maximum(lengths, 1e-12)
    return np.asarray(unit - unit.reshape(-1, unit.shape[-1]).mean(axis=0))


def shares_of_distances(
    features: npt.NDArray[np.float64], text_features: npt.NDArray[np.float64] | None
) -> list[float]:
    """Return how much of the squared distances the principal plane holds.

    Parameters
    ----------
    features, text_features : ndarray
        See `principal_plane`.

    Returns
    -------
    list of float
        Shares in [0, 1]: between the class means, and between the prototypes if there
        are any.
    """
    points, prototypes = principal_plane(features, text_features)
    pairs = [(_centred(features).mean(axis=1), points.mean(axis=1))]
    if text_features is not None and prototypes is not None:
        pairs.append((_centred(text_features), prototypes))
    return [
        float(np.square(held).sum() / max(np.square(whole).sum(), 1e-12))
        for whole, held in pairs
    ]


def clouds(
    features: npt.NDArray[np.float64],
    text_features: npt.NDArray[np.float64] | None,
    names: Sequence[str],
    counts: Sequence[int] | None,
    groups: Mapping[str, Sequence[int]],
) -> Chart:
    """Draw federated features and text prototypes in two dimensions.

    Parameters
    ----------
    features : ndarray, shape [C, m, d]
        Federated features; at most `MAX_POINTS` of a class are drawn.
    text_features : ndarray or None, shape [C, d]
        Prototypes.
    names : sequence of str
        Class names.
    counts : sequence of int or None
        Training images of each class, if known. With many classes, `MAX_CLOUDS`
        classes are drawn, evenly over the frequencies.
    groups : mapping of str to sequence of int
        Classes of the groups in `clip2fl_cli.colours.GROUPS`, which have a colour each.

    Returns
    -------
    Chart
    """
    points, prototypes = principal_plane(features, text_features)
    order = by_frequency(counts, len(names))
    places = np.linspace(0, len(order) - 1, min(MAX_CLOUDS, len(order)))
    classes = [order[round(place)] for place in places]
    centres = points.mean(axis=1)
    style_of = {
        c: Style(GROUPS[group], marker=marker)
        for (group, members), marker in zip(groups.items(), "oDs", strict=True)
        for c in members
    }
    drawn_groups = [
        Key(f"{group}-shot class", style_of[members[0]], False, True)
        for group, members in groups.items()
        if not style_of.keys().isdisjoint(members) and set(members) & set(classes)
    ]

    def draw_features(axis: Axes, hints: Hints) -> None:
        step = math.ceil(points.shape[1] / MAX_POINTS)
        for c in classes:
            axis.plot(
                *points[c, ::step].T,
                color=style_of[c].colour.light,
                marker="o",
                markersize=2,
                markeredgewidth=0,
                linestyle="none",
                alpha=0.35,
            )
        _draw_named(axis, hints, centres, points.std(axis=1).max(axis=0))

    def draw_prototypes(axis: Axes, hints: Hints) -> None:
        assert prototypes is not None
        _draw_named(axis, hints, prototypes, np.zeros(2))

    def _draw_named(
        axis: Axes,
        hints: Hints,
        means: npt.NDArray[np.float64],
        scatter: npt.NDArray[np.float64],
    ) -> None:
        chosen = means[classes]
        middle = (chosen.max(axis=0) + chosen.min(axis=0)) / 2
        extent = np.maximum(np.ptp(chosen, axis=0) / 2, 1e-9)
        # Clouds may be far wider than the distance of their centres. Then only the
        # points near the centres are in the picture.
        half = 1.35 * extent + np.minimum(2 * scatter, 0.6 * extent)
        axis.set_xlim(middle[0] - half[0], middle[0] + half[0])
        axis.set_ylim(middle[1] - half[1], middle[1] + half[1])
        axis.locator_params(nbins=5)
        size = np.array([240.0, 190.0])  # of the drawing, in points
        at = (chosen - middle + half) / (2 * half) * size
        labels = [in_picture(names[c], MAX_TICK_NAME) for c in classes]
        shifts = label_shifts(at, labels)
        for c, label, shift in zip(classes, labels, shifts, strict=True):
            (marker,) = axis.plot(
                *means[c],
                color=style_of[c].colour.light,
                marker=style_of[c].marker,
                markersize=6,
                markeredgecolor=SURFACE.light,
                linestyle="none",
            )
            hints.add(marker, _hint_of_class(names, counts, c))
            axis.annotate(
                label,
                means[c],
                shift,
                textcoords="offset points",
                va="center",
                ha="center",
                fontsize=8,
                arrowprops={
                    "arrowstyle": "-",
                    "color": MUTED.light,
                    "linewidth": 0.5,
                    # A label beside its marker needs no line.
                    "visible": abs(shift[1]) > LABEL_HEIGHT,
                },
            )

    panels = [Panel("Federated features", (NARROW, 3.0), draw_features)]
    if prototypes is not None:
        panels.append(Panel("Text prototypes", (NARROW, 3.0), draw_prototypes))
    return Chart(panels, drawn_groups, columns=2)


def _hint_of_class(names: Sequence[str], counts: Sequence[int] | None, c: int) -> str:
    name = shown(names[c])
    return name if counts is None else f"{name}: {counts[c]:,} training images"


def label_shifts(
    places: npt.NDArray[np.float64], texts: Sequence[str]
) -> list[tuple[float, float]]:
    """Return where labels go, so that none covers another label or a marker.

    Parameters
    ----------
    places : ndarray, shape [N, 2]
        Markers, in points.
    texts : sequence of str
        Their labels.

    Returns
    -------
    list of tuple of float
        From each marker to the middle of its label, in points. If there is no free
        place near a marker, its label covers others.
    """
    taken = [(x, y, 4.0, 4.0) for x, y in places]
    shifts = []
    for (x, y), text in zip(places, texts, strict=True):
        half = 2.4 * len(text) + 1
        near: list[tuple[float, float]] = [(half + 5, 0), (-half - 5, 0)]
        near += [
            (across, up * distance * LABEL_HEIGHT)
            for distance in (1, 1.7, 2.5, 3.5)
            for across in (0, half / 2, -half / 2, half, -half)
            for up in (1, -1)
        ]
        free = [
            (dx, dy)
            for dx, dy in near
            if not any(
                abs(x + dx - ox) < half + ow
                and abs(y + dy - oy) < LABEL_HEIGHT / 2 + oh
                for ox, oy, ow, oh in taken
            )
        ]
        shift = (free or near)[0]
        taken.append((x + shift[0], y + shift[1], half, LABEL_HEIGHT / 2))
        shifts.append(shift)
    return shifts
