"""Class gradients in a reply: stacked arrays, dense and low-rank ones apart."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from clip2fl_common.class_gradients import (
    ClassGradient,
    CodedGradient,
    LowRankGradient,
    Precision,
    max_rank,
)
from clip2fl_common.config import Upload
from clip2fl_common.messages.arrays import (
    ReplyError,
    check_values,
    checked,
    decode,
    header,
)
from clip2fl_common.messages.names import LARGEST_VALUE


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
    shape, dtype = header(name, array)
    if dtype != np.int64 or len(shape) != 1 or shape[0] > num_classes:
        raise ReplyError(
            f"array {name} has type {dtype} and shape {shape}, expected int64 and "
            f"({num_classes},) at most"
        )
    listed: list[int] = decode(name, array).tolist()
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
    tensor = torch.from_numpy(checked(name, array, shape, dtype))
    if precision == "full":
        return tensor
    values = tensor.view(torch.bfloat16).float()
    check_values(name, values.numpy())
    return values
