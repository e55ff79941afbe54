"""What a round's line in ``metrics.jsonl`` says of each site, and their summed matrix.

Runs with simulated clients have none of this.
"""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from clip2fl_common.messages import Evaluation
from clip2fl_common.metrics import ShotGroups, recall_report
from server_app.metrics_line import accuracy_fields
from strategy.round_record import RoundRecord


def site_fields(
    record: RoundRecord, groups: ShotGroups, clock: float
) -> dict[str, Any]:
    """Return the fields of a round with sites.

    Parameters
    ----------
    record : RoundRecord
        The strategy's record of the round.
    groups : ShotGroups
        Shot groups of the classes.
    clock : float
        Seconds from the end of the round before, or from the run's start, to now. They
        include the time in which the server waits for sites.

    Returns
    -------
    dict
        ``sites`` by name, in the order of the names; ``summed_evaluation`` with the
        number of sites, of images and of sites that evaluate each class in a secure
        sum, else None; ``unused_replies`` with
        site, kind of request and reason; ``clock`` with the time of the round's end and
        its seconds; ``unreadable_images`` with the number in the sites' validation
        images.
    """
    names = sorted({*record.trained, *record.evaluations})
    unreadable = sum(
        evaluation.unreadable for evaluation in record.evaluations.values()
    ) + (0 if record.summed is None else record.summed.unreadable)
    return {
        "sites": {name: _site(name, record, groups) for name in names},
        "unused_replies": [
            {"site": reply.client, "request": reply.kind, "reason": reply.reason}
            for reply in record.unused
        ],
        "unreadable_images": {
            "train": record.unreadable,
            "test": unreadable,
        },
        "summed_evaluation": (
            None
            if record.summed is None
            else {
                "sites": len(record.summed.sites),
                "images": record.summed.images,
                "sites_by_class": list(record.summed.held),
            }
        ),
        "clock": {
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(clock, 4),
        },
    }


def summed_confusion(record: RoundRecord) -> dict[str, npt.NDArray[np.int64]]:
    """Return the sum of the confusion matrices that sites sent, by head.

    Returns
    -------
    dict of str to ndarray of int64, shape [C, C]
        For the head that is delivered; empty if no site's policy allows it.
    """
    matrices = [
        evaluation.confusion
        for evaluation in (*record.evaluations.values(), record.summed)
        if evaluation is not None and evaluation.confusion is not None
    ]
    if not matrices or not record.recalls:
        return {}
    return {next(iter(record.recalls)): np.sum(matrices, axis=0)}


def _site(name: str, record: RoundRecord, groups: ShotGroups) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if trained := record.trained.get(name):
        fields["training"] = {
            "images": trained.images,
            "unreadable": trained.unreadable,
            "seconds": round(trained.seconds, 4),
            "bytes": trained.bytes,
        }
    if evaluation := record.evaluations.get(name):
        fields["evaluation"] = {
            "images": evaluation.images,
            "unreadable": evaluation.unreadable,
            "seconds": round(evaluation.seconds, 4),
            "confusion_matrix": evaluation.confusion is not None,
            "accuracy": _accuracy(evaluation, groups),
        }
    return fields


def _accuracy(evaluation: Evaluation, groups: ShotGroups) -> dict[str, Any]:
    """Return each head's accuracy; empty if the site has no class that evaluates."""
    classes = len(groups.many) + len(groups.medium) + len(groups.few)
    return {
        head: accuracy_fields(
            recall_report([recall.get(c) for c in range(classes)], groups)
        )
        for head, recall in evaluation.recalls.items()
        if recall
    }
