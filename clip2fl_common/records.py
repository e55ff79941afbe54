"""The message contract between server and clients: the only file that knows it.

Train request: ``arrays`` (global model), ``retrained-classifier`` (weight, bias; only
where class gradients are wanted), ``config`` (round, seeds, what to switch on).
Train reply: ``arrays`` (local model), ``class-gradients`` (the classes held and, for
each, weight and bias gradient, dense or low-rank), ``metrics``.

Nodes with images of their own also answer a query (``config``: the site's name, or an
empty one) and evaluate: the request is a train request's, the reply has ``metrics``
only.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from torch import nn

from clip2fl_common.config import Upload
from clip2fl_common.gradient_coding import (
    CodedGradient,
    LowRankGradient,
    Precision,
    max_rank,
)
from clip2fl_common.gradients import ClassGradient
from clip2fl_common.shown import shown
from clip2fl_common.site_names import NAME_RULE, is_site_name
from clip2fl_common.site_names import shown as shown_name

ARRAYS = "arrays"
CLASSIFIER = "retrained-classifier"
GRADIENTS = "class-gradients"
CONFIG = "config"
METRICS = "metrics"

PARTITION = "partition-id"
STREAM = "random-stream"
SITE = "site"
ROUND = "server-round"
NUM_EXAMPLES = "num-examples"
PROXIMAL_MU = "proximal-mu"
DISTILLATION_WEIGHT = "distillation-weight"
DISTILLATION_TEMPERATURE = "distillation-temperature"
TEACHER_FINGERPRINT = "teacher-fingerprint"
CODE_FINGERPRINT = "code-fingerprint"

# Codes of Flower's errors that clients return; Flower's own are below 1000.
# This client's images cannot be read.
DATA_ERROR = 1001
# The site's own rules refuse the run.
SITE_REFUSES = 1002
DIVERGED = 1003  # the model that was sent, or the training on it, is not finite

# No training brings about larger numbers. Sums, squares and products of those below
# stay finite in float32, so that no reply can leave behind what is not a number.
LARGEST_VALUE = 1e12
# Bytes before an array's values; numpy needs 128 for the names and shapes used here.
LONGEST_HEADER = 256
# BatchNorm's, of which the square root is taken.
VARIANCE = "running_var"
RUNNING_STATISTICS = ("running_mean", VARIANCE)


# Characters of a text from elsewhere that are shown.
LONGEST_TEXT = 300

# Numbers that every train reply carries besides NUM_EXAMPLES and PARTITION.
AVERAGED_METRICS = ("loss", "distillation-loss")
SUMMED_METRICS = (
    "unreadable-images",
    "seconds-data",
    "seconds-gradients",
    "seconds-training",
)

CLASSES = "classes"
RECALL = "recall-"
# Steps in percent to which a site rounds its accuracy on each class.
RECALL_STEP = 5


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


def plain(text: object) -> str:
    """Return a text from elsewhere as one line that is safe to print.

    Parameters
    ----------
    text : object
        What a client sent: of any length, with any characters.

    Returns
    -------
    str
        Control characters (line ends, terminal codes), invisible ones and halves of
        surrogate pairs escaped; `LONGEST_TEXT` characters at most.
    """
    # Cut first: escaping a text of many megabytes takes seconds.
    whole = str(text)
    escaped = shown(whole[:LONGEST_TEXT])
    cut = len(whole) > LONGEST_TEXT or len(escaped) > LONGEST_TEXT
    return escaped[:LONGEST_TEXT] + ("..." if cut else "")


class ReplyError(ValueError):
    """A reply that must not touch the server's state; says why, in one plain line.

    Parameters
    ----------
    reason : str
        May hold what the client sent, whatever that is.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(plain(reason))


class NotFiniteError(ReplyError):
    """A reply holds numbers that are not finite or about to be: it has diverged."""


def model_to_arrays(model: nn.Module) -> ArrayRecord:
    """Return the model's floating-point state (BatchNorm buffers included).

    Integer buffers (BatchNorm's batch counter) are left out: averaging has no
    meaning for them and nothing reads them.
    """
    return state_to_arrays(
        {
            name: tensor
            for name, tensor in model.state_dict().items()
            if tensor.is_floating_point()
        }
    )


def state_to_arrays(state: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Return tensors by name as Flower's arrays."""
    return ArrayRecord(
        {name: Array(tensor.detach().cpu().numpy()) for name, tensor in state.items()}
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


def arrays_to_numpy(arrays: ArrayRecord) -> dict[str, npt.NDArray[Any]]:
    """Return the values of arrays that have been checked, by name."""
    return {name: array.numpy() for name, array in arrays.items()}


def numpy_to_arrays(values: Mapping[str, npt.NDArray[Any]]) -> ArrayRecord:
    """Return values as Flower's arrays."""
    return ArrayRecord({name: Array(array) for name, array in values.items()})


def _linear(arrays: ArrayRecord) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = (arrays[name].numpy() for name in ("weight", "bias"))
    return torch.from_numpy(weight.copy()), torch.from_numpy(bias.copy())


@dataclass(frozen=True)
class GradientFormat:
    """What a server expects of uploaded class gradients.

    Attributes
    ----------
    num_classes, feature_dim : int
        C and d of the server's classifier.
    upload : Upload
        The run's settings, which clients have too.
    """

    num_classes: int
    feature_dim: int
    upload: Upload

    @property
    def max_rank(self) -> int:
        """Largest rank of a class: above it, or without coding, it must be dense."""
        if self.upload.min_cosine == 1:
            return 0
        return max_rank(self.num_classes, self.feature_dim)


def gradients_to_arrays(
    gradients: Mapping[int, CodedGradient],
    precision: Precision,
    shape: tuple[int, int] | None = None,
) -> ArrayRecord:
    """Return class gradients as stacked arrays, dense and low-rank ones apart.

    Of K classes, D are dense and the others have R ranks in all. Numpy has no
    bfloat16: in half precision the last four arrays are uint16 and hold its bits.

    Parameters
    ----------
    gradients : mapping of int to ClassGradient or LowRankGradient
        Of any number of classes.
    precision : {"half", "full"}
        Of the values.
    shape : tuple of int or None
        C and d; needed where there may be no class.

    Returns
    -------
    ArrayRecord
        ``classes`` [K] and ``ranks`` [K] int64 (rank 0: dense); ``weight`` [D, C, d]
        of the dense classes, ``left`` [R, C] and ``right`` [R, d] of the others,
        ``bias`` [K, C], float32 or uint16.
    """
    classes = sorted(gradients)
    ordered = [gradients[c] for c in classes]
    dense = [g for g in ordered if isinstance(g, ClassGradient)]
    low_rank = [g for g in ordered if isinstance(g, LowRankGradient)]
    num_classes, dim = shape or _gradient_shape(ordered[0])
    nothing = ordered[0].bias.new_empty(0) if ordered else torch.empty(0)
    # Each starts with nothing, so that its shape holds where no class is of its kind.
    weight = [nothing.new_empty(0, num_classes, dim), *(g.weight[None] for g in dense)]
    left = [nothing.new_empty(0, num_classes), *(g.left.T for g in low_rank)]
    right = [nothing.new_empty(0, dim), *(g.right for g in low_rank)]
    bias = [nothing.new_empty(0, num_classes), *(g.bias[None] for g in ordered)]
    ranks = [g.rank if isinstance(g, LowRankGradient) else 0 for g in ordered]
    return ArrayRecord(
        {
            "classes": Array(np.asarray(classes, dtype=np.int64)),
            "ranks": Array(np.asarray(ranks, dtype=np.int64)),
            "weight": _to_wire(torch.cat(weight), precision),
            "left": _to_wire(torch.cat(left), precision),
            "right": _to_wire(torch.cat(right), precision),
            "bias": _to_wire(torch.cat(bias), precision),
        }
    )


def _gradient_shape(gradient: CodedGradient) -> tuple[int, int]:
    if isinstance(gradient, LowRankGradient):
        return len(gradient.bias), gradient.right.shape[1]
    return len(gradient.bias), gradient.weight.shape[1]


def gradients_from_arrays(
    arrays: ArrayRecord, expected: GradientFormat
) -> dict[int, CodedGradient]:
    """Return the class gradients of a reply, checked.

    Parameters
    ----------
    arrays : ArrayRecord
        As `gradients_to_arrays` makes it.
    expected : GradientFormat
        What the server asked for.

    Returns
    -------
    dict of int to ClassGradient or LowRankGradient
        In float32.

    Raises
    ------
    ReplyError
        If keys, shapes, types, classes, ranks or values are not as agreed.
    """
    names = {"classes", "ranks", "weight", "left", "right", "bias"}
    if set(arrays) != names:
        raise ReplyError(
            f"class gradients have the arrays {sorted(arrays)}, expected "
            f"{sorted(names)}"
        )
    num_classes, dim = expected.num_classes, expected.feature_dim
    classes = _held_classes(arrays["classes"], num_classes)
    held = len(classes)
    ranks = _checked("class-gradients.ranks", arrays["ranks"], (held,), np.int64)
    if held and (ranks.min() < 0 or ranks.max() > expected.max_rank):
        raise ReplyError(
            f"array class-gradients.ranks has values from {ranks.min()} to "
            f"{ranks.max()}, expected 0 to {expected.max_rank}"
        )
    shapes = {
        "weight": (int((ranks == 0).sum()), num_classes, dim),
        "left": (int(ranks.sum()), num_classes),
        "right": (int(ranks.sum()), dim),
        "bias": (held, num_classes),
    }
    weight, left, right, bias = (
        _from_wire(
            f"class-gradients.{name}", arrays[name], shape, expected.upload.precision
        )
        for name, shape in shapes.items()
    )
    if len(left):
        largest = left.abs().max().double() * right.abs().max() * expected.max_rank
        if largest > LARGEST_VALUE:
            raise ReplyError(
                "arrays class-gradients.left and class-gradients.right have a product "
                f"that may reach {float(largest):.1e}, expected {LARGEST_VALUE:.0e} at "
                "most"
            )
    dense = iter(weight)
    factors = zip(left.split(ranks.tolist()), right.split(ranks.tolist()), strict=True)
    return {
        c: LowRankGradient(own_left.T, own_right, own_bias)
        if len(own_right)
        else ClassGradient(next(dense), own_bias)
        for c, (own_left, own_right), own_bias in zip(
            classes, factors, bias, strict=True
        )
    }


def _held_classes(array: Array, num_classes: int) -> list[int]:
    name = "class-gradients.classes"
    shape, dtype = _header(name, array)
    if dtype != np.int64 or len(shape) != 1 or shape[0] > num_classes:
        raise ReplyError(
            f"array {name} has type {dtype} and shape {shape}, expected int64 and "
            f"({num_classes},) at most"
        )
    listed: list[int] = _decode(name, array).tolist()
    if len(set(listed)) < len(listed) or not all(0 <= c < num_classes for c in listed):
        raise ReplyError(
            f"class gradients for classes {listed}; they must differ and be from 0 to "
            f"{num_classes - 1}"
        )
    return listed


def _to_wire(tensor: torch.Tensor, precision: Precision) -> Array:
    if precision == "half":
        tensor = tensor.to(torch.bfloat16).view(torch.uint16)
    return Array(tensor.cpu().numpy())


def _from_wire(
    name: str, array: Array, shape: tuple[int, ...], precision: Precision
) -> torch.Tensor:
    dtype = np.uint16 if precision == "half" else np.float32
    tensor = torch.from_numpy(_checked(name, array, shape, dtype))
    if precision == "full":
        return tensor
    values = tensor.view(torch.bfloat16).float()
    _check_values(name, values.numpy())
    return values


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
        values = _checked(name, arrays[name], tuple(sent.shape), sent.dtype)
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


def _checked(
    name: str, array: Array, shape: tuple[int, ...], dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """Return an array that is finite and has this shape and type."""
    wanted = np.dtype(dtype)
    found_shape, found = _header(name, array)
    if found_shape != shape:
        raise ReplyError(f"array {name} has shape {found_shape}, expected {shape}")
    if found != wanted:
        raise ReplyError(f"array {name} has type {found}, expected {wanted}")
    decoded = _decode(name, array)
    _check_values(name, decoded)
    return decoded


def _check_values(name: str, values: npt.NDArray[Any]) -> None:
    if not np.isfinite(values).all():
        raise NotFiniteError(f"array {name} has values that are not finite")
    if values.dtype.kind == "f" and np.abs(values).max(initial=0) > LARGEST_VALUE:
        raise NotFiniteError(
            f"array {name} has values up to {float(np.abs(values).max()):.1e}, "
            f"expected {LARGEST_VALUE:.0e} at most"
        )


def _header(name: str, array: Array) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type as the array's bytes have them, and numpy will make it.

    Read first, so that no memory is taken for what is not expected anyway.
    """
    stream = io.BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"format version is {version}, expected (1, 0)")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    # A sender may put any bytes here, and numpy answers them with many exceptions.
    except Exception as error:
        raise _undecodable(name, error) from None
    return shape, dtype


def _decode(name: str, array: Array) -> npt.NDArray[Any]:
    try:
        values = array.numpy()
    except Exception as error:
        raise _undecodable(name, error) from None
    # Numpy passes over what follows the values, of whatever size.
    surplus = len(array.data) - values.nbytes
    if surplus > LONGEST_HEADER:
        raise ReplyError(f"array {name} has {surplus} bytes besides its values")
    return values


def _undecodable(name: str, error: Exception) -> ReplyError:
    return ReplyError(f"array {name} cannot be decoded ({error})")


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
    raise ReplyError(
        f"its answer names no site ({shown_name(name)}); expected {NAME_RULE}"
    )


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


def partition_of(reply: Message) -> int:
    """Return which simulated partition a reply that has been checked comes from."""
    return cast(int, reply.content.metric_records[METRICS][PARTITION])


def images_of(reply: Message) -> int:
    """Return the training images that a reply that has been checked claims."""
    return cast(int, reply.content.metric_records[METRICS][NUM_EXAMPLES])


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


def payload_bytes(content: RecordDict) -> int:
    """Return the size of a message's arrays in bytes: what is worth counting."""
    return sum(map(_record_bytes, content.array_records.values()))


def message_bytes(content: RecordDict) -> int:
    """Return the size of all that a message carries, in bytes; numbers count eight."""
    values = [
        *(v for record in content.config_records.values() for v in record.values()),
        *(v for record in content.metric_records.values() for v in record.values()),
    ]
    parts = [p for v in values for p in (v if isinstance(v, list) else [v])]
    return payload_bytes(content) + sum(
        len(part) if isinstance(part, str | bytes) else 8 for part in parts
    )


def gradient_bytes(content: RecordDict) -> int:
    """Return the size of the class gradients among a reply's arrays, in bytes."""
    return _record_bytes(content.array_records.get(GRADIENTS, ArrayRecord()))


def _record_bytes(record: ArrayRecord) -> int:
    return sum(len(array.data) for array in record.values())
