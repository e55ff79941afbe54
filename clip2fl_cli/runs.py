"""A run's folder, read."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# Rounds vary by some points; the mean of the last ones is compared.
LAST_ROUNDS = 5
COLUMNS = ("top1", "balanced", "many", "medium", "few")
MODEL_FILE = "model.safetensors"


class RunError(ValueError):
    """A folder is not what it should be; says what was found and what to do."""


def by_frequency(counts: Sequence[int] | None, number: int) -> list[int]:
    """Return classes by falling number of images, or in their own order."""
    if counts is None:
        return list(range(number))
    return sorted(range(number), key=lambda c: -counts[c])


@dataclass(frozen=True)
class FinishedRun:
    """What a run left behind.

    Attributes
    ----------
    folder : Path
        Where it lies.
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
        """Read a complete run's folder.

        Raises
        ------
        RunError
            If it is no run's folder, or the run has not come to its end.
        """
        if not (folder / "config.json").is_file():
            raise RunError(
                f"{folder} is no run's folder: it has no config.json; give the folder "
                "that a run names in its last line"
            )
        if not is_complete(folder):
            raise RunError(
                f"{folder} holds a run that did not end: it has no {MODEL_FILE}"
            )
        facts = json.loads((folder / "config.json").read_text("utf-8"))
        lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
        return cls(folder, facts, [json.loads(line) for line in lines])

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        config: dict[str, Any] = self.facts["config"]
        return config

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.config["seed"])

    @property
    def class_names(self) -> list[str]:
        """Names of the C classes."""
        names: list[str] = self.facts["class_names"]
        return names

    @property
    def train_counts(self) -> list[int] | None:
        """Training images of each class; None where sites keep that to themselves."""
        return self.facts.get("train_images_per_class")

    @property
    def by_frequency(self) -> list[int]:
        """Classes from the most to the least frequent, as far as is known."""
        return by_frequency(self.train_counts, len(self.class_names))

    @property
    def heads(self) -> list[str]:
        """Names of the classifiers that were evaluated; the delivered one first."""
        return list(self.rounds[-1]["accuracy"])

    @property
    def teacher(self) -> dict[str, Any] | None:
        """Name and zero-shot accuracy of the teacher, where there was one."""
        return self.facts.get("teacher")

    @cached_property
    def artifacts(self) -> dict[str, torch.Tensor]:
        """Tensors kept for the report; none in a run of an earlier version."""
        file = self.folder / "artifacts.safetensors"
        return load_file(file) if file.is_file() else {}

    def last(self, head: str, column: str) -> float | None:
        """Return a column's mean over the last rounds, None where it has a hole."""
        values = [line["accuracy"][head][column] for line in self.rounds[-LAST_ROUNDS:]]
        return None if None in values else statistics.fmean(values)

    def per_class(self, head: str) -> list[float | None]:
        """Return the per-class accuracy's mean over the last rounds."""
        columns = zip(
            *(r["accuracy"][head]["per_class"] for r in self.rounds[-LAST_ROUNDS:]),
            strict=True,
        )
        return [None if None in c else statistics.fmean(c) for c in columns]

    def phases(self) -> dict[str, float]:
        """Return the seconds of each phase, over all rounds."""
        totals: dict[str, float] = {}
        for line in self.rounds:
            for phase, seconds in line["seconds"].items():
                totals[phase] = totals.get(phase, 0.0) + seconds
        return totals

    def wall_seconds(self) -> float:
        """Add up the phases; clients' own seconds overlap and are left out."""
        return sum(s for name, s in self.phases().items() if "clients-" not in name)


def is_complete(folder: Path) -> bool:
    """Tell whether a run came to its end: the model is what it writes last."""
    return (folder / MODEL_FILE).is_file()
