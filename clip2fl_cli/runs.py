"""Read the folder of a run."""

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from clip2fl_cli.artifacts import read_artifacts
from clip2fl_cli.run_schema import (
    MAX_FACTS_BYTES,
    MAX_METRICS_BYTES,
    Facts,
    Images,
    Round,
)
from clip2fl_common.shown import shown
from server_app.console import COLUMNS as COLUMNS
from server_app.console import LAST_ROUNDS as LAST_ROUNDS
from server_app.foreign_files import (
    ForeignFileError,
    parse_json,
    read_json,
    read_text,
    refuse_unless_regular,
)
from server_app.run_folder import ARTIFACTS, CONFIG, METRICS, MODEL

PARTS = (Images.TUNING, Images.HELD_OUT)
# Fields of a round's line, each with the accuracy of its classifiers.
ACCURACIES = ("accuracy", *(f"accuracy_{images.part}" for images in PARTS))


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
    images : Images
        The test images of ``accuracy`` in these lines, and of the teacher's accuracy
        and ``test_images`` in ``facts``.
    whole : FinishedRun or None
        The same run on all test images, if ``images`` are a part of them.
    """

    folder: Path
    facts: dict[str, Any]
    rounds: list[dict[str, Any]]
    images: Images = Images.ALL
    whole: "FinishedRun | None" = None

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

    def on(self, images: Images) -> "FinishedRun":
        """Return this run with accuracies on the given test images.

        Parameters
        ----------
        images : Images
            A part only for a run with a `tuning_share`; `chosen_images` checks that.

        Returns
        -------
        FinishedRun
        """
        whole = self.whole or self
        if images is Images.ALL:
            return whole
        field = f"accuracy_{images.part}"
        facts = {**whole.facts, "test_images": whole.part_size(images)}
        if whole.teacher:
            # Without an accuracy on these images, the teacher has no row in tables.
            own = whole.teacher.get(f"zero_shot_{images.part}")
            facts["teacher"] = {**whole.teacher, "zero_shot": own}
        rounds = [{**line, "accuracy": line.get(field, {})} for line in whole.rounds]
        return replace(whole, facts=facts, rounds=rounds, images=images, whole=whole)

    def part_size(self, images: Images) -> int:
        """Return the number of images in a part of the test images."""
        counted = self.facts.get(f"test_images_{images.part}")
        if counted is not None:
            return int(counted)
        # The first runs with a share did not count them; equal classes give the same.
        every = int(self.facts["test_images"])
        tuning = round(self.tuning_share * every)
        return tuning if images is Images.TUNING else every - tuning

    @property
    def tested(self) -> dict[str, int]:
        """Numbers of the test images behind the accuracies, by names for readers."""
        run = self.whole or self
        every = int(run.facts["test_images"])
        # 0 stands for all.
        drawn = int(run.config["evaluation.max-images"]) or every
        found = {
            "test images": every,
            "test images in rounds before the last": min(drawn, every),
        }
        if self.images is not Images.ALL:
            found[f"{self.images} test images"] = run.part_size(self.images)
        return found

    @property
    def tuning_share(self) -> float:
        """Share of the test images on which settings are chosen; 0: none."""
        return float(self.config.get("evaluation.tuning-share", 0.0))

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

    @property
    def last_round(self) -> str:
        """Name of the last evaluated round, for readers."""
        if self.rounds[-1]["accuracy"]:
            return "last round"
        return f"round {self.evaluated[-1]['round']}, the last that was evaluated"

    def final(self, head: str) -> dict[str, Any]:
        """Return a classifier's accuracy in the last evaluated round."""
        accuracy: dict[str, Any] = self.evaluated[-1]["accuracy"][head]
        return accuracy

    @property
    def shared_training(self) -> bool:
        """Whether clients' training may come from another run, so takes no time."""
        return bool(self.facts.get("shared_training"))

    @property
    def all_code(self) -> str:
        """Fingerprint of the code of client and server; early versions did not tell."""
        return self.facts.get("all_code") or "unknown"

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

    def clock_seconds(self) -> float | None:
        """Return the run's length by the clock, without the time between resumptions.

        Returns
        -------
        float or None
            None for a run with simulated clients, which does not record it.
        """
        clocks = [clock for line in self.rounds if (clock := line.get("clock"))]
        if len(clocks) < len(self.rounds):
            return None
        return sum(float(clock["seconds"]) for clock in clocks)

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


def refuse_other_tests(runs: Sequence[FinishedRun]) -> None:
    """Raise if runs were judged on other classes, groups of classes or test images.

    The images are not known, but their numbers are: of all test images, of the part
    that is shown, and of a round before the last.

    Parameters
    ----------
    runs : sequence of FinishedRun
        At least one, all on the same part of their test images.

    Raises
    ------
    RunError
        Names two runs that differ.
    """
    refuse_other_classes(runs)
    first = runs[0]
    for run in runs:
        if run.facts["shot_groups"] != first.facts["shot_groups"]:
            raise RunError(
                f"{shown(run.folder)} has other many-, medium- and few-shot classes "
                f"than {shown(first.folder)}: compare runs of the same long tail"
            )
        there = first.tested
        for what, number in run.tested.items():
            if number != there.get(what):
                raise RunError(
                    f"{shown(run.folder)} has {number} {what}, but "
                    f"{shown(first.folder)} has {there.get(what)}: compare runs with "
                    "the same test images and the same evaluation.max-images"
                )


def chosen_images(runs: Sequence[FinishedRun], wanted: Images | None = None) -> Images:
    """Return the test images on which a page shows runs.

    Settings are chosen on the images for tuning, so a page shows the held-out images
    if there are any. If only some runs have held-out images, it does not fall back to
    all images, since these include those on which settings were chosen.

    Parameters
    ----------
    runs : sequence of FinishedRun
        All runs of the page, at least one.
    wanted : Images or None
        The user's choice; None: the held-out images, or all if none are held out.

    Returns
    -------
    Images

    Raises
    ------
    RunError
        If the runs have no such images, or different ones.
    """
    if wanted is Images.ALL:
        return wanted
    first, *others = runs
    for run in others:
        if run.tuning_share != first.tuning_share:
            raise RunError(
                f"{shown(run.folder)} has evaluation.tuning-share = "
                f"{run.tuning_share}, but {shown(first.folder)} has "
                f"{first.tuning_share}, so other test images are held out: make runs "
                "with the same share, or show all test images with --images all"
            )
    if first.tuning_share > 0:
        return wanted or Images.HELD_OUT
    if wanted is not None:
        raise RunError(
            f"--images {wanted}: {shown(first.folder)} has evaluation.tuning-share = "
            "0, so its test images are not divided; only --images all is possible"
        )
    return Images.ALL


def refuse_missing_parts(
    line: Mapping[str, Any], config: Mapping[str, Any], where: str
) -> None:
    """Raise if a run with a tuning share lacks the accuracy on a part in a round.

    Parameters
    ----------
    line : mapping
        A line of ``metrics.jsonl``.
    config : mapping
        The run's configuration.
    where : str
        Name of the line, for errors.

    Raises
    ------
    ForeignFileError
        Names the field.
    """
    if config.get("evaluation.tuning-share", 0.0) == 0:
        return
    heads = list(line["accuracy"])
    for field in ACCURACIES[1:]:
        if list(line.get(field, {})) != heads:
            raise ForeignFileError(
                f"{where}: {field} must have the classifiers of accuracy, since the "
                "run has an evaluation.tuning-share"
            )


DAMAGED = "the run's folder is damaged or was not written by this program"


def accuracies(line: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield each accuracy of a round with its field and classifier."""
    for field in ACCURACIES:
        for head, accuracy in line.get(field, {}).items():
            yield field, head, accuracy


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
        for field, head, accuracy in accuracies(line):
            if len(accuracy["per_class"]) != classes:
                raise ForeignFileError(
                    f"{where}: line {number}: {field}.{shown(head)}.per_class has "
                    f"{len(accuracy['per_class'])} entries, but {CONFIG} has "
                    f"{classes} class_names"
                )
        refuse_missing_parts(line, facts["config"], f"{where}: line {number}")
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
