"""The lines of the rounds and the table at a run's end."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clip2fl_common.metrics import ShotGroups
from server_app import console
from server_app.console import Progress, final_table, mean_rows
from tests.clip2fl_cli.made_up import write_run
from tests.server_app.test_metrics_line import GOOD, POOR

GROUPS = ShotGroups("count", many=(0,), medium=(1,), few=(2,))
NAMES = ("circle", "square", "star")


def test_progress_tells_accuracy_loss_and_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first round starts the workers, so it does not enter the remaining time."""
    now = iter([100.0, 140.0, 150.0, 170.0, 0.0, 1.0, 185.0])
    monkeypatch.setattr(
        console, "time", SimpleNamespace(perf_counter=lambda: next(now))
    )
    progress = Progress(rounds=300)
    assert progress.line(1, {"fedavg": POOR}, 2.34567, clients=1) == (
        "round 1/300: 1 client; model's own head balanced 5.0 %, few-shot 100.0 %; "
        "loss 2.346; 40.0 s, "
        "3:19:20 left"  # 299 times 40 s
    )
    few = dataclasses.replace(POOR, few=None)
    assert progress.line(2, {"retrained": GOOD, "fedavg": few}, 0.5, clients=5) == (
        "round 2/300: 5 clients; re-trained head balanced 61.2 %, few-shot 33.3 %; "
        "model's own head balanced 5.0 %, few-shot -; loss 0.500; 10.0 s, "
        "0:49:40 left"  # 298 times 10 s
    )
    assert progress.line(3, {"fedavg": POOR}, 0.5, clients=5).endswith(
        "20.0 s, 1:14:15 left"  # 297 times the mean of 10 s and 20 s
    )
    tuned = Progress(1).line(
        1, {"fedavg": POOR}, 0.5, clients=2, tuning={"fedavg": GOOD}
    )
    assert "for tuning: model's own head balanced 61.2 %, few-shot 33.3 %; loss" in (
        tuned
    )
    # Whoever chooses settings does not see accuracy on the other images.
    assert "5.0 %" not in tuned and "100.0 %" not in tuned
    kept = progress.line(300, {"fedavg": POOR}, None, clients=0)
    assert kept.endswith("; old model kept; 15.0 s, 0:00:00 left")


Heads = dict[str, tuple[float, float | None]]


def lines(*values: Heads) -> list[dict[str, Any]]:
    """Return lines of ``metrics.jsonl`` from each round's (balanced, few) by head."""
    return [
        {
            "accuracy": {
                head: {
                    "top1": balanced + 1,
                    "balanced": balanced,
                    "many": balanced + 2,
                    "medium": None,
                    "few": few,
                    "per_class": [balanced],
                }
                for head, (balanced, few) in heads.items()
            }
        }
        for heads in values
    ]


def test_table_has_the_means_of_the_last_five_rounds() -> None:
    """The classifier is trained from the third round on; one round has no accuracy."""
    both: list[Heads] = [
        {"retrained": (30.0 + n, 10.0), "fedavg": (20.0, n * 1.0)} for n in range(4)
    ]
    own: Heads = {"fedavg": (90.0, 0.0)}
    rows = mean_rows(lines(own, {"fedavg": (25.0, 4.0)}, *both[:2], {}, *both[2:]))
    assert rows == {
        "retrained": {
            "top1": 32.5,
            "balanced": 31.5,
            "many": 33.5,
            "medium": None,
            "few": 10.0,
        },
        "fedavg": {
            "top1": 22.0,
            "balanced": 21.0,
            "many": 23.0,
            "medium": None,
            "few": 2.0,
        },
    }
    table = final_table(
        {"clip2fl, re-trained head": rows["retrained"]}, GROUPS, NAMES, 7
    )
    assert table.splitlines() == [
        "Accuracy on the test images, %, mean of the last 5 rounds",
        "                             top-1  balanced      many    medium       few",
        "clip2fl, re-trained head      32.5      31.5      33.5         -      10.0",
        "Groups: more than 100 / 20 to 100 / fewer than 20 training images",
        "        (many circle; medium square; few star)",
    ]


def test_runs_without_an_accuracy_have_no_means() -> None:
    assert mean_rows(lines({}, {})) == {}
    (missing,) = mean_rows(
        lines({"fedavg": (1.0, None)}, {"fedavg": (3.0, 5.0)})
    ).values()
    assert missing["few"] is None
    assert missing["balanced"] == 2.0


def test_means_are_those_of_reports(tmp_path: Path) -> None:
    finished = write_run(tmp_path / "run", [1.0, 50.0, 60.0, 70.0, 62.0, 55.0])
    rows = mean_rows(finished.rounds)
    for column, mean in rows["fedavg"].items():
        assert mean == finished.last("fedavg", column) == 59.4


def test_table_names_the_rule_by_rank_and_shortens_long_groups() -> None:
    groups = ShotGroups("rank", many=(7,), medium=(5, 6), few=(0, 1, 2, 3, 4, 8, 9))
    names = [f"c{i}" for i in range(10)]
    first, *_, rule, members = final_table({}, groups, names, 1).splitlines()
    assert first == "Accuracy on the test images, %, after one round"
    assert [rule, members] == [
        "Groups: by frequency rank, 30/40/30 % of the classes",
        "        (many c7; medium c5, c6; few c0, c1, c2, c3, c4 and 2 more)",
    ]
