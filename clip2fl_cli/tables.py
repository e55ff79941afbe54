"""Tables of a report: rows and cells of the runs' measurements."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clip2fl_cli.page import Cell, Table, TableRow
from clip2fl_cli.runs import FinishedRun
from clip2fl_cli.summary import Spread, teachers
from clip2fl_cli.wording import head_title

# Balanced accuracy and rare classes first: a phone shows only the first columns.
COLUMNS = {
    "balanced": "balanced",
    "few": "few",
    "medium": "medium",
    "many": "many",
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
    header = ["variant", "seed", "head", *TITLES]
    rows = [
        row_of(
            header,
            {
                "variant": Cell(variant),
                "seed": Cell(str(run.seed)),
                "head": Cell(head_title(head)),
                **accuracy_cells(run.final(head)),
            },
        )
        for variant, group in runs.items()
        for run in group
        for head in run.heads
    ]
    return Table(
        "accuracy-runs", "Numbers: last round of every run", header, rows, folded=True
    )


def matrix_tables(
    name: str,
    caption: str,
    header: Sequence[str],
    names: Sequence[str],
    cells: Sequence[Sequence[Cell]],
) -> list[Table]:
    """Return a folded table of numbers, or none if it is too large for a browser."""
    if len(names) * len(header) > MAX_TABLE_CELLS:
        return []
    rows = [TableRow([Cell(own), *row]) for own, row in zip(names, cells, strict=True)]
    return [Table(name, f"Numbers: {caption}", header, rows, folded=True)]


def text_table(
    name: str,
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    folded: bool = False,
) -> Table:
    """Return a table whose cells are text."""
    body = [TableRow([Cell(text) for text in row]) for row in rows]
    return Table(name, caption, header, body, folded, is_text=True)


def row_of(
    header: Sequence[str], cells: Mapping[str, Cell], marked: bool = False
) -> TableRow:
    """Return a row with cells below some titles, and dashes below the others."""
    return TableRow([cells.get(title, Cell("-")) for title in header], marked)


def teacher_rows(
    runs: Mapping[str, Sequence[FinishedRun]], header: Sequence[str]
) -> list[TableRow]:
    """Return a row for each teacher, named below the first title."""
    return [
        row_of(
            header,
            {
                header[0]: Cell(f"teacher {name}, zero-shot"),
                **accuracy_cells(accuracy),
            },
        )
        for name, accuracy in teachers(runs).items()
    ]


def accuracy_values(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the accuracy of a round's classifiers, by title."""
    return {
        f"{head_title(head)}: {title}": accuracy[column]
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
        "bytes of statistics": statistics_bytes(line),
    }


def statistics_bytes(line: Mapping[str, Any]) -> int:
    """Return the bytes of all that clients sent in a round besides models.

    These are class gradients, class moments or both, as the method has them.
    """
    return sum(line["bytes"].get("class_gradients", []))


def mean_bytes(runs: Sequence[FinishedRun], name: str) -> float:
    """Return the mean over rounds and runs."""
    return statistics.fmean(
        statistics_bytes(line) if name == "class_gradients" else line["bytes"][name]
        for run in runs
        for line in run.rounds
    )


def mean_minutes(runs: Sequence[FinishedRun]) -> float:
    """Return the mean over runs of a run's minutes."""
    return statistics.fmean(run.wall_seconds() / 60 for run in runs)


def accuracy_cells(accuracy: Mapping[str, float | None]) -> dict[str, Cell]:
    """Return the cells of a classifier's accuracy, by title."""
    return {title: Cell.number(accuracy[c]) for c, title in COLUMNS.items()}


def spread_cell(spread: Spread | None) -> Cell:
    """Return the cell of a mean over seeds."""
    if spread is None:
        return Cell("-")
    return Cell(str(spread), json.dumps(spread.mean))
