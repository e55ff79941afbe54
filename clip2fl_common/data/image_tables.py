"""Tables of images: CSV or Parquet files with a column for paths and one for classes.

A third column may name the client (a person, a hospital) that an image comes from.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path, PurePath
from typing import NamedTuple, TypeAlias

from clip2fl_common.data.image_files import (
    DatasetError,
    class_name,
    name_fault,
    without_joiners,
)
from clip2fl_common.data.regular_files import open_regular
from clip2fl_common.limits import MAX_NAME_LENGTH
from clip2fl_common.shown import listed, shown

logger = getLogger(__name__)

# Digits of a class number, far beyond the classes of any data set.
MAX_DIGITS = 9
# Its number, and the texts of its cells.
Row: TypeAlias = tuple[int, Sequence[str]]
INSTALL = (
    "pip install 'datasets>=4' (in a checkout: \"Add an optional package\" in "
    "docs/install.md)"
)


class Entry(NamedTuple):
    """One image of a table; ``row`` is its line in a CSV file, or row in Parquet."""

    row: int
    path: str
    label: str
    client: str = ""


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns; the one of clients may be missing."""

    path: str
    label: str
    client: str


@dataclass(frozen=True)
class Table:
    """A list of images.

    Attributes
    ----------
    file : Path
        The file.
    entries : list of Entry
        At least one.
    has_clients : bool
        Whether there is a column of clients.
    """

    file: Path
    entries: list[Entry]
    has_clients: bool

    def at(self, row: int) -> str:
        """Return the place of an entry for a message."""
        word = "row" if self.file.suffix.lower() == ".parquet" else "line"
        return f"{shown(self.file)}, {word} {row}"


def read_table(file: Path, columns: Columns) -> Table:
    """Read a table: Parquet if the suffix is ``.parquet``, else CSV with a header.

    Parameters
    ----------
    file : Path
        The table. CSV is comma-separated UTF-8.
    columns : Columns
        Names of the columns to read; others are ignored.

    Returns
    -------
    Table

    Raises
    ------
    DatasetError
        If the file cannot be read, lacks a column, has it twice or is empty, an entry
        has no path or no class, or a file has two classes; names the line.
    """
    parquet = file.suffix.lower() == ".parquet"
    rows = _parquet_rows(file, columns) if parquet else _csv_rows(file)
    try:
        names = [name.strip() for name in next(rows, (0, ()))[1]]
        _check_columns(file, names, columns)
        table = Table(file, [], columns.client in names)
        table.entries.extend(_entries(table, names, columns, rows))
    except DatasetError:
        raise
    except (OSError, ValueError, NotImplementedError, csv.Error) as error:
        raise DatasetError(
            f"cannot read the list {shown(file)}: {shown(error)}"
        ) from None
    if not table.entries:
        raise DatasetError(f"the list {shown(file)} has no image")
    _check_repeats(table)
    return table


def _check_repeats(table: Table) -> None:
    """Refuse a file with two classes; warn of files that are listed again."""
    first: dict[str, Entry] = {}
    repeats: list[Entry] = []
    for entry in table.entries:
        other = first.setdefault(str(PurePath(entry.path)), entry)
        if class_name(other.label) != class_name(entry.label):
            raise DatasetError(
                f"{table.at(entry.row)}: '{shown(entry.path)}' has the class "
                f"'{shown(entry.label)}', and '{shown(other.label)}' in an earlier one "
                f"({other.row}); a file has one class"
            )
        if other is not entry:
            repeats.append(entry)
    if repeats:
        logger.warning(
            "%s lists %d of its files again, so that they count more than others: %s",
            shown(table.file),
            len(repeats),
            listed(f"{entry.path} ({entry.row})" for entry in repeats),
        )


def _check_columns(file: Path, names: Sequence[str], columns: Columns) -> None:
    for wanted in (columns.path, columns.label):
        if wanted not in names:
            raise DatasetError(
                f"{shown(file)} has no column '{shown(wanted)}'; its columns are "
                f"{listed(names, most=20)}. Name the columns with "
                "dataset.image-column and dataset.label-column"
            )
    for wanted in (columns.path, columns.label, columns.client):
        if names.count(wanted) > 1:
            raise DatasetError(
                f"{shown(file)} has {names.count(wanted)} columns '{shown(wanted)}'; "
                "rename or remove all but one"
            )


def _entries(
    table: Table, names: Sequence[str], columns: Columns, rows: Iterator[Row]
) -> Iterator[Entry]:
    used = [names.index(columns.path), names.index(columns.label)]
    if table.has_clients:
        used.append(names.index(columns.client))
    for row, cells in rows:
        if len(cells) != len(names):
            raise DatasetError(
                f"{table.at(row)}: expected {len(names)} values, found {len(cells)}: "
                f"'{shown(','.join(cells))}'"
            )
        path, *others = (cells[position] for position in used)
        others = [text.strip() for text in others]
        if "\0" in path or not path.strip() or not all(others):
            raise DatasetError(
                f"{table.at(row)}: the path, the class or the client is missing"
            )
        yield Entry(row, path, *others)


def _csv_rows(file: Path) -> Iterator[Row]:
    with open_regular(file) as opened:
        # Excel begins a file with a mark. Names of files may contain any byte.
        text = opened.read().decode("utf-8-sig", "surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    for cells in reader:
        if cells:  # not an empty line
            yield reader.line_num, cells


def _parquet_rows(file: Path, columns: Columns) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise DatasetError(
            f"{shown(file)} is a Parquet file, which needs pyarrow: {INSTALL}"
        ) from None
    with open_regular(file) as opened:
        whole = io.BytesIO(opened.read())
    with parquet.ParquetFile(whole) as content:
        names = content.schema_arrow.names
        wanted = (columns.path, columns.label, columns.client)
        used = [name for name in wanted if name in names]
        yield 0, used if set(wanted[:2]) <= set(used) else names
        row = 0
        for batch in content.iter_batches(columns=used):
            for cells in zip(*(column.to_pylist() for column in batch), strict=True):
                row += 1
                yield row, [_text(cell, file, row) for cell in cells]


def _text(cell: object, file: Path, row: int) -> str:
    if cell is None:
        return ""
    # bool is an int, and no class.
    if isinstance(cell, str | int) and not isinstance(cell, bool):
        return str(cell)
    raise DatasetError(
        f"{shown(file)}, row {row}: found a value of type {type(cell).__name__}, but "
        "paths, classes and clients are texts or whole numbers"
    )


def class_numbers(
    train: Table, test: Table, names: Sequence[str]
) -> tuple[Sequence[str], list[int], list[int]]:
    """Return the classes of two tables: their names, and each image's number.

    Parameters
    ----------
    train, test : Table
        The images. If all training images have names as classes, or all have numbers
        from 0 on, so must the test images.
    names : sequence of str
        The classes in their order; empty: the names in the training table, sorted.

    Returns
    -------
    sequence of str, list of int, list of int
        C names, and the class of each training and test image in [0, C).

    Raises
    ------
    DatasetError
        If a class is unknown, has a name that `name_fault` refuses, or has no training
        image; names the line.
    """
    used = {class_name(entry.label) for entry in train.entries}
    if not names:
        if all(map(_is_number, used)):
            raise DatasetError(
                f"the classes in {shown(train.file)} are numbers; set "
                "dataset.class-names to their names, in the order of the numbers"
            )
        _refuse_faulty_names(train)
        names = sorted(used)
    numbers: Mapping[str, int] = {name: number for number, name in enumerate(names)}
    if not used <= numbers.keys() and all(map(_is_number, used)):
        numbers = {str(number): number for number in range(len(names))}
    labels = [_numbered(table, numbers, names) for table in (train, test)]
    if missing := set(range(len(names))).difference(labels[0]):
        raise DatasetError(
            f"{shown(train.file)} has no image of the class "
            f"{listed(names[n] for n in sorted(missing))}, so nobody would hold it"
        )
    return names, labels[0], labels[1]


def _refuse_faulty_names(table: Table) -> None:
    rows: dict[str, int] = {}
    for entry in table.entries:
        rows.setdefault(entry.label, entry.row)
    first: dict[str, str] = {}
    for label, row in rows.items():
        named = f"{table.at(row)}: the class '{shown(label[:MAX_NAME_LENGTH])}'"
        if fault := name_fault(label):
            raise DatasetError(
                f"{named} has {fault}; correct it, and save the list as UTF-8"
            )
        name = class_name(label)
        other = first.setdefault(without_joiners(name), name)
        if other != name:
            raise DatasetError(f"{named} looks the same as '{shown(other)}'")


def _is_number(label: str) -> bool:
    return label.isdecimal() and len(label) <= MAX_DIGITS


def _numbered(
    table: Table, numbers: Mapping[str, int], names: Sequence[str]
) -> list[int]:
    found = []
    for entry in table.entries:
        label = class_name(entry.label)
        if label not in numbers:
            known = listed(names, most=20)
            raise DatasetError(
                f"{table.at(entry.row)}: '{shown(entry.label)}' is no class; those of "
                f"the training images, or of dataset.class-names, are {known}"
            )
        found.append(numbers[label])
    return found
