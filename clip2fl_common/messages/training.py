"""Train requests and replies.

A train request holds ``arrays`` (global model), ``retrained-classifier`` (weight and
bias; only if class gradients are requested) and ``config`` (round, seeds, options of
the method). A train reply holds ``arrays`` (local model), ``metrics``, and one record
for each declared field in the request, such as ``class-gradients`` (the classes held
and, for each, its weight and bias gradient, dense or low-rank).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar, cast

import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from clip2fl_common.messages.arrays import (
    NotFiniteError,
    ReplyError,
    checked,
    payload_bytes,
    record_bytes,
)
from clip2fl_common.messages.fields import ReplyField
from clip2fl_common.messages.names import (
    ARRAYS,
    AVERAGED_METRICS,
    CLASSIFIER,
    CLIENT_SECONDS,
    CODE_FINGERPRINT,
    CONFIG,
    CONFUSION,
    DISTILLATION_TEMPERATURE,
    DISTILLATION_WEIGHT,
    FIELDS,
    GRADIENTS,
    HEAD_RECORDS,
    LARGEST_VALUE,
    METRICS,
    MOST_SECONDS,
    NUM_EXAMPLES,
    PARTITION,
    PROXIMAL_MU,
    ROUND,
    STREAM,
    SUMMED_METRICS,
    TEACHER_FINGERPRINT,
    VARIANCE,
)

Content = TypeVar("Content")


@dataclass(frozen=True)
class TrainRequest:
    """A train or evaluate request, decoded for the client.

    Attributes
    ----------
    server_round, partition : int
        Round, and partition to train on; for a node with images of its own, the site's
        number.
    stream : int
        Number of the client's random streams.
    model : ArrayRecord
        Global model.
    classifier : tuple of Tensor or None
        Re-trained classifier, weight [C, d] and bias [C], if class gradients are
        requested.
    code_fingerprint : str
        Fingerprint of the server's code (see `clip2fl_common.provenance`).
    teacher_fingerprint : str
        Fingerprint of the teacher to distil from; empty without distillation.
    fields : tuple of str
        Declared fields that the reply must hold (`REPLY_FIELDS`).
    distillation_weight, distillation_temperature, proximal_mu : float
        Terms of the local loss; a weight of 0 turns its term off.
    heads : mapping of str to tuple of Tensor
        Classifiers to evaluate besides the model's own, by name: weight [C, d] and bias
        [C] of each.
    confusion_of : str
        Head whose confusion matrix the server asks for; empty: none.
    """

    server_round: int
    partition: int
    stream: int
    model: ArrayRecord
    classifier: tuple[torch.Tensor, torch.Tensor] | None
    code_fingerprint: str
    teacher_fingerprint: str
    fields: tuple[str, ...]
    distillation_weight: float
    distillation_temperature: float
    proximal_mu: float
    heads: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    confusion_of: str = ""

    @classmethod
    def parse(cls, content: RecordDict) -> "TrainRequest":
        """Return the request in the content of a train message."""
        config = content.config_records[CONFIG]
        classifier = content.array_records.get(CLASSIFIER)
        # Without a list of fields, a classifier requests its gradients.
        implied = [] if classifier is None else [GRADIENTS]
        return cls(
            server_round=cast(int, config[ROUND]),
            partition=cast(int, config[PARTITION]),
            # A server of another version may send no stream. The check of the code's
            # fingerprint decides what to do about that.
            stream=cast(int, config.get(STREAM, config[PARTITION])),
            model=content.array_records[ARRAYS],
            classifier=None if classifier is None else _linear(classifier),
            code_fingerprint=cast(str, config[CODE_FINGERPRINT]),
            teacher_fingerprint=cast(str, config.get(TEACHER_FINGERPRINT, "")),
            fields=tuple(cast(list[str], config.get(FIELDS, implied))),
            distillation_weight=cast(float, config.get(DISTILLATION_WEIGHT, 0.0)),
            distillation_temperature=cast(
                float, config.get(DISTILLATION_TEMPERATURE, 1.0)
            ),
            proximal_mu=cast(float, config.get(PROXIMAL_MU, 0.0)),
            heads={
                head: _linear(content.array_records[record])
                for head, record in HEAD_RECORDS.items()
                if record in content.array_records
            },
            confusion_of=cast(str, config.get(CONFUSION, "")),
        )


def _linear(arrays: ArrayRecord) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = (arrays[name].numpy() for name in ("weight", "bias"))
    return torch.from_numpy(weight.copy()), torch.from_numpy(bias.copy())


@dataclass(frozen=True)
class TrainReply:
    """A train reply after the checks, decoded once.

    Attributes
    ----------
    node : int
        Flower's id of the node that sent it.
    client : int
        The simulated partition, or the site's number.
    images : int
        Number of training images that the client claims.
    model : mapping of str to ndarray
        Weights and buffers of the local model.
    metrics : mapping of str to float
        Losses, seconds and counts (`AVERAGED_METRICS`, `SUMMED_METRICS`).
    upload_bytes, field_bytes : int
        Size of all arrays, and of all arrays besides the model, in bytes.
    fields : mapping of str to object
        Content of the declared fields, by name; read them with `field`.
    members : tuple of int
        Clients whose sum this is, with secure aggregation; ``client`` is the first of
        them then, and ``node`` is 0. Empty for a single client's reply.
    """

    node: int
    client: int
    images: int
    model: Mapping[str, npt.NDArray[Any]]
    metrics: Mapping[str, float]
    upload_bytes: int
    field_bytes: int
    fields: Mapping[str, object]
    members: tuple[int, ...] = ()

    @property
    def clients(self) -> tuple[int, ...]:
        """Return the clients whose updates the reply holds."""
        return self.members or (self.client,)

    def field(self, declared: ReplyField[Content]) -> Content:
        """Return the content of a declared field.

        Parameters
        ----------
        declared : ReplyField
            The declaration by which the reply was checked.
        """
        return cast(Content, self.fields[declared.name])

    @classmethod
    def parse(
        cls,
        reply: Message,
        sent: Mapping[str, npt.NDArray[Any]],
        declared: Sequence[ReplyField[object]],
        asked: Mapping[int, int],
    ) -> Self:
        """Return a train reply after checking it, before it changes any state.

        Parameters
        ----------
        reply : Message
            A reply with content.
        sent : mapping of str to ndarray
            The global model that was sent.
        declared : sequence of ReplyField
            Fields that the reply must hold besides model and metrics.
        asked : mapping of int to int
            Clients that the sender was asked for, each with its number of images.

        Raises
        ------
        ReplyError
            Names the part that is missing, has a wrong shape or type, or is not finite.
        """
        content = reply.content
        extra = {field.name for field in declared}
        expected = {ARRAYS, METRICS} | extra
        if set(content) != expected:
            raise ReplyError(
                f"records are {sorted(content)}, expected {sorted(expected)}"
            )
        if set(content.array_records) != {ARRAYS} | extra or set(
            content.metric_records
        ) != {METRICS}:
            raise ReplyError("a record is not of the type it should be")
        model = _checked_model(content.array_records[ARRAYS], sent)
        metrics = content.metric_records[METRICS]
        _check_metrics(metrics, asked)
        return cls(
            node=reply.metadata.src_node_id,
            client=cast(int, metrics[PARTITION]),
            images=cast(int, metrics[NUM_EXAMPLES]),
            model=model,
            metrics={
                name: cast(float, metrics[name])
                for name in (*AVERAGED_METRICS, *SUMMED_METRICS)
            },
            upload_bytes=payload_bytes(content),
            field_bytes=sum(
                record_bytes(content.array_records[name]) for name in extra
            ),
            fields={
                field.name: field.decode(content.array_records[field.name])
                for field in declared
            },
        )


def _checked_model(
    arrays: ArrayRecord, sent: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    if set(arrays) != set(sent):
        difference = sorted(set(arrays) ^ set(sent))
        raise ReplyError(f"model arrays missing or unknown: {', '.join(difference)}")
    model = {}
    for name, values in sent.items():
        model[name] = checked(name, arrays[name], values.shape, values.dtype)
        if name.endswith(VARIANCE) and model[name].min(initial=0) < 0:
            raise ReplyError(f"array {name} is a variance, but has negative values")
    return model


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
        # A site's number has 63 bits; it is compared with the requested ones below.
        counted = name not in (NUM_EXAMPLES, PARTITION)
        most = MOST_SECONDS if name in CLIENT_SECONDS else LARGEST_VALUE
        if counted and not least <= value <= most:
            raise ReplyError(
                f"metric {name} = {value}; it must be from {least:g} to {most:g}"
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
