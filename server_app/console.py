"""The lines that a run prints after each round, and the table at its end.

`clip2fl_cli.progress` finds the lines of the rounds in Flower's log by their beginning.
"""

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from clip2fl_common.metrics import (
    DISCRIMINANT_HEAD,
    FEDAVG_HEAD,
    RETRAINED_HEAD,
    AccuracyReport,
    ShotGroups,
)
from server_app.time_left import seconds_left

LAST_ROUNDS = 5
"""Accuracy varies by some points from round to round, so the table has means."""
COLUMNS = ("top1", "balanced", "many", "medium", "few")

HEAD_TITLES = {
    RETRAINED_HEAD: "re-trained head",
    DISCRIMINANT_HEAD: "discriminant",
    FEDAVG_HEAD: "model's own head",
}
"""What people read for the heads in ``metrics.jsonl``."""


class Progress:
    """One line for each round, with the remaining time.

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
        clients: int,
        participation: str = "",
        went_back_to: int | None = None,
        medians: Mapping[str, AccuracyReport] | None = None,
        tuning: Mapping[str, AccuracyReport] | None = None,
    ) -> str:
        """Return the line of the round that has just ended.

        Parameters
        ----------
        server_round : int
            The round.
        reports : mapping of str to AccuracyReport
            Accuracy by head.
        loss : float or None
            Mean training loss of the clients; None if the round produced no model.
        clients : int
            Number of clients whose replies were used.
        participation : str
            Share of the sites and of their images that took part, shown instead of the
            number; empty without sites.
        went_back_to : int or None
            Round whose model replaced a bad one.
        medians : mapping of str to AccuracyReport or None
            Accuracy of each head at the median site; None without sites.
        tuning : mapping of str to AccuracyReport or None
            Accuracy of each head on the test images for tuning, shown instead of the
            accuracy on all: whoever chooses settings must not see the others. None
            without any.

        Returns
        -------
        str
        """
        now = time.perf_counter()
        self._durations.append(now - self._last)
        self._last = now
        left = seconds_left(self._durations, self._rounds - server_round)
        accuracy = "; ".join(
            f"{HEAD_TITLES[name]} balanced {report.balanced:.1f} %, few-shot "
            + ("-" if report.few is None else f"{report.few:.1f} %")
            + (f", median site {medians[name].balanced:.1f} %" if medians else "")
            for name, report in (tuning or reports).items()
        )
        if tuning:
            accuracy = f"for tuning: {accuracy}"
        trained = "old model kept" if loss is None else f"loss {loss:.3f}"
        if went_back_to is not None:
            trained = f"went back to the model of round {went_back_to}"
        accuracy = accuracy or "no site has evaluated"
        who = participation or f"{clients} client{'' if clients == 1 else 's'}"
        return (
            f"round {server_round}/{self._rounds}: {who}; {accuracy}; {trained}; "
            f"{self._durations[-1]:.1f} s, "
            f"{timedelta(seconds=round(left))} left"
        )


FOR_TUNING = ", for tuning"
"""End of a row's name in the table, if the accuracy is on the images for tuning."""
_ROW = re.compile(rf"(.*\S)(?:\s+(?:\d+\.\d|-)){{{len(COLUMNS)}}}")


def shows_held_out(line: str) -> bool:
    """Return whether a line is a row of `final_table` with images that are held out.

    Parameters
    ----------
    line : str
        A line of the log of a run with a tuning share.
    """
    row = _ROW.fullmatch(line)
    return row is not None and not row[1].endswith(FOR_TUNING)


Row = Mapping[str, float | None]
"""A row of the table: percent by the names of `COLUMNS`, None without a value."""


def mean_rows(
    lines: Sequence[Mapping[str, Any]], field: str = "accuracy"
) -> dict[str, Row]:
    """Return each head's mean accuracy over the last rounds.

    Parameters
    ----------
    lines : sequence of mapping
        The lines of ``metrics.jsonl``. Rounds without any accuracy are passed over, and
        `LAST_ROUNDS` of the others count.
    field : str
        The field of a line: accuracy, accuracy_held_out or accuracy_tuning, which are
        on all test images or on a part of them.

    Returns
    -------
    dict of str to Row
        By head; a column without a value in one of the rounds has none.
    """
    last = [line[field] for line in lines if line.get(field)][-LAST_ROUNDS:]

    def mean(head: str, column: str) -> float | None:
        # A classifier is missing in rounds before it was first trained.
        values = [heads[head][column] for heads in last if head in heads]
        return None if None in values else statistics.fmean(values)

    return {
        head: {column: mean(head, column) for column in COLUMNS}
        for head in (last[-1] if last else {})
    }


def final_table(
    rows: Mapping[str, Row],
    groups: ShotGroups,
    class_names: Sequence[str],
    evaluated: int,
) -> str:
    """Return the table printed at the end of a run.

    Parameters
    ----------
    rows : mapping of str to Row
        Accuracy of each classifier, and the teacher's.
    groups : ShotGroups
        Which classes are many, medium and few-shot, and by which rule.
    class_names : sequence of str
        Names of the classes.
    evaluated : int
        Number of rounds with an accuracy.

    Returns
    -------
    str
    """
    titles = ("top-1", "balanced", "many", "medium", "few")
    width = max((len(name) for name in rows), default=0)
    where = "sites' validation" if groups.rule == "listed" else "test"
    last = min(LAST_ROUNDS, evaluated)
    mean = f"mean of the last {last} rounds" if last > 1 else "after one round"
    lines = [
        f"Accuracy on the {where} images, %, {mean}",
        " " * width + "".join(f"{title:>10}" for title in titles),
    ]
    for name, row in rows.items():
        cells = [row[column] for column in COLUMNS]
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
