"""Train requests and replies.

Train request: ``arrays`` (global model), ``retrained-classifier`` (weight, bias; only
where class gradients are wanted), ``config`` (round, seeds, what to switch on).
Train reply: ``arrays`` (local model), ``class-gradients`` (the classes held and, for
each, weight and bias gradient, dense or low-rank), ``metrics``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from clip2fl_common.class_gradients import CodedGradient
from clip2fl_common.messages.arrays import NotFiniteError, ReplyError, checked
from clip2fl_common.messages.class_gradients import (
    GradientFormat,
    gradients_from_arrays,
)
from clip2fl_common.messages.names import (
    ARRAYS,
    AVERAGED_METRICS,
    CLASSIFIER,
    CODE_FINGERPRINT,
    CONFIG,
    DISTILLATION_TEMPERATURE,
    DISTILLATION_WEIGHT,
    GRADIENTS,
    LARGEST_VALUE,
    METRICS,
    NUM_EXAMPLES,
    PARTITION,
    PROXIMAL_MU,
    ROUND,
    STREAM,
    SUMMED_METRICS,
    TEACHER_FINGERPRINT,
    VARIANCE,
)


@dataclass(frozen=True)
class TrainRequest:
    """A train or evaluate request, as the client reads it.

    Attributes
    ----------
    server_round, partition : int
        Round, and which partition to train on; for a node with images of its own, the
        site's number.
    stream : int
        Number of the client's random streams.
    model : ArrayRecord
        Global model.
    classifier : tuple of Tensor or None
        Re-trained classifier, weight [C, d] and bias [C], where class gradients are
        wanted.
    code_fingerprint : str
        Of the server's code (see `clip2fl_common.provenance`).
    teacher_fingerprint : str
        Of the teacher to distil from; empty without distillation.
    distillation_weight, distillation_temperature, proximal_mu : float
        Terms of the local loss; a weight of 0 leaves its term out.
    """

    server_round: int
    partition: int
    stream: int
    model: ArrayRecord
    classifier: tuple[torch.Tensor, torch.Tensor] | None
    code_fingerprint: str
    teacher_fingerprint: str
    distillation_weight: float
    distillation_temperature: float
    proximal_mu: float

    @classmethod
    def parse(cls, content: RecordDict) -> "TrainRequest":
        """Read the content of a train message."""
        config = content.config_records[CONFIG]
        classifier = content.array_records.get(CLASSIFIER)
        return cls(
            server_round=cast(int, config[ROUND]),
            partition=cast(int, config[PARTITION]),
            # The server of another version may send none; what to do about that, the
            # check of its code's fingerprint says.
            stream=cast(int, config.get(STREAM, config[PARTITION])),
            model=content.array_records[ARRAYS],
            classifier=None if classifier is None else _linear(classifier),
            code_fingerprint=cast(str, config[CODE_FINGERPRINT]),
            teacher_fingerprint=cast(str, config.get(TEACHER_FINGERPRINT, "")),
            distillation_weight=cast(float, config.get(DISTILLATION_WEIGHT, 0.0)),
            distillation_temperature=cast(
                float, config.get(DISTILLATION_TEMPERATURE, 1.0)
            ),
            proximal_mu=cast(float, config.get(PROXIMAL_MU, 0.0)),
        )


def _linear(arrays: ArrayRecord) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = (arrays[name].numpy() for name in ("weight", "bias"))
    return torch.from_numpy(weight.copy()), torch.from_numpy(bias.copy())


def check_reply(
    reply: Message,
    reference: ArrayRecord,
    gradients: GradientFormat | None,
    asked: Mapping[int, int],
) -> dict[int, CodedGradient]:
    """Check a train reply before it touches any state.

    Parameters
    ----------
    reply : Message
        A reply with content.
    reference : ArrayRecord
        The global model that was sent out.
    gradients : GradientFormat or None
        What is expected of class gradients, where they belong into the reply.
    asked : mapping of int to int
        Partitions that the sender was asked for, each with its number of images.

    Returns
    -------
    dict of int to ClassGradient or LowRankGradient
        The class gradients; empty where none are expected.

    Raises
    ------
    ReplyError
        Names what is missing, of the wrong shape or type, or not finite.
    """
    content = reply.content
    expected = {ARRAYS, METRICS} | ({GRADIENTS} if gradients else set())
    if set(content) != expected:
        raise ReplyError(f"records are {sorted(content)}, expected {sorted(expected)}")
    if set(content.array_records) != expected - {METRICS} or set(
        content.metric_records
    ) != {METRICS}:
        raise ReplyError("a record is not of the type it should be")
    arrays = content.array_records[ARRAYS]
    if set(arrays) != set(reference):
        difference = sorted(set(arrays) ^ set(reference))
        raise ReplyError(f"model arrays missing or unknown: {', '.join(difference)}")
    for name, sent in reference.items():
        values = checked(name, arrays[name], tuple(sent.shape), sent.dtype)
        if name.endswith(VARIANCE) and values.min(initial=0) < 0:
            raise ReplyError(f"array {name} is a variance, but has negative values")
    _check_metrics(content.metric_records[METRICS], asked)
    if gradients is None:
        return {}
    return gradients_from_arrays(content.array_records[GRADIENTS], gradients)


def _check_metrics(metrics: MetricRecord, asked: Mapping[int, int]) -> None:
    expected = {NUM_EXAMPLES, PARTITION, *AVERAGED_METRICS, *SUMMED_METRICS}
    if set(metrics) != expected:
        difference = sorted(set(metrics) ^ expected)
        raise ReplyError(f"metrics missing or unknown: {', '.join(difference)}")
    for name, value in metrics.items():
        if isinstance(value, list):
            raise ReplyError(f"metric {name} = {value} is not a finite number")
        if not math.isfinite(value):
            raise NotFiniteError(f"metric {name} = {value} is not a finite number")
        least = -LARGEST_VALUE if name in AVERAGED_METRICS else 0
        # A site's number has 63 bits; it is compared with what was asked for, below.
        counted = name not in (NUM_EXAMPLES, PARTITION)
        if counted and not least <= value <= LARGEST_VALUE:
            raise ReplyError(
                f"metric {name} = {value}; it must be from {least:g} to "
                f"{LARGEST_VALUE:g}"
            )
    partition = metrics[PARTITION]
    if not isinstance(partition, int) or partition not in asked:
        raise ReplyError(
            f"{PARTITION} = {partition}, but the node was asked for {sorted(asked)}"
        )
    examples, unreadable = metrics[NUM_EXAMPLES], metrics["unreadable-images"]
    if not isinstance(examples, int) or examples < 1:
        raise ReplyError(f"{NUM_EXAMPLES} = {examples}; it must be a positive integer")
    if not isinstance(unreadable, int) or examples + unreadable > asked[partition]:
        raise ReplyError(
            f"{NUM_EXAMPLES} = {examples} and {unreadable} unreadable images, but "
            f"partition {partition} has {asked[partition]} images"
        )


def partition_of(reply: Message) -> int:
    """Return which simulated partition a reply that has been checked comes from."""
    return cast(int, reply.content.metric_records[METRICS][PARTITION])


def images_of(reply: Message) -> int:
    """Return the training images that a reply that has been checked claims."""
    return cast(int, reply.content.metric_records[METRICS][NUM_EXAMPLES])
