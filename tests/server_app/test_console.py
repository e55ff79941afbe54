"""The lines of the rounds and the table at a run's end."""

from types import SimpleNamespace

import pytest

from clip2fl_common.metrics import ShotGroups
from server_app import console
from server_app.console import Progress, final_table
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
    assert progress.line(1, {"fedavg": POOR}, 2.34567) == (
        "round 1/300: fedavg balanced 5.0 % (0/0/100); loss 2.346; 40.0 s, "
        "3:19:20 left"  # 299 times 40 s
    )
    assert progress.line(2, {"retrained": GOOD, "fedavg": POOR}, 0.5) == (
        "round 2/300: retrained balanced 61.2 % (90/-/33); "
        "fedavg balanced 5.0 % (0/0/100); loss 0.500; 10.0 s, "
        "0:49:40 left"  # 298 times 10 s
    )
    assert progress.line(3, {"fedavg": POOR}, 0.5).endswith(
        "20.0 s, 1:14:15 left"  # 297 times the mean of 10 s and 20 s
    )
    tuned = Progress(1).line(1, {"fedavg": POOR}, 0.5, tuning={"fedavg": GOOD})
    assert "balanced 5.0 % (0/0/100), for tuning 61.2 %; loss" in tuned
    kept = progress.line(300, {"fedavg": POOR}, None)
    assert kept.endswith("; old model kept; 15.0 s, 0:00:00 left")


def test_final_table() -> None:
    table = final_table(
        {"clip2fl, retrained head": GOOD, "teacher": POOR}, GROUPS, NAMES
    )
    assert table.splitlines() == [
        "Accuracy on the test images, %",
        "                            top-1  balanced      many    medium       few",
        "clip2fl, retrained head      66.7      61.2      90.0         -      33.3",
        "teacher                       5.0       5.0       0.0       0.0     100.0",
        "Groups: more than 100 / 20 to 100 / fewer than 20 training images",
        "        (many circle; medium square; few star)",
    ]


def test_table_names_the_rule_by_rank_and_shortens_long_groups() -> None:
    groups = ShotGroups("rank", many=(7,), medium=(5, 6), few=(0, 1, 2, 3, 4, 8, 9))
    names = [f"c{i}" for i in range(10)]
    last = final_table({"fedavg": POOR}, groups, names).splitlines()[-2:]
    assert last == [
        "Groups: by frequency rank, 30/40/30 % of the classes",
        "        (many c7; medium c5, c6; few c0, c1, c2, c3, c4 and 2 more)",
    ]
