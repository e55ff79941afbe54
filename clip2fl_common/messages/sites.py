"""Answers of nodes to a query, and sites' evaluations of models.

A node with images of its own answers a query with ``config``, which holds the site's
name or an empty string. It also evaluates: the request is like a train request, and the
reply has only ``metrics``, and a confusion matrix if the site's own policy allows it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from clip2fl_common.messages.arrays import ReplyError, checked, numpy_to_arrays
from clip2fl_common.messages.names import (
    CLASSES,
    CONFIG,
    CONFUSION,
    EVALUATION_SECONDS,
    EVALUATION_UNREADABLE,
    IN_CARD,
    METRICS,
    MOST_SECONDS,
    NUM_EXAMPLES,
    PARTITION,
    RECALL,
    RECALL_STEP,
    SITE,
    VERSIONS,
)
from clip2fl_common.shown import quoted
from clip2fl_common.site_names import NAME_RULE, is_site_name

VERSION = re.compile(r"([A-Za-z0-9_.-]{1,50})=([A-Za-z0-9_.+!-]{1,50})")
MOST_VERSIONS = 50
# Far above what a site evaluates; sums over sites stay in 63 bits.
MOST_IMAGES = 2**40


def site_reply(
    name: str, versions: Mapping[str, str], in_card: bool = False
) -> RecordDict:
    """Return the answer to a query of a node with images of its own.

    Parameters
    ----------
    name : str
        The site's name; empty if the node was given none.
    versions : mapping of str to str
        Versions of the node's code and packages, by name.
    in_card : bool
        Whether the delivered model's card may have the site's name and figures.

    Returns
    -------
    RecordDict
    """
    listed = [f"{package}={version}" for package, version in versions.items()]
    allowed = {IN_CARD: True} if in_card else {}
    return RecordDict({CONFIG: ConfigRecord({SITE: name, VERSIONS: listed, **allowed})})


def versions_of(reply: Message) -> dict[str, str]:
    """Return the versions in a reply made by `site_reply`; empty if it has none.

    Raises
    ------
    ReplyError
        If they are not names and versions.
    """
    record = reply.content.config_records.get(CONFIG, ConfigRecord())
    listed = record.get(VERSIONS, [])
    if not isinstance(listed, list) or len(listed) > MOST_VERSIONS:
        raise ReplyError(f"its answer has more than {MOST_VERSIONS} {VERSIONS}")
    found = [VERSION.fullmatch(one) if isinstance(one, str) else None for one in listed]
    if None in found:
        raise ReplyError(f"its answer has {VERSIONS} that are no name=version")
    return {match[1]: match[2] for match in found if match is not None}


def may_be_in_card(reply: Message) -> bool:
    """Return whether a site allows its name and figures in the model's card."""
    config = reply.content.config_records.get(CONFIG, ConfigRecord())
    return config.get(IN_CARD) is True


def site_of(reply: Message) -> str:
    """Return the name in a reply made by `site_reply`; empty if the node has none.

    Raises
    ------
    ReplyError
        If the reply holds no usable name.
    """
    name = reply.content.config_records.get(CONFIG, ConfigRecord()).get(SITE)
    if name == "" or is_site_name(name):
        return name
    raise ReplyError(f"its answer names no site ({quoted(name)}); expected {NAME_RULE}")


def simulated_partition(answer: Message) -> int:
    """Return the partition that a node simulates, from its answer to a query.

    Raises
    ------
    ReplyError
        If the answer holds no usable partition.
    """
    metrics = answer.content.metric_records.get(METRICS, MetricRecord())
    partition = metrics.get(PARTITION)
    if not isinstance(partition, int) or partition < 0:
        raise ReplyError(
            f"its answer has {PARTITION} = {partition!r}, expected an integer from 0"
        )
    return partition


@dataclass(frozen=True)
class Evaluation:
    """A site's evaluation of the global model on its own validation images.

    Attributes
    ----------
    images : int
        Number of evaluated images.
    recalls : mapping of str to mapping of int to float
        Accuracy in percent by head (classifier) and class, for the same classes in each
        head. In a reply it is rounded to `RECALL_STEP`.
    unreadable : int
        Number of validation images that were skipped as unreadable.
    seconds : float
        The site's own measurement of its work.
    confusion : ndarray of int64, shape [C, C], or None
        Validation images by true and predicted class, for the head that is delivered.
        None unless the server asks for it and the site's policy allows it, since the
        sums of its rows are the site's class counts.
    """

    images: int
    recalls: Mapping[str, Mapping[int, float]]
    unreadable: int = 0
    seconds: float = 0.0
    confusion: npt.NDArray[np.int64] | None = None

    def stepped_recalls(self) -> dict[str, dict[int, int]]:
        """Return the accuracies by head and class, in steps of `RECALL_STEP`."""
        return {
            head: {c: RECALL_STEP * round(by[c] / RECALL_STEP) for c in by}
            for head, by in self.recalls.items()
        }

    def content(self) -> RecordDict:
        """Return the reply's content.

        Without a confusion matrix it reveals no class counts. An accuracy over all
        classes is left out too: next to the accuracies per class it would reveal the
        classes' shares after some rounds.
        """
        classes = sorted(next(iter(self.recalls.values())))
        values = {
            f"{RECALL}{head}": [by[c] for c in classes]
            for head, by in self.stepped_recalls().items()
        }
        metrics = MetricRecord(
            {
                NUM_EXAMPLES: self.images,
                CLASSES: classes,
                EVALUATION_UNREADABLE: self.unreadable,
                EVALUATION_SECONDS: self.seconds,
                **values,
            }
        )
        content = RecordDict({METRICS: metrics})
        if self.confusion is not None:
            content[CONFUSION] = numpy_to_arrays({CONFUSION: self.confusion})
        return content

    @classmethod
    def parse(cls, reply: Message, num_classes: int, heads: Sequence[str]) -> Self:
        """Return the evaluation in a reply, after checking it.

        Parameters
        ----------
        reply : Message
            A reply with content.
        num_classes : int
            Number of classes C.
        heads : sequence of str
            Heads (classifiers) that the reply must report on.

        Raises
        ------
        ReplyError
            If anything is missing, unknown or out of range.
        """
        content = reply.content
        if not {METRICS} <= set(content) <= {METRICS, CONFUSION} or set(
            content.metric_records
        ) != {METRICS}:
            raise ReplyError(f"records are {sorted(content)}, expected ['{METRICS}']")
        metrics = content.metric_records[METRICS]
        names = {
            *(NUM_EXAMPLES, CLASSES, EVALUATION_UNREADABLE, EVALUATION_SECONDS),
            *(f"{RECALL}{head}" for head in heads),
        }
        if set(metrics) != names:
            difference = sorted(set(metrics) ^ names)
            raise ReplyError(f"metrics missing or unknown: {', '.join(difference)}")
        classes = _integers(metrics, CLASSES, 0, num_classes - 1)
        if len(set(classes)) < len(classes):
            raise ReplyError(f"accuracies for classes {classes}; they must differ")
        recalls = {}
        for head in heads:
            values = _integers(metrics, f"{RECALL}{head}", 0, 100)
            if len(values) != len(classes):
                raise ReplyError(
                    f"{len(values)} accuracies of {head} for {len(classes)} classes"
                )
            recalls[head] = dict(zip(classes, values, strict=True))
        images = _count(metrics, NUM_EXAMPLES)
        return cls(
            images=images,
            recalls=recalls,
            unreadable=_count(metrics, EVALUATION_UNREADABLE),
            seconds=_seconds(metrics, EVALUATION_SECONDS),
            confusion=_confusion(content, num_classes, images),
        )


def _confusion(
    content: RecordDict, num_classes: int, images: int
) -> npt.NDArray[np.int64] | None:
    if CONFUSION not in content:
        return None
    arrays = content.array_records.get(CONFUSION)
    if arrays is None or set(arrays) != {CONFUSION}:
        raise ReplyError(f"the record {CONFUSION} holds no confusion matrix")
    shape = (num_classes, num_classes)
    matrix: npt.NDArray[Any] = checked(CONFUSION, arrays[CONFUSION], shape, np.int64)
    # The largest entry is checked first, so that the sum cannot overflow.
    if matrix.min() < 0 or matrix.max() > images or matrix.sum() != images:
        raise ReplyError(f"the {CONFUSION} matrix does not count {images} images")
    return matrix


def _count(metrics: MetricRecord, name: str) -> int:
    value = metrics[name]
    if not isinstance(value, int) or not 0 <= value <= MOST_IMAGES:
        raise ReplyError(f"{name} must be an integer from 0 to {MOST_IMAGES}")
    return value


def _seconds(metrics: MetricRecord, name: str) -> float:
    value = metrics[name]
    if not isinstance(value, float) or not 0 <= value <= MOST_SECONDS:
        raise ReplyError(f"{name} must be a number from 0 to {MOST_SECONDS:g}")
    return value


def _integers(metrics: MetricRecord, name: str, low: int, high: int) -> list[int]:
    values = metrics[name]
    if not isinstance(values, list) or not all(
        isinstance(value, int) and low <= value <= high for value in values
    ):
        raise ReplyError(f"{name} must be integers from {low} to {high}")
    return cast(list[int], values)
