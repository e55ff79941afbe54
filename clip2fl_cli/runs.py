"""Read the folder of a run."""

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from clip2fl_cli.artifacts import read_artifacts
from clip2fl_cli.run_schema import Facts, Round
from clip2fl_common.shown import shown
from server_app.console import COLUMNS as COLUMNS
from server_app.console import LAST_ROUNDS as LAST_ROUNDS
from server_app.foreign_files import (
    MEGABYTE,
    ForeignFileError,
    parse_json,
    read_json,
    read_text,
    refuse_unless_regular,
)
from server_app.run_folder import ARTIFACTS, CONFIG, METRICS, MODEL

# A run of 1,000 classes, 1,000 clients and 200 rounds has 0.1 and 10 megabytes.
MAX_FACTS_BYTES = 32 * MEGABYTE
MAX_METRICS_BYTES = 256 * MEGABYTE


class RunError(ValueError):
    """A folder is not as expected; says what was found and what to do."""


def by_frequency(counts: Sequence[int] | None, number: int) -> list[int]:
    """Return classes by decreasing number of images, or in listed order if unknown."""
    if counts is None:
        return list(range(number))
    return sorted(range(number), key=lambda c: -counts[c])


@dataclass(frozen=True)
class FinishedRun:
    """The results of a complete run.

    Attributes
    ----------
    folder : Path
        Folder of the run.
    facts : dict
        Content of ``config.json``.
    rounds : list of dict
        Lines of ``metrics.jsonl``.
    """

    folder: Path
    facts: dict[str, Any]
    rounds: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "FinishedRun":
        """Read a complete run's folder, which may be damaged or come from a stranger.

        Raises
        ------
        RunError
            If it is no run's folder, the run is not complete, or a file has not the
            form that a run writes; names the file and the field.
        """
        # Reading the file reports a path that exists but is no file.
        if not os.path.lexists(folder / CONFIG):
            raise RunError(
                f"{shown(folder)} is no run's folder: it has no {CONFIG}; give the "
                "folder that a run names in its last line"
            )
        if not os.path.lexists(folder / MODEL):
            raise RunError(
                f"{shown(folder)} holds a run that did not end: it has no {MODEL}"
            )
        try:
            refuse_unless_regular(folder / MODEL)
            facts = read_json(folder / CONFIG, Facts, MAX_FACTS_BYTES)
            return cls(folder, facts, _read_rounds(folder / METRICS, facts))
        except ForeignFileError as error:
            raise RunError(f"{error}; {DAMAGED}") from None

    @property
    def name(self) -> str:
        """Name of the run's folder, for readers."""
        return shown(os.path.basename(os.path.abspath(self.folder)))

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        config: dict[str, Any] = self.facts["config"]
        return config

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.config["seed"])

    @property
    def class_names(self) -> list[str]:
        """Names of the C classes."""
        names: list[str] = self.facts["class_names"]
        return names

    @property
    def train_counts(self) -> list[int] | None:
        """Training images of each class; None with sites, which do not report them."""
        return self.facts.get("train_images_per_class")

    @property
    def by_frequency(self) -> list[int]:
        """Classes from the most to the least frequent, if known."""
        return by_frequency(self.train_counts, len(self.class_names))

    @property
    def evaluated(self) -> list[dict[str, Any]]:
        """Rounds that have an accuracy; with sites, some rounds may have none."""
        return [line for line in self.rounds if line["accuracy"]]

    @property
    def heads(self) -> list[str]:
        """Names of the evaluated classifiers; the delivered one comes first."""
        return list(self.evaluated[-1]["accuracy"])

    def final(self, head: str) -> dict[str, Any]:
        """Return a classifier's accuracy in the last evaluated round."""
        accuracy: dict[str, Any] = self.evaluated[-1]["accuracy"][head]
        return accuracy

    @property
    def teacher(self) -> dict[str, Any] | None:
        """Name and zero-shot accuracy of the teacher, or None."""
        return self.facts.get("teacher")

    @cached_property
    def artifacts(self) -> dict[str, torch.Tensor]:
        """Tensors for the report; empty for a run of an earlier version.

        Raises
        ------
        RunError
            If the file has not the form that a run writes.
        """
        file = self.folder / ARTIFACTS
        if not os.path.lexists(file):
            return {}
        try:
            return read_artifacts(file, len(self.class_names))
        except ForeignFileError as error:
            raise RunError(f"{error}; {DAMAGED}") from None

    def last(self, head: str, column: str) -> float | None:
        """Return a column's mean over the last rounds; None if a value is missing."""
        values = [accuracy[column] for accuracy in self._last_accuracies(head)]
        return None if None in values else statistics.fmean(values)

    def per_class(self, head: str) -> list[float | None]:
        """Return the per-class accuracy's mean over the last rounds."""
        columns = zip(
            *(accuracy["per_class"] for accuracy in self._last_accuracies(head)),
            strict=True,
        )
        return [None if None in c else statistics.fmean(c) for c in columns]

    def _last_accuracies(self, head: str) -> list[Mapping[str, Any]]:
        # A classifier is missing in rounds before it was first trained.
        return [
            line["accuracy"][head]
            for line in self.evaluated[-LAST_ROUNDS:]
            if head in line["accuracy"]
        ]

    def phases(self) -> dict[str, float]:
        """Return the seconds of each phase, over all rounds."""
        totals: dict[str, float] = {}
        for line in self.rounds:
            for phase, seconds in line["seconds"].items():
                totals[phase] = totals.get(phase, 0.0) + seconds
        return totals

    def wall_seconds(self) -> float:
        """Return the sum of the phases, without the clients' overlapping seconds."""
        return sum(s for name, s in self.phases().items() if "clients-" not in name)


def is_complete(folder: Path) -> bool:
    """Return whether a run is complete: it writes the model last."""
    return (folder / MODEL).is_file()


def refuse_other_classes(runs: Sequence[FinishedRun]) -> None:
    """Raise if runs have different classes, since one table cannot show them.

    Raises
    ------
    RunError
        Names two runs that differ.
    """
    first = runs[0]
    for run in runs:
        if run.class_names != first.class_names:
            raise RunError(
                f"{shown(run.folder)} has other classes than {shown(first.folder)} "
                f"({len(run.class_names)} and {len(first.class_names)}): compare runs "
                "of the same data set"
            )


DAMAGED = "the run's folder is damaged or was not written by this program"


def _read_rounds(file: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of a complete run, one per round."""
    where = shown(file)
    lines = read_text(file, MAX_METRICS_BYTES).split("\n")
    if not lines[-1]:
        lines.pop()
    classes, expected = len(facts["class_names"]), facts["config"]["federation.rounds"]
    rounds = []
    for number, text in enumerate(lines, start=1):
        line = parse_json(text, Round, f"{where}: line {number}")
        if line["round"] != number:
            raise ForeignFileError(
                f"{where}: line {number} is of round {line['round']}, but lines must "
                "follow one another from round 1"
            )
        for head, accuracy in line["accuracy"].items():
            if len(accuracy["per_class"]) != classes:
                raise ForeignFileError(
                    f"{where}: line {number}: accuracy.{shown(head)}.per_class has "
                    f"{len(accuracy['per_class'])} entries, but {CONFIG} has "
                    f"{classes} class_names"
                )
        rounds.append(line)
    if len(rounds) != expected:
        raise ForeignFileError(
            f"{where} has {len(rounds)} rounds, but {CONFIG} says "
            f"federation.rounds = {expected}"
        )
    if not any(line["accuracy"] for line in rounds):
        raise ForeignFileError(
            f"{where}: no round has an accuracy, so there is nothing to report"
        )
    return rounds
