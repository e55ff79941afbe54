"""Class gradients in a reply: stacked arrays, with dense and low-rank ones apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord

from clip2fl_common.class_gradients import (
    ClassGradient,
    CodedGradient,
    LowRankGradient,
    Precision,
    max_rank,
)
from clip2fl_common.config import RunConfig, Upload
from clip2fl_common.messages.arrays import (
    ReplyError,
    check_values,
    checked,
    decode,
    read_header,
)
from clip2fl_common.messages.names import GRADIENTS, LARGEST_VALUE

# Largest error of the scalar products of a factor's rows, which half precision rounds.
ORTHONORMAL_ERROR = 0.05

WireArray = npt.NDArray[np.float32] | npt.NDArray[np.uint16]
_WIRE: dict[Precision, type[np.float32] | type[np.uint16]] = {
    "half": np.uint16,
    "full": np.float32,
}


@dataclass(frozen=True)
class GradientFormat:
    """The format that the server expects of uploaded class gradients.

    Attributes
    ----------
    num_classes, feature_dim : int
        C and d of the server's classifier.
    upload : Upload
        The run's settings of uploads, which clients have too.
    """

    num_classes: int
    feature_dim: int
    upload: Upload

    @property
    def max_rank(self) -> int:
        """Return the largest low-rank rank; other gradients must be dense."""
        if self.upload.min_cosine == 1:
            return 0
        return max_rank(self.num_classes, self.feature_dim)

    @property
    def name(self) -> str:
        """Return the name of the record in a reply."""
        return GRADIENTS

    @classmethod
    def of(cls, config: RunConfig, num_classes: int) -> Self:
        """Return the format of a run."""
        return cls(num_classes, config.model.feature_dim, config.upload)

    def encode(self, gradients: Mapping[int, CodedGradient]) -> ArrayRecord:
        """Return a client's class gradients as arrays."""
        shape = (self.num_classes, self.feature_dim)
        return gradients_to_arrays(gradients, self.upload.precision, shape)

    def decode(self, arrays: ArrayRecord) -> ClassGradients:
        """Return checked class gradients from arrays (see `gradients_from_arrays`)."""
        return gradients_from_arrays(arrays, self)


def gradients_to_arrays(
    gradients: Mapping[int, CodedGradient],
    precision: Precision,
    shape: tuple[int, int] | None = None,
) -> ArrayRecord:
    """Return class gradients as stacked arrays, with dense and low-rank ones apart.

    Of K classes, D are dense; the ranks of the others add up to R. Numpy has no
    bfloat16, so in half precision the last four arrays are uint16 with its bits.

    Parameters
    ----------
    gradients : mapping of int to ClassGradient or LowRankGradient
        Any number of classes.
    precision : {"half", "full"}
        Precision of the values.
    shape : tuple of int or None
        C and d; required if there may be no class.

    Returns
    -------
    ArrayRecord
        ``classes`` [K] and ``ranks`` [K] int64 (rank 0 means dense); ``weight``
        [D, C, d] of the dense classes; ``left`` [R, C] and ``right`` [R, d] of the
        others; ``bias`` [K, C]. The last four are float32 or uint16.
    """
    classes = sorted(gradients)
    ordered = [gradients[c] for c in classes]
    dense = [g for g in ordered if isinstance(g, ClassGradient)]
    low_rank = [g for g in ordered if isinstance(g, LowRankGradient)]
    num_classes, dim = shape or _gradient_shape(ordered[0])
    nothing = ordered[0].bias.new_empty(0) if ordered else torch.empty(0)
    # An empty first part gives the right shape if there is no class of the kind.
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


class ClassGradients(Mapping[int, CodedGradient]):
    """The class gradients of one reply, checked and decoded once.

    The arrays share the memory of the message. A class is converted to float32 when it
    is read, so that a round never holds all classes of all clients in float32.

    Parameters
    ----------
    classes : sequence of int
        The K classes held, in the order of the arrays.
    ranks : ndarray of int64, shape [K]
        Rank of each class; 0 means dense.
    weight, left, right, bias : ndarray of float32 or uint16
        The arrays of `gradients_to_arrays`.
    """

    def __init__(
        self,
        classes: Sequence[int],
        ranks: npt.NDArray[np.int64],
        weight: WireArray,
        left: WireArray,
        right: WireArray,
        bias: WireArray,
    ) -> None:
        self._weight, self._left, self._right, self._bias = weight, left, right, bias
        ends = ranks.cumsum().tolist()
        dense = (ranks == 0).cumsum().tolist()
        # By class: position, rows of the factors, position among the dense gradients.
        self._places = {
            c: (k, slice(ends[k] - int(ranks[k]), ends[k]), dense[k] - 1)
            for k, c in enumerate(classes)
        }

    def __getitem__(self, c: int) -> CodedGradient:
        """Return one class's gradient in float32."""
        place, rows, dense = self._places[c]
        bias = _to_float(self._bias[place])
        if rows.start == rows.stop:
            return ClassGradient(_to_float(self._weight[dense]), bias)
        left, right = _to_float(self._left[rows]), _to_float(self._right[rows])
        return LowRankGradient(left.T, right, bias)

    def __iter__(self) -> Iterator[int]:
        """Return an iterator over the classes, in the order of the reply."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return the number of classes K."""
        return len(self._places)


def gradients_from_arrays(
    arrays: ArrayRecord, expected: GradientFormat
) -> ClassGradients:
    """Return the class gradients of a reply after checking them.

    Parameters
    ----------
    arrays : ArrayRecord
        The record of `gradients_to_arrays`.
    expected : GradientFormat
        The format that the server asked for.

    Returns
    -------
    ClassGradients
        ClassGradient or LowRankGradient by class, in float32.

    Raises
    ------
    ReplyError
        If keys, shapes, types, classes, ranks or values are not as expected.
    """
    names = {"classes", "ranks", "weight", "left", "right", "bias"}
    if set(arrays) != names:
        raise ReplyError(
            f"class gradients have the arrays {sorted(arrays)}, expected "
            f"{sorted(names)}"
        )
    num_classes, dim = expected.num_classes, expected.feature_dim
    classes = held_classes("class-gradients", arrays["classes"], num_classes)
    held = len(classes)
    ranks = checked("class-gradients.ranks", arrays["ranks"], (held,), np.int64)
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
        largest = _to_float(left).abs().max().double() * _to_float(right).abs().max()
        largest *= expected.max_rank
        if largest > LARGEST_VALUE:
            raise ReplyError(
                "arrays class-gradients.left and class-gradients.right have a product "
                f"that may reach {float(largest):.1e}, expected {LARGEST_VALUE:.0e} at "
                "most"
            )
    ends = ranks.cumsum().tolist()
    for c, end, rank in zip(classes, ends, ranks.tolist(), strict=True):
        _check_orthonormal(c, _to_float(right[end - rank : end]))
    return ClassGradients(classes, ranks, weight, left, right, bias)


def _check_orthonormal(c: int, right: torch.Tensor) -> None:
    """Refuse factors [r, d] that the client's code does not make.

    Huge factors whose product cancels would pass every check of its norm, and the
    honest values would be lost where they are added to it in float32.
    """
    error = right @ right.T - torch.eye(len(right))
    if len(right) and not error.abs().max() <= ORTHONORMAL_ERROR:
        raise ReplyError(
            f"array class-gradients.right: the rows of class {c} are not orthonormal, "
            f"their scalar products are wrong by up to {float(error.abs().max()):.2g}"
        )


def held_classes(record: str, array: Array, num_classes: int) -> list[int]:
    """Return the classes that a client lists after checking them.

    Parameters
    ----------
    record : str
        Name of the record in errors.
    array : Array
        The array that arrived.
    num_classes : int
        Number of classes C.

    Returns
    -------
    list of int
        Different classes, in the order of the array.

    Raises
    ------
    ReplyError
        If type or shape are not as expected, or a class is out of range or repeated.
    """
    name = f"{record}.classes"
    header = read_header(name, array)
    shape = header.shape
    if header.dtype != np.int64 or len(shape) != 1 or shape[0] > num_classes:
        raise ReplyError(
            f"array {name} has type {header.dtype} and shape {shape}, expected int64 "
            f"and ({num_classes},) at most"
        )
    listed: list[int] = decode(name, array, header).tolist()
    if len(set(listed)) < len(listed) or not all(0 <= c < num_classes for c in listed):
        raise ReplyError(
            f"{record.replace('-', ' ')} for classes {listed}; they must differ and be "
            f"from 0 to {num_classes - 1}"
        )
    return listed


def _to_wire(tensor: torch.Tensor, precision: Precision) -> Array:
    if precision == "half":
        tensor = tensor.to(torch.bfloat16).view(torch.uint16)
    return Array(tensor.cpu().numpy())


def _from_wire(
    name: str, array: Array, shape: tuple[int, ...], precision: Precision
) -> WireArray:
    """Return the received values after checking them."""
    values = checked(name, array, shape, _WIRE[precision])
    if precision == "half":
        for part in values:  # checking all at once would take twice the memory
            check_values(name, _to_float(part).numpy())
    return values


def _to_float(values: WireArray) -> torch.Tensor:
    """Return received values in float32, in new memory."""
    tensor = torch.from_numpy(values.copy())
    if tensor.dtype == torch.uint16:
        return tensor.view(torch.bfloat16).float()
    return tensor
