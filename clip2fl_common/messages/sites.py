"""Answers of nodes to a query, and sites' evaluations of models.

A node with images of its own answers a query with ``config``, which holds the site's
name or an empty string. It also evaluates: the request is like a train request, and the
reply has only ``metrics``.
"""

from collections.abc import Mapping, Sequence
from typing import cast

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from clip2fl_common.messages.arrays import ReplyError
from clip2fl_common.messages.names import (
    CLASSES,
    CONFIG,
    IN_CARD,
    METRICS,
    NUM_EXAMPLES,
    PARTITION,
    RECALL,
    RECALL_STEP,
    SITE,
)
from clip2fl_common.shown import quoted
from clip2fl_common.site_names import NAME_RULE, is_site_name


def site_reply(name: str, in_card: bool = False) -> RecordDict:
    """Return the answer to a query of a node with images of its own.

    Parameters
    ----------
    name : str
        The site's name; empty if the node was given none.
    in_card : bool
        Whether the delivered model's card may have the site's name and figures.

    Returns
    -------
    RecordDict
    """
    allowed = {IN_CARD: True} if in_card else {}
    return RecordDict({CONFIG: ConfigRecord({SITE: name, **allowed})})


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


def recall_reply(
    num_examples: int, recalls: Mapping[str, Mapping[int, float]]
) -> RecordDict:
    """Return a site's evaluation: the accuracy of each head on each class.

    The reply reveals no class counts. An accuracy over all classes is left out too:
    next to the accuracies per class it would reveal the classes' shares after some
    rounds.

    Parameters
    ----------
    num_examples : int
        Number of evaluated images.
    recalls : mapping of str to mapping of int to float
        Accuracy in percent by head and class, for the same classes in each head.

    Returns
    -------
    RecordDict
        Accuracies are rounded to `RECALL_STEP`.
    """
    classes = sorted(next(iter(recalls.values())))
    values = {
        f"{RECALL}{head}": [RECALL_STEP * round(by[c] / RECALL_STEP) for c in classes]
        for head, by in recalls.items()
    }
    metrics = MetricRecord({NUM_EXAMPLES: num_examples, CLASSES: classes, **values})
    return RecordDict({METRICS: metrics})


def recalls_of(
    reply: Message, num_classes: int, heads: Sequence[str]
) -> dict[str, dict[int, int]]:
    """Return the accuracies in a reply made by `recall_reply`, after checking them.

    Parameters
    ----------
    reply : Message
        A reply with content.
    num_classes : int
        Number of classes C.
    heads : sequence of str
        Heads (classifiers) that the reply must report on.

    Returns
    -------
    dict of str to dict of int to int
        Accuracy in percent by head and class.

    Raises
    ------
    ReplyError
        If anything is missing, unknown or out of range.
    """
    content = reply.content
    if set(content) != {METRICS} or set(content.metric_records) != {METRICS}:
        raise ReplyError(f"records are {sorted(content)}, expected ['{METRICS}']")
    metrics = content.metric_records[METRICS]
    names = {NUM_EXAMPLES, CLASSES, *(f"{RECALL}{head}" for head in heads)}
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
    return recalls


def _integers(metrics: MetricRecord, name: str, low: int, high: int) -> list[int]:
    values = metrics[name]
    if not isinstance(values, list) or not all(
        isinstance(value, int) and low <= value <= high for value in values
    ):
        raise ReplyError(f"{name} must be integers from {low} to {high}")
    return cast(list[int], values)
