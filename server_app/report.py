"""What a run leaves behind and what it says while it goes on."""

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import platformdirs

from clip2fl_common.config import RunConfig
from clip2fl_common.metrics import AccuracyReport, ShotGroups
from server_app.checkpoint import write_atomically


class RunFolder:
    """A run's folder: ``config.json``, ``metrics.jsonl``, later ``model.safetensors``.

    Parameters
    ----------
    config : RunConfig
        Decides the folder's place and name.
    run_id : int
        Flower's, which makes the name unique.

    Raises
    ------
    FileExistsError
        If the folder already holds a run's metrics: no run overwrites another.
    """

    def __init__(self, config: RunConfig, run_id: int) -> None:
        parent = (
            Path(config.run.dir).expanduser()
            if config.run.dir
            else Path(platformdirs.user_data_dir("clip2fl")) / "runs"
        )
        name = config.run.name or (
            f"{config.method}-{config.dataset.name}-seed{config.seed}-{run_id}"
        )
        self.path = parent / name
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._metrics: TextIO = (self.path / "metrics.jsonl").open(
                "x", encoding="utf-8"
            )
        except FileExistsError:
            raise FileExistsError(
                f"{self.path} already holds a run; choose another run.name or run.dir, "
                "or remove that folder"
            ) from None

    def write_config(self, config: RunConfig, facts: Mapping[str, Any]) -> None:
        """Write the resolved configuration and what the run found."""
        content = {"config": config.to_flat(), **facts}
        write_atomically(
            self.path / "config.json", json.dumps(content, indent=2) + "\n"
        )

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``, on disk when this returns."""
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        os.fsync(self._metrics.fileno())


def accuracy_fields(report: AccuracyReport) -> dict[str, Any]:
    """Return an accuracy report as JSON fields, percent to four decimals."""

    def rounded(value: Any) -> Any:
        if isinstance(value, tuple):
            return [rounded(entry) for entry in value]
        return None if value is None else round(value, 4)

    return {name: rounded(v) for name, v in dataclasses.asdict(report).items()}


class Progress:
    """One line a round, with the time left.

    Parameters
    ----------
    rounds : int
        Number of rounds of the run.
    """

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._started = self._last = time.perf_counter()
        self._durations: list[float] = []

    def line(
        self, server_round: int, reports: Mapping[str, AccuracyReport], loss: float
    ) -> str:
        """Return the line of a round that has just ended."""
        now = time.perf_counter()
        self._durations.append(now - self._last)
        self._last = now
        # The first round starts the workers and fills the caches.
        typical = self._durations[1:] or self._durations
        left = (self._rounds - server_round) * sum(typical) / len(typical)
        accuracy = "; ".join(
            f"{name} balanced {report.balanced:.1f} % ({_groups(report)})"
            for name, report in reports.items()
        )
        accuracy = accuracy or "no site has evaluated"
        return (
            f"round {server_round}/{self._rounds}: {accuracy}; loss {loss:.3f}; "
            f"{self._durations[-1]:.1f} s, "
            f"{timedelta(seconds=round(left))} left"
        )


def _groups(report: AccuracyReport) -> str:
    values = (report.many, report.medium, report.few)
    return "/".join("-" if value is None else f"{value:.0f}" for value in values)


def final_table(
    rows: Mapping[str, AccuracyReport], groups: ShotGroups, class_names: Sequence[str]
) -> str:
    """Return the table printed at the end of a run.

    Parameters
    ----------
    rows : mapping of str to AccuracyReport
        Accuracy of each classifier, and the teacher's.
    groups : ShotGroups
        Which classes are many, medium and few-shot, and by which rule.
    class_names : sequence of str
        Names of the classes.

    Returns
    -------
    str
    """
    columns = ("top1", "balanced", "many", "medium", "few")
    titles = ("top-1", "balanced", "many", "medium", "few")
    width = max((len(name) for name in rows), default=0)
    where = "sites' validation" if groups.rule == "listed" else "test"
    lines = [
        f"Accuracy on the {where} images, %",
        " " * width + "".join(f"{title:>10}" for title in titles),
    ]
    for name, report in rows.items():
        cells = [getattr(report, column) for column in columns]
        lines.append(
            f"{name:<{width}}"
            + "".join("         -" if c is None else f"{c:>10.1f}" for c in cells)
        )
    rule = {
        "count": "more than 100 / 20 to 100 / fewer than 20 training images",
        "rank": "by frequency rank, 30/40/30 % of the classes",
        "listed": "in the order of dataset.class-names, 30/40/30 % of the classes",
    }[groups.rule]
    named = "; ".join(
        f"{title} {', '.join(class_names[c] for c in classes[:5])}"
        + (f" and {len(classes) - 5} more" if len(classes) > 5 else "")
        for title, classes in (
            ("many", groups.many),
            ("medium", groups.medium),
            ("few", groups.few),
        )
    )
    return "\n".join([*lines, f"Groups: {rule}", f"        ({named})"])
