"""Tables of a report: rows and cells of the runs' measurements."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clip2fl_cli.page import Cell, Table, TableRow
from clip2fl_cli.runs import FinishedRun
from clip2fl_cli.summary import Spread, teachers

# Balanced accuracy first, because a phone shows only the first columns.
COLUMNS = {
    "balanced": "balanced",
    "many": "many",
    "medium": "medium",
    "few": "few",
    "top1": "top-1",
}
TITLES = tuple(COLUMNS.values())
# Larger matrices are only drawn; artifacts.safetensors contains the numbers.
MAX_TABLE_CELLS = 12_000
LOSSES = {
    "client": "client (total)",
    "distillation": "distillation",
    "gradient_matching": "gradient matching",
    "prototype_contrast": "prototype contrast",
}


def rounds_table(
    run: FinishedRun, values: Callable[[Mapping[str, Any]], dict[str, Any]], name: str
) -> Table:
    """Return a folded table with one row a round."""
    columns = list(
        dict.fromkeys(column for line in run.rounds for column in values(line))
    )
    rows = [
        TableRow(
            [
                Cell.number(line["round"], 0),
                *(
                    Cell.number(
                        value := values(line).get(column),
                        0 if isinstance(value, int) else 2,
                    )
                    for column in columns
                ),
            ]
        )
        for line in run.rounds
    ]
    return Table(name, "Numbers: every round", ["round", *columns], rows, folded=True)


def runs_table(runs: Mapping[str, Sequence[FinishedRun]]) -> Table:
    """Return a folded table of the last round of every run."""
    rows = [
        TableRow(
            [
                Cell(variant),
                Cell(str(run.seed)),
                Cell(head),
                *accuracy_cells(run.final(head)),
            ]
        )
        for variant, group in runs.items()
        for run in group
        for head in run.heads
    ]
    header = ["variant", "seed", "head", *TITLES]
    return Table(
        "accuracy-runs", "Numbers: last round of every run", header, rows, folded=True
    )


def matrix_tables(
    name: str,
    caption: str,
    header: Sequence[str],
    names: Sequence[str],
    matrix: npt.NDArray[np.int64],
) -> list[Table]:
    """Return a folded table of counts, or none if it is too large for a browser."""
    if matrix.size > MAX_TABLE_CELLS:
        return []
    rows = [
        TableRow([Cell(own), *(Cell.number(int(n), 0) for n in row)])
        for own, row in zip(names, matrix, strict=True)
    ]
    return [Table(name, f"Numbers: {caption}", header, rows, folded=True)]


def text_table(
    name: str, caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]
) -> Table:
    """Return a table whose cells are text."""
    body = [TableRow([Cell(text) for text in row]) for row in rows]
    return Table(name, caption, header, body, is_text=True)


def teacher_rows(
    runs: Mapping[str, Sequence[FinishedRun]], before: int, after: int = 0
) -> list[TableRow]:
    """Return a row for each teacher, with empty cells around its accuracy."""
    return [
        TableRow(
            [
                Cell(f"teacher {name}, zero-shot"),
                *[Cell("-")] * before,
                *accuracy_cells(accuracy),
                *[Cell("-")] * after,
            ]
        )
        for name, accuracy in teachers(runs).items()
    ]


def accuracy_values(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the accuracy of a round's classifiers, by title."""
    return {
        f"{head} {title}": accuracy[column]
        for head, accuracy in line["accuracy"].items()
        for column, title in COLUMNS.items()
    }


def loss_values(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the losses of a round, by title."""
    return {LOSSES.get(name, name): value for name, value in line["losses"].items()}


def cost_values(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the seconds and bytes of a round, by title."""
    return {
        **{f"s {phase}": seconds for phase, seconds in line["seconds"].items()},
        "bytes down": line["bytes"]["down"],
        "bytes up": line["bytes"]["up"],
        "bytes of class gradients": gradient_bytes(line),
    }


def gradient_bytes(line: Mapping[str, Any]) -> int:
    """Return the bytes of class gradients that all clients sent in a round."""
    return sum(line["bytes"].get("class_gradients", []))


def mean_bytes(runs: Sequence[FinishedRun], name: str) -> float:
    """Return the mean over rounds and runs."""
    return statistics.fmean(
        gradient_bytes(line) if name == "class_gradients" else line["bytes"][name]
        for run in runs
        for line in run.rounds
    )


def accuracy_cells(accuracy: Mapping[str, float | None]) -> list[Cell]:
    """Return the cells of a classifier's accuracy, in the order of `TITLES`."""
    return [Cell.number(accuracy[column]) for column in COLUMNS]


def spread_cell(spread: Spread | None) -> Cell:
    """Return the cell of a mean over seeds."""
    if spread is None:
        return Cell("-")
    return Cell(str(spread), json.dumps(spread.mean))
