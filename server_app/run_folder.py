"""What a run leaves behind and what it says while it goes on."""

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import platformdirs
import torch
from filelock import FileLock, Timeout

from clip2fl_common.config import RunConfig
from clip2fl_common.metrics import AccuracyReport, ShotGroups
from server_app.checkpoints import METRICS, rounds_with_checkpoint
from server_app.delivery import save_tensors
from server_app.durable import write_whole

MODEL = "model.safetensors"
BEST_MODEL = "model-best.safetensors"
ARTIFACTS = "artifacts.safetensors"

# Federated features that a run keeps for its report, over all classes.
SHOWN_FEATURES = 2000


class RunInUseError(RuntimeError):
    """Another run works in the folder."""


class RunFolder:
    """A run's folder, which is this run's alone until `release`.

    It holds ``config.json``, ``metrics.jsonl``, ``checkpoints`` and, from the last
    round on, ``artifacts.safetensors``, which is what a report shows besides numbers.
    The delivered ``model.safetensors`` comes last, so that it marks a complete run.

    Parameters
    ----------
    config : RunConfig
        Decides the folder's place and name.
    run_id : int
        Flower's, which makes the name of a new run unique.

    Raises
    ------
    RunInUseError
        If another run works there.
    FileExistsError
        If a new run would overwrite another.
    FileNotFoundError
        If there is no run to resume.
    """

    def __init__(self, config: RunConfig, run_id: int) -> None:
        self.path = folder_of(config, run_id)
        if not config.run.resume:
            self.path.mkdir(parents=True, exist_ok=True)
        elif not self.path.is_dir():
            raise FileNotFoundError(
                f"run.resume = {config.run.resume!r} is no folder: give that of the "
                "run, which holds its config.json"
            )
        self._metrics = ""
        # The system drops the lock when the process ends, however it ends.
        self._lock = FileLock(self.path / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise RunInUseError(
                f"another run works in {self.path}: wait until it ends or stop it, or "
                "choose another run.name or run.dir"
            ) from None
        holds_run = bool(rounds_with_checkpoint(self.path)) or any(
            (self.path / name).exists() for name in (METRICS, MODEL)
        )
        if holds_run and not config.run.resume:
            self.release()
            raise FileExistsError(
                f"{self.path} already holds a run; go on with it by run.resume, choose "
                "another run.name or run.dir, or remove that folder"
            )

    def release(self) -> None:
        """Leave the folder to others."""
        self._lock.release()

    def write_config(self, config: RunConfig, facts: Mapping[str, Any]) -> None:
        """Write the resolved configuration and what the run found."""
        content = {"config": config.to_flat(), **facts}
        write_whole(self.path / "config.json", json.dumps(content, indent=2) + "\n")

    @property
    def metrics(self) -> str:
        """Content of ``metrics.jsonl``."""
        return self._metrics

    def begin_metrics(self, content: str) -> None:
        """Let ``metrics.jsonl`` be this: nothing, or what a checkpoint knows."""
        write_whole(self.path / METRICS, content)
        self._metrics = content

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``, on disk when this returns."""
        text = json.dumps(line, allow_nan=False) + "\n"
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._metrics += text

    def write_artifacts(
        self,
        method: Mapping[str, torch.Tensor],
        confusion: Mapping[str, npt.NDArray[np.int64]],
        held: npt.NDArray[np.int64] | None,
    ) -> None:
        """Write ``artifacts.safetensors``.

        Parameters
        ----------
        method : mapping of str to Tensor
            The method's own. Of ``features`` [C, m, d] each class keeps so many that
            there are `SHOWN_FEATURES` at most, in half precision: enough to be drawn.
        confusion : mapping of str to ndarray of int64, shape [C, C]
            Test images by true and predicted class, for each head.
        held : ndarray of int64, shape [K, C], or None
            Training images by client and class, where the server knows them.
        """
        tensors = {
            **({} if held is None else {"clients_by_class": torch.from_numpy(held)}),
            **{f"confusion.{n}": torch.from_numpy(c) for n, c in confusion.items()},
            **method,
        }
        if "features" in tensors:
            features = tensors["features"]
            shown = max(1, SHOWN_FEATURES // len(features))
            tensors["features"] = features[:, :shown].bfloat16()
        save_tensors(self.path / ARTIFACTS, tensors)


def folder_of(config: RunConfig, run_id: int) -> Path:
    """Return where a run leaves its results; Flower's ``run_id`` may be in its name."""
    if config.run.resume:
        return Path(config.run.resume).expanduser()
    parent = (
        Path(config.run.dir).expanduser()
        if config.run.dir
        else Path(platformdirs.user_data_dir("clip2fl")) / "runs"
    )
    return parent / (
        config.run.name
        or f"{config.method}-{config.dataset.name}-seed{config.seed}-{run_id}"
    )


def accuracy_fields(report: AccuracyReport) -> dict[str, Any]:
    """Return an accuracy report as JSON fields, percent to four decimals."""

    def rounded(value: Any) -> Any:
        if isinstance(value, tuple):
            return [rounded(entry) for entry in value]
        return None if value is None else round(value, 4)

    return {name: rounded(v) for name, v in dataclasses.asdict(report).items()}


def accuracy_from_fields(fields: Mapping[str, Any]) -> AccuracyReport:
    """Return the accuracy report that `accuracy_fields` wrote, to four decimals."""
    return AccuracyReport(**{**fields, "per_class": tuple(fields["per_class"])})


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
        self,
        server_round: int,
        reports: Mapping[str, AccuracyReport],
        loss: float | None,
        *,
        participation: str = "",
        went_back_to: int | None = None,
        medians: Mapping[str, AccuracyReport] | None = None,
    ) -> str:
        """Return the line of a round that has just ended.

        Parameters
        ----------
        server_round : int
            The round.
        reports : mapping of str to AccuracyReport
            Accuracy by head.
        loss : float or None
            The clients'; without one no model came out of the round.
        participation : str
            Which share of the sites and their images took part, if there are sites.
        went_back_to : int or None
            Round whose model took the place of a bad one.
        medians : mapping of str to AccuracyReport or None
            What the median site says of each head, if there are sites.

        Returns
        -------
        str
        """
        now = time.perf_counter()
        self._durations.append(now - self._last)
        self._last = now
        # The first round starts the workers and fills the caches.
        typical = self._durations[1:] or self._durations
        left = (self._rounds - server_round) * sum(typical) / len(typical)
        accuracy = "; ".join(
            f"{name} balanced {report.balanced:.1f} % ({_groups(report)})"
            + (f", median site {medians[name].balanced:.1f} %" if medians else "")
            for name, report in reports.items()
        )
        trained = "old model kept" if loss is None else f"loss {loss:.3f}"
        if went_back_to is not None:
            trained = f"went back to the model of round {went_back_to}"
        accuracy = accuracy or "no site has evaluated"
        who = f"{participation}; " if participation else ""
        return (
            f"round {server_round}/{self._rounds}: {accuracy}; {trained}; {who}"
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
