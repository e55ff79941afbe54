"""Sections of a report that show a figure, with its numbers in a table below."""

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clip2fl_cli import figures
from clip2fl_cli.figures import Curve
from clip2fl_cli.page import Cell, Picture, Section, Table, TableRow
from clip2fl_cli.runs import LAST_ROUNDS, FinishedRun
from clip2fl_cli.tables import COLUMNS, LOSSES, matrix_tables

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
    """

    label: str
    head: str
    runs: Sequence[FinishedRun]

    def per_class(self) -> list[float | None]:
        """Return per-class accuracy, mean of the last rounds and all seeds."""
        columns = zip(*(run.per_class(self.head) for run in self.runs), strict=True)
        return [None if None in c else statistics.fmean(c) for c in columns]

    def balanced(self) -> float:
        """Return balanced accuracy, mean of the last rounds and all seeds."""
        values = [run.last(self.head, "balanced") for run in self.runs]
        return statistics.fmean(value for value in values if value is not None)


def accuracy_section(
    lines: Sequence[Line], table: Table, aside: Collection[str] = ()
) -> Section:
    """Return the section of accuracy over the rounds; ``aside`` is drawn in grey."""
    panels = {
        f"{title}, %": [
            Curve(line.label, _over_rounds(line.runs, _accuracy_of(line.head, column)))
            for line in lines
        ]
        for column, title in COLUMNS.items()
        if column != "top1"
    }
    last = "; ".join(f"{line.label} {line.balanced():.1f} %" for line in lines)
    picture = Picture(
        "accuracy",
        f"Balanced, many-, medium- and few-shot accuracy over the rounds. Balanced, "
        f"mean of the last {LAST_ROUNDS}: {last}.",
        figures.over_rounds(panels, aside),
    )
    text = f"In grey, here and below: {', '.join(aside)}." if aside else ""
    return Section("accuracy", "Accuracy over rounds", text, [picture], [table])


def classes_section(lines: Sequence[Line], aside: Collection[str] = ()) -> Section:
    """Return the section of per-class accuracy, for the classes of the first run."""
    run = lines[0].runs[0]
    counts = run.train_counts
    values = {line.label: line.per_class() for line in lines}
    picture = Picture(
        "classes",
        "Accuracy of each class, the most frequent on top; the table below has the "
        "numbers.",
        figures.by_class(values, run.class_names, counts, aside),
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
        f"Numbers: mean of the last {LAST_ROUNDS} rounds",
        ["class", "training images", *values],
        rows,
        folded=True,
    )
    text = "The most frequent class is on top."
    if counts is None:
        text = f"In the order of dataset.class-names. {UNTOLD}"
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
        held[:, run.by_frequency],
    )
    return Section("clients", title, "", [picture], tables)


def features_section(run: FinishedRun) -> Section:
    """Return the section of federated features and text prototypes."""
    title = "Federated features and text prototypes"
    if "features" not in run.artifacts:
        return _absent(
            "features", title, f"{run.config['method']} has no federated features."
        )
    features = run.artifacts["features"].double().numpy()
    text_features = run.artifacts.get("text_features")
    picture = Picture(
        "features",
        "Federated features of each class as a cloud around their mean, projected on "
        "a plane, and the text prototypes of the classes on the same plane.",
        figures.clouds(
            features,
            None if text_features is None else text_features.double().numpy(),
            run.class_names,
            run.train_counts,
        ),
    )
    text = (
        f"{features.shape[1]} features a class in {features.shape[2]} dimensions, as "
        "unit vectors, on the plane that shows most of the class means"
        + (" and of the prototypes." if text_features is not None else ".")
    )
    return Section("features", title, text, [picture])


def losses_section(
    runs: Mapping[str, Sequence[FinishedRun]],
    tables: Sequence[Table],
    aside: Collection[str] = (),
) -> Section:
    """Return the section of losses over the rounds; ``aside`` is drawn in grey."""
    panels = {}
    for key, title in LOSSES.items():
        having = {
            label: group
            for label, group in runs.items()
            if any(_loss_of(key)(line) for run in group for line in run.rounds)
        }
        if having:
            panels[title] = [
                Curve(label, _over_rounds(group, _loss_of(key)))
                for label, group in having.items()
            ]
    if not panels:
        return Section("losses", "Losses", "No round has a loss.")
    picture = Picture(
        "losses",
        f"Losses over the rounds: {', '.join(panels)}.",
        figures.over_rounds(panels, aside),
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
    if f"confusion.{head}" not in run.artifacts:
        return _absent("confusion", title)
    order = run.by_frequency
    matrix = run.artifacts[f"confusion.{head}"].numpy()[order][:, order]
    names = [run.class_names[c] for c in order]
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
        "test images by true class (rows) and predicted class (columns)",
        ["true class", *names],
        names,
        matrix,
    )
    text = f"Of the {head} head after the last round, most frequent class first."
    return Section("confusion", title, text, [picture], tables)


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
