"""A line of ``metrics.jsonl``: all numbers of one round, as JSON fields."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clip2fl_common.metrics import AccuracyReport
from server_app.evaluation import Evaluator
from strategy.round_record import RoundRecord


def metrics_line(
    server_round: int,
    record: RoundRecord,
    reports: Mapping[str, AccuracyReport],
    medians: Mapping[str, AccuracyReport],
    evaluator: Evaluator,
    seconds: Mapping[str, float],
    final: bool,
) -> dict[str, Any]:
    """Return a round's numbers.

    Parameters
    ----------
    server_round : int
        The round.
    record : RoundRecord
        The strategy's record of the round.
    reports : mapping of str to AccuracyReport
        Accuracy by head.
    medians : mapping of str to AccuracyReport
        Accuracy of each head at the median site; empty without sites.
    evaluator : Evaluator
        The evaluator of this round, which counted the unreadable test images.
    seconds : mapping of str to float
        Duration of each phase.
    final : bool
        Whether the round is the last one.

    Returns
    -------
    dict
        Fields for JSON.
    """
    line = {
        "round": server_round,
        "clients": record.clients,
        "dropped_replies": record.dropped,
        "kept_model": record.kept_model,
        "went_back_to": record.went_back_to,
        "left_out": record.left_out,
        "shortened": {
            "updates": record.shortened_updates,
            "class_gradients": record.shortened_gradients,
        },
        "accuracy": {name: accuracy_fields(report) for name, report in reports.items()},
        "test_images": len(evaluator.indices(final)),
        "losses": record.losses,
        "privacy": record.privacy,
        "unreadable_images": {
            "train": record.unreadable,
            "test": evaluator.unreadable,
        },
        "bytes": {
            "down": record.bytes_down,
            "up": sum(record.upload_bytes),
            "per_client": record.upload_bytes,
            # All statistics; the name is from when class gradients were the only ones.
            "class_gradients": record.gradient_bytes,
        },
        "seconds": {name: round(s, 4) for name, s in seconds.items()},
    }
    for part, of_heads in evaluator.parts.items():
        line[f"accuracy_{part}"] = {
            name: accuracy_fields(report) for name, report in of_heads.items()
        }
    if record.lost:
        line["lost"] = record.lost
    if medians:
        line["accuracy_median_site"] = {
            name: accuracy_fields(report) for name, report in medians.items()
        }
    return line


def accuracy_fields(report: AccuracyReport) -> dict[str, Any]:
    """Return an accuracy report as JSON fields, percent to four decimals."""

    def rounded(value: Any) -> Any:
        if isinstance(value, tuple):
            return [rounded(entry) for entry in value]
        return None if value is None else round(value, 4)

    return {name: rounded(v) for name, v in dataclasses.asdict(report).items()}
