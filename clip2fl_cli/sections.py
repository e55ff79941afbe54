"""Sections of a report that show a figure, with its numbers in a table below."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clip2fl_cli import feature_plane, figures
from clip2fl_cli.colours import IN_BACKGROUND, TEACHER, Style
from clip2fl_cli.figures import Curve, Points
from clip2fl_cli.page import Cell, Picture, Section, Table, TableRow
from clip2fl_cli.runs import FinishedRun
from clip2fl_cli.sites_section import confusion_text
from clip2fl_cli.summary import drawn_images, teachers, tested_on
from clip2fl_cli.tables import LOSSES, matrix_tables
from clip2fl_cli.wording import head_title, last_rounds, method_title

# Panels of the figure of accuracy.
PANELS = {
    "balanced": "Balanced accuracy, %",
    "many": "Many-shot classes, %",
    "medium": "Medium-shot classes, %",
    "few": "Few-shot classes, %",
}
# Keys that every run has to itself.
OWN_KEYS = ("run.dir", "run.name")
NOT_ALLOWED = (
    "No site's policy allows a confusion matrix (send-confusion-matrix), since it "
    "reveals the site's class counts."
)
UNTOLD = "Sites do not report their number of images by class."


@dataclass(frozen=True)
class Line:
    """One classifier in a report, with its runs (one per seed).

    Attributes
    ----------
    label : str
        Name of the line.
    head : str
        Name of the classifier in the runs.
    runs : sequence of FinishedRun
        The runs, at least one.
    style : Style
        Colour and dashes in all figures.
    """

    label: str
    head: str
    runs: Sequence[FinishedRun]
    style: Style

    def per_class(self) -> list[float | None]:
        """Return per-class accuracy, mean of the last rounds and all seeds."""
        columns = zip(*(run.per_class(self.head) for run in self.runs), strict=True)
        return [None if None in c else statistics.fmean(c) for c in columns]

    def balanced(self) -> float:
        """Return balanced accuracy, mean of the last rounds and all seeds."""
        values = [run.last(self.head, "balanced") for run in self.runs]
        return statistics.fmean(value for value in values if value is not None)


def accuracy_section(lines: Sequence[Line], table: Table) -> Section:
    """Return the section of accuracy over the rounds."""
    known = teachers({line.label: line.runs for line in lines})
    panels = {}
    for column, title in PANELS.items():
        curves = [
            Curve(
                line.label,
                _over_rounds(line.runs, _accuracy_of(line.head, column)),
                line.style,
            )
            for line in lines
        ]
        if all(np.isnan(curve.mean).all() for curve in curves):
            continue  # a group without classes
        rounds = max(curve.values.shape[1] for curve in curves)
        curves += [
            Curve(f"teacher {name}", np.full((1, rounds), accuracy[column]), TEACHER)
            for name, accuracy in known.items()
            if accuracy[column] is not None
        ]
        panels[title] = curves
    highest = max(
        float(np.nanmax(curve.values))
        for curves in panels.values()
        for curve in curves
        if not np.isnan(curve.values).all()
    )
    last = "; ".join(f"{line.label} {line.balanced():.1f} %" for line in lines)
    picture = Picture(
        "accuracy",
        "Balanced, many-, medium- and few-shot accuracy over the rounds, on the same "
        f"scale. Balanced, mean of {_averaged(lines)}: {last}.",
        figures.over_rounds(
            panels,
            top=min(100.0, 10 * math.ceil(highest / 10 + 0.2)),
            form="{:.1f}".format,
        ),
    )
    aside = [line.label for line in lines if line.style == IN_BACKGROUND]
    text = f"In grey, here and below: {', '.join(aside)}." if aside else ""
    return Section("accuracy", "Accuracy over rounds", text, [picture], [table])


def _averaged(lines: Sequence[Line]) -> str:
    """Return which rounds the means of these classifiers cover, in words."""
    return last_rounds(run for line in lines for run in line.runs)


def classes_section(lines: Sequence[Line]) -> Section:
    """Return the section of per-class accuracy, for the classes of the first run."""
    run = lines[0].runs[0]
    counts = run.train_counts
    values = {line.label: line.per_class() for line in lines}
    picture = Picture(
        "classes",
        "Accuracy of each class, the most frequent on top; the table below has the "
        "numbers.",
        figures.by_class(
            [Points(line.label, values[line.label], line.style) for line in lines],
            run.class_names,
            counts,
        ),
    )
    rows = [
        TableRow(
            [
                Cell(run.class_names[c]),
                Cell.number(counts[c] if counts else None, 0),
                *(Cell.number(accuracy[c]) for accuracy in values.values()),
            ]
        )
        for c in run.by_frequency
    ]
    table = Table(
        "classes-table",
        f"Numbers: mean of {_averaged(lines)}",
        ["class", "training images", *values],
        rows,
        folded=True,
    )
    text = f"Mean of {_averaged(lines)}. The most frequent class is on top."
    if counts is None:
        text = (
            f"Mean of {_averaged(lines)}, in the order of dataset.class-names. {UNTOLD}"
        )
    return Section("classes", "Classes by frequency", text, [picture], [table])


def clients_section(run: FinishedRun) -> Section:
    """Return the section of images by client and class."""
    title = "Images by client and class"
    if "clients_by_class" not in run.artifacts:
        return _absent("clients", title, "" if run.train_counts else UNTOLD)
    held = run.artifacts["clients_by_class"].numpy()
    empty = int((held == 0).sum())
    names = [str(k) for k in range(len(held))]
    picture = Picture(
        "clients",
        f"Training images by client and class: {len(held)} clients hold {held.sum():,} "
        f"images; {empty} of {held.size} pairs of client and class have none.",
        figures.heat_map(
            held[:, run.by_frequency],
            rows=names,
            columns=[run.class_names[c] for c in run.by_frequency],
            row_title="client",
            column_title="class, most frequent first",
            bar_title="training images",
        ),
    )
    tables = matrix_tables(
        "clients-table",
        "training images by client and class",
        ["client", *(run.class_names[c] for c in run.by_frequency)],
        names,
        [
            [Cell.number(int(n), 0) for n in row]
            for row in held[:, run.by_frequency].tolist()
        ],
    )
    return Section("clients", title, "", [picture], tables)


def features_section(run: FinishedRun) -> Section:
    """Return the section of federated features and text prototypes."""
    title = "Federated features and text prototypes"
    if "features" not in run.artifacts:
        return _absent(
            "features",
            title,
            f"{method_title(run.config['method'])} has no federated features.",
        )
    features = run.artifacts["features"].double().numpy()
    text_features = run.artifacts.get("text_features")
    groups = run.facts["shot_groups"]
    picture = Picture(
        "features",
        "The mean of each class's federated features, with single features as small "
        "points, projected on a plane"
        + (
            "; and the text prototypes of the classes on the same plane."
            if text_features is not None
            else "."
        ),
        feature_plane.clouds(
            features,
            None if text_features is None else text_features.double().numpy(),
            run.class_names,
            run.train_counts,
            {group: groups[group] for group in ("many", "medium", "few")},
        ),
    )
    drawn = min(feature_plane.MAX_CLOUDS, len(features))
    shares = feature_plane.shares_of_distances(
        features, None if text_features is None else text_features.double().numpy()
    )
    text = (
        f"Each name is at the mean of its class's {features.shape[1]} features, which "
        f"have {features.shape[2]} dimensions. The plane holds {shares[0]:.0%} of the "
        "squared distances between the class means"
        + (
            f" and {shares[1]:.0%} of those between the prototypes"
            if shares[1:]
            else ""
        )
        + f". Small points: at most {feature_plane.MAX_POINTS} features of a class, "
        "where they lie inside the drawing."
    )
    if drawn < len(features):
        text += f" {drawn} of {len(features)} classes, evenly over the frequencies."
    return Section("features", title, text, [picture])


def losses_section(
    runs: Mapping[str, Sequence[FinishedRun]],
    tables: Sequence[Table],
    styles: Mapping[str, Style],
) -> Section:
    """Return the section of losses over the rounds, each label in its style."""
    panels = {}
    for key, title in LOSSES.items():
        having = {
            label: group
            for label, group in runs.items()
            if any(_loss_of(key)(line) for run in group for line in run.rounds)
        }
        if having:
            panels[f"{title[0].upper()}{title[1:]}"] = [
                Curve(label, _over_rounds(group, _loss_of(key)), styles[label])
                for label, group in having.items()
            ]
    if not panels:
        return Section("losses", "Losses", "No round has a loss.")
    picture = Picture(
        "losses",
        f"Losses over the rounds: {', '.join(panels)}.",
        figures.over_rounds(panels),
    )
    text = (
        "Client losses are means over the last local epoch. Gradient matching and "
        "prototype contrast are measured after the last step on federated features."
    )
    return Section("losses", "Losses", text, [picture], tables)


def confusion_section(run: FinishedRun) -> Section:
    """Return the section of the delivered classifier's confusion matrix."""
    title = "Confusion matrix"
    head = run.heads[0]
    sites = confusion_text(run)
    if f"confusion.{head}" not in run.artifacts:
        if not run.rounds[-1]["accuracy"]:
            return _absent("confusion", title, "The last round was not evaluated.")
        return _absent("confusion", title, "" if sites is None else NOT_ALLOWED)
    order = run.by_frequency
    matrix = run.artifacts[f"confusion.{head}"].numpy()[order][:, order]
    names = [run.class_names[c] for c in order]
    images = matrix.sum(axis=1)
    percent = 100 * matrix / np.maximum(images, 1)[:, None]
    correct = 100 * np.trace(matrix) / max(matrix.sum(), 1)
    picture = Picture(
        "confusion",
        f"Test images by true and predicted class: {correct:.1f} % on the diagonal.",
        figures.heat_map(
            matrix,
            rows=names,
            columns=names,
            row_title="true class",
            column_title="predicted class",
            bar_title="percent of the true class",
            share_of_row=True,
        ),
    )
    tables = matrix_tables(
        "confusion-table",
        "percent of each true class (rows) by predicted class (columns)",
        ["true class", *names, "test images"],
        names,
        [
            [*(Cell.number(float(n)) for n in row), Cell.number(int(total), 0)]
            for row, total in zip(percent, images, strict=True)
        ],
    )
    text = (
        f"Classifier: {head_title(head)}, after the last round. Each row adds up to "
        "100 % of a true class; the most frequent class comes first."
    )
    if sites is not None:
        text += f" {sites}"
    if run.whole is not None:
        text += " The matrix counts all test images."
    return Section("confusion", title, text, [picture], tables)


def groups_text(run: FinishedRun) -> str:
    """Return the classes of the many-, medium- and few-shot groups, in words."""
    groups = run.facts["shot_groups"]
    named = "; ".join(
        f"{title}: {', '.join(run.class_names[c] for c in groups[title][:10])}"
        + (f" and {len(groups[title]) - 10} more" if len(groups[title]) > 10 else "")
        for title in ("many", "medium", "few")
    )
    rule = {
        "count": "more than 100, 20 to 100, fewer than 20 training images",
        "rank": "30/40/30 % of the classes by frequency",
        "listed": "30/40/30 % of the classes in the order of dataset.class-names",
    }[groups["rule"]]
    return f"Many-, medium- and few-shot classes ({rule}): {named}."


def images_text(run: FinishedRun) -> list[str]:
    """Return sentences about the server's test images, if there is much to say."""
    said = []
    if run.whole is not None or drawn_images(run) is not None:
        said.append(f"Accuracy on {tested_on(run)}.")
    lost = run.rounds[-1].get("unreadable_images", {}).get("test", 0)
    if lost and run.facts["test_images"]:
        said.append(f"{lost} of all test images cannot be read and are left out.")
    return said


def teacher_text(runs: Sequence[FinishedRun]) -> str:
    """Return the names of the teachers, in words."""
    names = list(teachers({"": runs}))
    return f"teacher {', '.join(names)}" if names else "no teacher"


def _absent(name: str, title: str, reason: str = "") -> Section:
    return Section(
        name, title, reason or "The run is of a version that did not keep it."
    )


def _accuracy_of(head: str, column: str) -> Callable[[Mapping[str, Any]], float | None]:
    def value(line: Mapping[str, Any]) -> float | None:
        # A classifier is missing in rounds before it was first trained.
        found: float | None = line["accuracy"].get(head, {}).get(column)
        return found

    return value


def _loss_of(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    def value(line: Mapping[str, Any]) -> float | None:
        found: float | None = line["losses"].get(name)
        return found

    return value


def _over_rounds(
    runs: Sequence[FinishedRun], value: Callable[[Mapping[str, Any]], float | None]
) -> npt.NDArray[np.float64]:
    """Return a value of each run and round, nan if it is missing; shape [S, R]."""
    rounds = min(len(run.rounds) for run in runs)
    return np.array(
        [
            [
                np.nan if (v := value(line)) is None else v
                for line in run.rounds[:rounds]
            ]
            for run in runs
        ]
    )
