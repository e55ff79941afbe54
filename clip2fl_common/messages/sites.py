"""What nodes answer to a query, and what sites say of the models that they evaluate.

Nodes with images of their own answer a query (``config``: the site's name, or an
empty one) and evaluate: the request is a train request's, the reply has ``metrics``
only.
"""

from collections.abc import Mapping, Sequence
from typing import cast

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from clip2fl_common.messages.arrays import ReplyError
from clip2fl_common.messages.names import (
    CLASSES,
    CONFIG,
    METRICS,
    NUM_EXAMPLES,
    PARTITION,
    RECALL,
    RECALL_STEP,
    SITE,
)
from clip2fl_common.shown import quoted
from clip2fl_common.site_names import NAME_RULE, is_site_name


def site_reply(name: str) -> RecordDict:
    """Return the answer of a node with images of its own to a query.

    Parameters
    ----------
    name : str
        The site's name; empty where the node was given none.

    Returns
    -------
    RecordDict
    """
    return RecordDict({CONFIG: ConfigRecord({SITE: name})})


def site_of(reply: Message) -> str:
    """Return the name in a reply that `site_reply` made; empty: the node has none.

    Raises
    ------
    ReplyError
        If there is no usable name.
    """
    name = reply.content.config_records.get(CONFIG, ConfigRecord()).get(SITE)
    if name == "" or is_site_name(name):
        return name
    raise ReplyError(f"its answer names no site ({quoted(name)}); expected {NAME_RULE}")


def simulated_partition(answer: Message) -> int:
    """Return which partition a node says it simulates, in its answer to a query.

    Raises
    ------
    ReplyError
        If it does not say so in a usable way.
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
    """Return a site's evaluation: what each head gets right of each class.

    Neither counts nor anything to compute them from: an accuracy over all classes,
    next to those of each class, would tell the classes' shares after some rounds.

    Parameters
    ----------
    num_examples : int
        Images evaluated.
    recalls : mapping of str to mapping of int to float
        Head to class to accuracy in percent, for the same classes in each.

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
    """Return the accuracies in a reply that `recall_reply` made, checked.

    Parameters
    ----------
    reply : Message
        A reply with content.
    num_classes : int
        Number of classes C.
    heads : sequence of str
        The heads that it must speak of.

    Returns
    -------
    dict of str to dict of int to int
        Head to class to accuracy in percent.

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
