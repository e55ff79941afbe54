"""The message contract between server and clients: the only file that knows it.

Train request: ``arrays`` (global model), ``retrained-classifier`` (weight, bias; only
where class gradients are wanted), ``config`` (round, seeds, what to switch on).
Train reply: ``arrays`` (local model), ``class-gradients`` (the classes held and, for
each, weight and bias gradient), ``metrics``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from torch import nn

from clip2fl_common.gradients import ClassGradient

ARRAYS = "arrays"
CLASSIFIER = "retrained-classifier"
GRADIENTS = "class-gradients"
CONFIG = "config"
METRICS = "metrics"

PARTITION = "partition-id"
ROUND = "server-round"
NUM_EXAMPLES = "num-examples"
PROXIMAL_MU = "proximal-mu"
DISTILLATION_WEIGHT = "distillation-weight"
DISTILLATION_TEMPERATURE = "distillation-temperature"
TEACHER_FINGERPRINT = "teacher-fingerprint"
CODE_FINGERPRINT = "code-fingerprint"

# Numbers that every train reply carries besides NUM_EXAMPLES and PARTITION.
AVERAGED_METRICS = ("loss", "distillation-loss")
SUMMED_METRICS = (
    "unreadable-images",
    "seconds-data",
    "seconds-gradients",
    "seconds-training",
)


@dataclass(frozen=True)
class TrainRequest:
    """A train request, as the client reads it.

    Attributes
    ----------
    server_round, partition : int
        Round, and which partition to train on.
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


class ReplyError(ValueError):
    """A reply that must not touch the server's state; says why."""


def model_to_arrays(model: nn.Module) -> ArrayRecord:
    """Return the model's floating-point state (BatchNorm buffers included).

    Integer buffers (BatchNorm's batch counter) are left out: averaging has no
    meaning for them and nothing reads them.
    """
    return ArrayRecord(
        {
            name: Array(tensor.detach().cpu().numpy())
            for name, tensor in model.state_dict().items()
            if tensor.is_floating_point()
        }
    )


def load_arrays(model: nn.Module, arrays: ArrayRecord) -> None:
    """Load what `model_to_arrays` returned into a model of the same architecture."""
    state = {name: torch.from_numpy(a.numpy().copy()) for name, a in arrays.items()}
    counters = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not tensor.is_floating_point()
    }
    model.load_state_dict(state | counters)


def _linear(arrays: ArrayRecord) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = (arrays[name].numpy() for name in ("weight", "bias"))
    return torch.from_numpy(weight.copy()), torch.from_numpy(bias.copy())


def gradients_to_arrays(gradients: Mapping[int, ClassGradient]) -> ArrayRecord:
    """Return class gradients as three stacked arrays.

    Parameters
    ----------
    gradients : mapping of int to ClassGradient
        At least one class.

    Returns
    -------
    ArrayRecord
        ``classes`` [K] int64, ``weight`` [K, C, d] and ``bias`` [K, C] float32.
    """
    classes = sorted(gradients)
    weight = torch.stack([gradients[c].weight for c in classes])
    bias = torch.stack([gradients[c].bias for c in classes])
    return ArrayRecord(
        {
            "classes": Array(np.asarray(classes, dtype=np.int64)),
            "weight": Array(weight.cpu().numpy()),
            "bias": Array(bias.cpu().numpy()),
        }
    )


def gradients_from_arrays(
    arrays: ArrayRecord, num_classes: int, feature_dim: int
) -> dict[int, ClassGradient]:
    """Return the class gradients of a reply, checked.

    Parameters
    ----------
    arrays : ArrayRecord
        As `gradients_to_arrays` makes it.
    num_classes, feature_dim : int
        C and d of the server's classifier.

    Returns
    -------
    dict of int to ClassGradient

    Raises
    ------
    ReplyError
        If keys, shapes, types, classes or values are not as agreed.
    """
    if set(arrays) != {"classes", "weight", "bias"}:
        raise ReplyError(f"class gradients have the keys {sorted(arrays)}")
    classes = _decode("class-gradients.classes", arrays["classes"])
    held = len(classes)
    if classes.ndim != 1 or held == 0 or classes.dtype != np.int64:
        raise ReplyError("class gradients list no classes, or not as integers")
    if len(set(classes.tolist())) != held or not (
        0 <= classes.min() and classes.max() < num_classes
    ):
        raise ReplyError(
            f"class gradients for classes {classes.tolist()}; they must differ and be "
            f"from 0 to {num_classes - 1}"
        )
    tensors = []
    for name, shape in (
        ("weight", (held, num_classes, feature_dim)),
        ("bias", (held, num_classes)),
    ):
        array = _decode(f"class-gradients.{name}", arrays[name])
        _check_array(f"class-gradients.{name}", array, shape, np.dtype(np.float32))
        tensors.append(torch.from_numpy(array.copy()))
    return {
        int(c): ClassGradient(tensors[0][k], tensors[1][k])
        for k, c in enumerate(classes)
    }


def check_reply(
    reply: Message, reference: ArrayRecord, gradient_shape: tuple[int, int] | None
) -> None:
    """Check a train reply before it touches any state.

    Parameters
    ----------
    reply : Message
        A reply with content.
    reference : ArrayRecord
        The global model that was sent out.
    gradient_shape : tuple of int or None
        C and d where class gradients belong into the reply.

    Raises
    ------
    ReplyError
        Names what is missing, of the wrong shape or type, or not finite.
    """
    content = reply.content
    expected = {ARRAYS, METRICS} | ({GRADIENTS} if gradient_shape else set())
    if set(content) != expected:
        raise ReplyError(f"records are {sorted(content)}, expected {sorted(expected)}")
    if set(content.array_records) != expected - {METRICS}:
        raise ReplyError("a record is not of the type it should be")
    arrays = content.array_records[ARRAYS]
    if set(arrays) != set(reference):
        difference = sorted(set(arrays) ^ set(reference))
        raise ReplyError(f"model arrays missing or unknown: {', '.join(difference)}")
    for name, sent in reference.items():
        array = _decode(name, arrays[name])
        _check_array(name, array, tuple(sent.shape), np.dtype(sent.dtype))
    if gradient_shape:
        gradients_from_arrays(content.array_records[GRADIENTS], *gradient_shape)
    _check_metrics(content.metric_records[METRICS])


def _check_metrics(metrics: MetricRecord) -> None:
    expected = {NUM_EXAMPLES, PARTITION, *AVERAGED_METRICS, *SUMMED_METRICS}
    if set(metrics) != expected:
        difference = sorted(set(metrics) ^ expected)
        raise ReplyError(f"metrics missing or unknown: {', '.join(difference)}")
    for name, value in metrics.items():
        if isinstance(value, list) or not math.isfinite(value):
            raise ReplyError(f"metric {name} = {value} is not a finite number")
    examples = metrics[NUM_EXAMPLES]
    if not isinstance(examples, int) or examples < 1:
        raise ReplyError(f"{NUM_EXAMPLES} = {examples}; it must be a positive integer")


def _decode(name: str, array: Array) -> npt.NDArray[Any]:
    try:
        return array.numpy()
    # A sender may put any bytes here, and numpy answers them with many exceptions.
    except Exception as error:
        raise ReplyError(f"array {name} cannot be decoded ({error})") from None


def _check_array(
    name: str, array: npt.NDArray[Any], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    if array.shape != shape:
        raise ReplyError(f"array {name} has shape {array.shape}, expected {shape}")
    if array.dtype != dtype:
        raise ReplyError(f"array {name} has type {array.dtype}, expected {dtype}")
    if not np.isfinite(array).all():
        raise ReplyError(f"array {name} has values that are not finite")


def partition_of(reply: Message) -> int:
    """Return which simulated partition a reply comes from."""
    return cast(int, reply.content.metric_records[METRICS][PARTITION])


def payload_bytes(content: RecordDict) -> int:
    """Return the size of a message's arrays in bytes: what is worth counting."""
    return sum(
        len(array.data)
        for record in content.array_records.values()
        for array in record.values()
    )
