"""The lines that a run prints after each round, and the table at its end."""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

from clip2fl_common.metrics import AccuracyReport, ShotGroups


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
        participation : str
            Share of the sites and of their images that took part; empty without sites.
        went_back_to : int or None
            Round whose model replaced a bad one.
        medians : mapping of str to AccuracyReport or None
            Accuracy of each head at the median site; None without sites.
        tuning : mapping of str to AccuracyReport or None
            Accuracy of each head on the test images for tuning; None without any.

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
            + (f", for tuning {tuning[name].balanced:.1f} %" if tuning else "")
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
