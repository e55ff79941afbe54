"""Accuracies as fields of a line of ``metrics.jsonl``."""

import json

from clip2fl_common.metrics import AccuracyReport
from server_app.metrics_line import accuracy_fields

GOOD = AccuracyReport(
    top1=200 / 3,
    balanced=61.25,
    many=90.0,
    medium=None,
    few=33.3333333,
    per_class=(100.0, None, 100 / 7),
)
POOR = AccuracyReport(5.0, 4.96, 0.0, 0.04, 100.0, (0.0, 1.0, 2.0))


def test_accuracies_are_rounded_and_holes_kept() -> None:
    fields = accuracy_fields(GOOD)
    assert fields == {
        "top1": 66.6667,
        "balanced": 61.25,
        "many": 90.0,
        "medium": None,
        "few": 33.3333,
        "per_class": [100.0, None, 14.2857],
    }
    assert json.loads(json.dumps(fields)) == fields
