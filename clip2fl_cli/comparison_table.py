"""A comparison as data: a CSV table with one row per run and round, and a JSON file.

The table contains the values that change from round to round. Its columns have the
names of the fields of ``metrics.jsonl``, with dots: ``accuracy.retrained.balanced``
(on all test images; ``accuracy_held_out.retrained.balanced`` on a part of them),
``accuracy.retrained.per_class.0``, ``losses.client``, ``seconds.clients``,
``bytes.up``. A cell is empty if the round has no such value. The JSON file contains the
rest: the settings that all runs share, and the differing settings of each run.

The two files are sufficient to draw the comparison's page again.
"""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip2fl_cli.run_schema import Facts, Images, Recorded, Round
from clip2fl_cli.runs import (
    ACCURACIES,
    COLUMNS,
    FinishedRun,
    accuracies,
    refuse_missing_parts,
)
from clip2fl_cli.summary import Failure, Origin
from clip2fl_cli.tables import statistics_bytes
from clip2fl_common.shown import short, shown
from server_app.foreign_files import (
    MEGABYTE,
    ForeignFileError,
    check,
    read_json,
    read_text,
)

# A comparison of 12 runs, 1,000 classes and 200 rounds has 30 megabytes.
MAX_TABLE_BYTES = 256 * MEGABYTE
# A row becomes a list, whose items take more memory than the text.
MAX_LINE = 16 * MEGABYTE
MAX_SUMMARY_BYTES = 32 * MEGABYTE
KEY = ("variant", "seed", "round")
# Groups of columns after the key, in this order.
GROUPS = ("test_images", *ACCURACIES, "losses", "seconds", "bytes", "privacy")
# Integers beyond 20 digits are no counts; Python writes no float with more digits.
_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,25})?(e[-+]?[0-9]{1,3})?")

_Path = tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """All data for a comparison's page.

    Attributes
    ----------
    name : str
        Name of the comparison.
    baseline : str
        The variant with which the others are compared.
    runs : mapping of str to sequence of FinishedRun
        Each variant's complete runs, on all test images.
    failures : sequence of Failure
        Runs that did not complete.
    origin : Origin
        Command, date and hardware of the comparison.
    images : Images or None
        The test images of the page; None: as `chosen_images` chooses.
    """

    name: str
    baseline: str
    runs: Mapping[str, Sequence[FinishedRun]]
    failures: Sequence[Failure]
    origin: Origin
    images: Images | None = None


def rounds_csv(runs: Mapping[str, Sequence[FinishedRun]]) -> str:
    """Return the table of all rounds of all runs.

    Parameters
    ----------
    runs : mapping of str to sequence of FinishedRun
        Each variant's runs.

    Returns
    -------
    str
        CSV: a header, then one row per run and round, in order. Reading the numbers
        back gives exactly the same numbers.
    """
    rows = [
        {
            "variant": shown(variant),
            "seed": run.seed,
            "round": line["round"],
            **_cells_of(line),
        }
        for variant, group in runs.items()
        for run in group
        for line in run.rounds
    ]
    found = dict.fromkeys(column for row in rows for column in row)
    order = (*KEY, *GROUPS)
    columns = sorted(found, key=lambda column: order.index(column.split(".")[0]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval=None, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def recorded_facts(runs: Mapping[str, Sequence[FinishedRun]]) -> dict[str, Any]:
    """Return the facts that the table of rounds lacks, each shared value once.

    Parameters
    ----------
    runs : mapping of str to sequence of FinishedRun
        Each variant's runs.

    Returns
    -------
    dict
        ``heads``: classifiers of each variant, the delivered one first;
        ``shared_facts``: fields of ``config.json`` that are the same in all runs;
        ``facts``: each run's other fields, by the name of its folder. Folders and
        trackers of the runs are left out.
    """
    every = [run for group in runs.values() for run in group]
    configs = [
        {key: v for key, v in run.config.items() if not key.startswith("run.")}
        for run in every
    ]
    others = [
        {key: v for key, v in run.facts.items() if key != "config"} for run in every
    ]
    shared_config, shared = _shared(configs), _shared(others)
    return {
        "heads": {variant: group[0].heads for variant, group in runs.items()},
        "shared_facts": {"config": shared_config, **shared},
        "facts": {
            run.folder.name: {
                "config": _without(config, shared_config),
                **_without(other, shared),
            }
            for run, config, other in zip(every, configs, others, strict=True)
        },
    }


def read_compared(table: Path) -> Compared:
    """Read a comparison from its table and the JSON file of the same name.

    Parameters
    ----------
    table : Path
        CSV, as `rounds_csv` writes it.

    Returns
    -------
    Compared

    Raises
    ------
    ForeignFileError
        If a file has not the form that a comparison writes, or the two do not belong
        together; names the file and the field or the line.
    """
    beside = table.with_suffix(".json")
    recorded = read_json(beside, Recorded, MAX_SUMMARY_BYTES)
    lines = _Lines(table)
    runs = {
        variant: [_read_run(variant, name, recorded, beside, lines) for name in names]
        for variant, names in recorded["runs"].items()
    }
    lines.refuse_more()
    return Compared(
        recorded["name"],
        recorded["baseline"],
        runs,
        [
            Failure(failed["variant"], failed["seed"], failed["reason"])
            for failed in recorded.get("failed", [])
        ],
        Origin(recorded["command"], recorded["date"], recorded["hardware"]),
        Images(images) if (images := recorded.get("images")) else None,
    )


class _Lines:
    """The rows of a table, read one after the other.

    Attributes
    ----------
    where : str
        Name of the file, for errors.
    header : list of str
        Names of the columns.
    classes : dict of (str, str) to int
        Number of per-class columns of each accuracy, by field and classifier.
    """

    def __init__(self, table: Path) -> None:
        self.where = shown(table)
        lines = read_text(table, MAX_TABLE_BYTES).split("\n")
        if not lines[-1]:
            lines.pop()
        self._numbered = enumerate(lines, start=1)
        self.header = self._next("a header")
        if tuple(self.header[: len(KEY)]) != KEY:
            raise ForeignFileError(
                f"{self.where}: the first columns must be {', '.join(KEY)}, but are "
                f"{short(self.header[: len(KEY)])}"
            )
        if len(set(self.header)) < len(self.header):
            raise ForeignFileError(f"{self.where}: a column comes twice")
        self._paths = [_path(column) for column in self.header]
        self.classes = _class_columns(self.header, self._paths, self.where)

    def line(self, key: Sequence[str], heads: Mapping[str, str]) -> dict[str, Any]:
        """Return the next row as a line of ``metrics.jsonl``.

        Parameters
        ----------
        key : sequence of str
            Expected variant, seed and round.
        heads : mapping of str to str
            Names of the variant's classifiers, by their names in columns.
        """
        wanted = ", ".join(key)
        cells = self._next(wanted)
        where = f"{self.where}: line {self._number}"
        if len(cells) != len(self.header):
            raise ForeignFileError(
                f"{where} has {len(cells)} cells, but the header has {len(self.header)}"
            )
        if cells[: len(KEY)] != list(key):
            found = short(", ".join(cells[: len(KEY)]))
            raise ForeignFileError(
                f"{where} is of {found}, but by the JSON file it must be of {wanted}"
            )
        content: dict[str, Any] = {
            "round": int(key[-1]),
            **{group: {} for group in GROUPS if group != "test_images"},
        }
        by_field: dict[str, dict[str, dict[str, Any]]] = {}
        for path, column, cell in zip(self._paths, self.header, cells, strict=True):
            if not path:
                continue
            value = _value(cell, column, where)
            if path[0] in ACCURACIES:
                of_heads = by_field.setdefault(path[0], {})
                accuracy = of_heads.setdefault(path[1], {"per_class": []})
                if path[2] == "per_class":
                    accuracy["per_class"].append(value)
                else:
                    accuracy[path[2]] = value
            elif path == ("bytes", "class_gradients"):
                content["bytes"]["class_gradients"] = [] if value is None else [value]
            elif value is not None:
                inner = content
                for part in path[:-1]:
                    inner = inner.setdefault(part, {})
                inner[path[-1]] = value
        for field, of_heads in by_field.items():
            known = {head: a for head, a in of_heads.items() if not _is_empty(a)}
            if stray := known.keys() - heads.keys():
                raise ForeignFileError(
                    f"{where} has an accuracy of {short(min(stray))}, which the JSON "
                    f"file does not list among the heads of {key[0]}"
                )
            content[field] = {
                name: known[head] for head, name in heads.items() if head in known
            }
        check(content, Round, where)
        return content

    def refuse_more(self) -> None:
        """Refuse rows that belong to no run."""
        for number, _ in self._numbered:
            raise ForeignFileError(
                f"{self.where}: line {number} belongs to no run of the JSON file"
            )

    def _next(self, wanted: str) -> list[str]:
        self._number, line = next(self._numbered, (0, None))
        if line is None:
            raise ForeignFileError(
                f"{self.where} ends before {shown(wanted)[:200]} comes"
            )
        where = f"{self.where}: line {self._number}"
        if len(line) > MAX_LINE:
            raise ForeignFileError(
                f"{where} has more than {MAX_LINE:,} characters, which is too long"
            )
        try:
            return next(csv.reader([line], strict=True))
        except csv.Error as error:
            raise ForeignFileError(f"{where} is not CSV: {shown(error)}") from None


def _read_run(
    variant: str, name: str, recorded: Mapping[str, Any], beside: Path, lines: _Lines
) -> FinishedRun:
    facts = _read_facts(name, recorded, shown(beside))
    heads = {shown(head): head for head in recorded["heads"][variant]}
    classes = len(facts["class_names"])
    divided = facts["config"].get("evaluation.tuning-share", 0.0) > 0
    for field in ACCURACIES if divided else ACCURACIES[:1]:
        for head in heads:
            if lines.classes.get((field, head)) != classes:
                raise ForeignFileError(
                    f"{lines.where} has {lines.classes.get((field, head), 0)} columns "
                    f"of {field}.{head}.per_class, but {shown(beside)} has {classes} "
                    f"class_names of {shown(name)}"
                )
    seed = str(facts["config"]["seed"])
    rounds = [
        lines.line((shown(variant), seed, str(number)), heads)
        for number in range(1, facts["config"]["federation.rounds"] + 1)
    ]
    for line in rounds:
        where = f"{lines.where}: round {line['round']} of {shown(name)}"
        refuse_missing_parts(line, facts["config"], where)
    run = FinishedRun(beside.parent / name, facts, rounds)
    if not run.evaluated or len(run.heads) < len(heads):
        raise ForeignFileError(
            f"{lines.where}: the last evaluated round of {shown(name)} must have an "
            f"accuracy of {', '.join(heads)}"
        )
    return run


def _read_facts(name: str, recorded: Mapping[str, Any], where: str) -> dict[str, Any]:
    shared, own = recorded["shared_facts"], recorded["facts"][name]
    facts = {
        **shared,
        **own,
        "config": {**shared.get("config", {}), **own.get("config", {})},
    }
    check(facts, Facts, f"{where}: shared_facts with facts.{shown(name)}")
    return facts


def _cells_of(line: Mapping[str, Any]) -> dict[str, float | None]:
    """Return a round's values by column; names are escaped, so have no line breaks."""
    cells: dict[str, float | None] = {"test_images": line.get("test_images")}
    for field, head, accuracy in accuracies(line):
        prefix = f"{field}.{shown(head)}"
        cells |= {f"{prefix}.{column}": accuracy[column] for column in COLUMNS}
        cells |= {
            f"{prefix}.per_class.{c}": v for c, v in enumerate(accuracy["per_class"])
        }
    for group in ("losses", "seconds"):
        cells |= {f"{group}.{shown(name)}": v for name, v in line[group].items()}
    cells |= {
        "bytes.down": line["bytes"]["down"],
        "bytes.up": line["bytes"]["up"],
        "bytes.class_gradients": statistics_bytes(line),
    }
    for mechanism, spent in line.get("privacy", {}).items():
        cells |= {
            f"privacy.{mechanism}.{field}": spent[field]
            for field in ("epsilon_round", "epsilon_total", "delta")
        }
    return cells


def _path(column: str) -> _Path:
    """Return a column's path in a line of ``metrics.jsonl``; () if it has none."""
    group, _, rest = column.partition(".")
    if column == "test_images":
        return (column,)
    if group in ACCURACIES:
        head, _, field = rest.rpartition(".")
        if head.endswith(".per_class"):
            return group, head.removesuffix(".per_class"), "per_class"
        return group, head, field
    if group == "privacy":
        mechanism, _, field = rest.partition(".")
        return group, mechanism, field
    if group in ("losses", "seconds", "bytes"):
        return group, rest
    return ()


def _class_columns(
    header: Sequence[str], paths: Sequence[_Path], where: str
) -> dict[tuple[str, str], int]:
    """Return the number of per-class columns of each accuracy; check their order."""
    found: dict[tuple[str, str], int] = {}
    for column, path in zip(header, paths, strict=True):
        if path and path[0] in ACCURACIES and path[2] == "per_class":
            field, head, _ = path
            number = found.get((field, head), 0)
            if not column.endswith(f".{number}"):
                raise ForeignFileError(
                    f"{where}: columns of {field}.{shown(head)[:200]}.per_class "
                    "must be numbered from 0"
                )
            found[field, head] = number + 1
    return found


def _value(cell: str, column: str, where: str) -> float | None:
    if not cell:
        return None
    if _NUMBER.fullmatch(cell) is None:
        raise ForeignFileError(
            f"{where}: {shown(column)[:200]} = {short(cell)}, but it must be a number"
        )
    return int(cell) if cell.removeprefix("-").isdigit() else float(cell)


def _is_empty(accuracy: Mapping[str, Any]) -> bool:
    columns = (value for key, value in accuracy.items() if key != "per_class")
    return all(value is None for value in (*columns, *accuracy["per_class"]))


def _shared(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the entries that are the same in all tables."""
    first, *rest = tables
    return {
        key: value
        for key, value in first.items()
        if all(key in table and _same(table[key], value) for table in rest)
    }


def _same(one: object, other: object) -> bool:
    # Compared as JSON, because in Python 1, 1.0 and True are equal.
    return json.dumps(one) == json.dumps(other)


def _without(table: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in keys}
