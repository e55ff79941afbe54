"""Compress class gradients: rounded values, and a product of two thin factors.

A class gradient G [C, d] comes from the features of one class, which resemble each
other, so few directions span nearly all of its rows. Gradient matching at the server
(CReFF Eq. 6) compares rows by their cosine. Hence the error bound is on the cosine of
the worst row, and all rows have equal weight in the search for directions. Let M be the
rows of G at unit length and V_r the r leading right-singular vectors of M. Row j of
G V_r V_r^T then has the cosine ``|M_j V_r|`` with row j of G, for every r.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from clip2fl_common.choices import Precision as Precision
from clip2fl_common.parallel import map_pieces

ITEM_BYTES: dict[Precision, int] = {"half": 2, "full": 4}

# A row with a smaller norm counts as zero. float32 has few digits left there, and
# gradient matching, which adds 1e-6 to each product of norms, cannot see the row.
NEGLIGIBLE_NORM = 1e-35

# Columns of the first sketch; each further sketch has twice as many.
SKETCH_COLUMNS = 16
POWER_ITERATIONS = 2


def gradient_sensitivity(
    max_norm: float, min_class_samples: int, samples_per_class: int
) -> float:
    """Return the most that one image changes a class gradient, for its noise.

    A class gradient is the mean over the draws. Each draw has ``n`` images: all images
    of a small class, or ``samples_per_class`` of a larger one. In the worst case an
    image is part of every draw. Replacing it then changes the mean by
    ``2 * max_norm / n``.

    Parameters
    ----------
    max_norm : float
        Norm to which an image's part is clipped.
    min_class_samples : int
        Fewest images of a class that is sent.
    samples_per_class : int
        Most images of a class in one draw.
    """
    return 2 * max_norm / min(min_class_samples, samples_per_class)


class ClassGradient(NamedTuple):
    """Gradient of a linear classifier's mean cross-entropy over one class.

    Attributes
    ----------
    weight : Tensor, shape [C, d]
        Gradient with respect to the classifier's weight.
    bias : Tensor, shape [C]
        Gradient with respect to the classifier's bias.
    """

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class LowRankGradient:
    """A class gradient whose weight is stored as a product of two factors.

    It has the weight and bias of a `ClassGradient`, and can be used in its place.

    Attributes
    ----------
    left : Tensor, shape [C, r]
        Coordinates of each row, scaled by its norm.
    right : Tensor, shape [r, d]
        The directions of the coordinates.
    bias : Tensor, shape [C]
        Gradient with respect to the classifier's bias.
    """

    left: torch.Tensor
    right: torch.Tensor
    bias: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """Return the gradient of the classifier's weight, computed, shape [C, d]."""
        return self.left @ self.right

    @property
    def rank(self) -> int:
        """Return the number of directions r."""
        return len(self.right)


CodedGradient = ClassGradient | LowRankGradient


def max_rank(num_classes: int, feature_dim: int) -> int:
    """Return the largest rank whose factors are smaller than the dense [C, d]."""
    return (num_classes * feature_dim - 1) // (num_classes + feature_dim)


def to_precision(tensor: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Round float32 values to the uploaded precision (half means bfloat16)."""
    if precision == "full":
        return tensor
    return tensor.to(torch.bfloat16).to(tensor.dtype)


def encode_gradients(
    gradients: Mapping[int, ClassGradient], *, min_cosine: float, precision: Precision
) -> dict[int, CodedGradient]:
    """Return class gradients as a server will decode them.

    Parameters
    ----------
    gradients : mapping of int to ClassGradient
        Weight [C, d] and bias [C], float32, of any number of classes.
    min_cosine : float
        Smallest cosine, in (0, 1], of any weight row with its decoded row. At 1 all
        gradients stay dense. Below 1, each gets the smallest rank that keeps the bound,
        or stays dense if factors would not be smaller.
    precision : {"half", "full"}
        Precision of all values.

    Returns
    -------
    dict of int to ClassGradient or LowRankGradient
        In the same order, with values rounded to the precision.
    """
    if not gradients:
        return {}
    coded = map_pieces(
        lambda gradient: _encode(gradient, min_cosine, precision),
        gradients.values(),
        next(iter(gradients.values())).weight.device,
    )
    return dict(zip(gradients, coded, strict=True))


def encoded_bytes(gradients: Iterable[CodedGradient], precision: Precision) -> int:
    """Return the size of encoded gradients, with class and rank as int64, in bytes."""
    return sum(
        2 * 8
        + ITEM_BYTES[precision]
        * sum(
            tensor.numel()
            for tensor in (
                gradient
                if isinstance(gradient, ClassGradient)
                else (gradient.left, gradient.right, gradient.bias)
            )
        )
        for gradient in gradients
    )


def row_cosines(exact: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """Return the cosine of each row with its decoded row, without zero rows.

    Parameters
    ----------
    exact, decoded : Tensor, shape [C, d]
        A weight gradient before and after coding.

    Returns
    -------
    Tensor, shape [rows of `exact` that are not negligible]
    """
    unit, norms = _unit_rows(exact)
    return _cosines(unit, decoded)[norms > 0]


def _encode(
    gradient: ClassGradient, min_cosine: float, precision: Precision
) -> CodedGradient:
    bias = to_precision(gradient.bias, precision)
    # An SVD fails on values that are not finite; the server refuses them with a reason.
    if min_cosine < 1 and bool(torch.isfinite(gradient.weight).all()):
        factors = _factors(gradient.weight, min_cosine, precision)
        if factors is not None:
            return LowRankGradient(*factors, bias)
    return ClassGradient(to_precision(gradient.weight, precision), bias)


def _factors(
    weight: torch.Tensor, min_cosine: float, precision: Precision
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return rounded factors [C, r] and [r, d] of the smallest rank r, or None."""
    unit, norms = _unit_rows(weight)
    counted = norms > 0
    for directions, trusted in _leading_directions(unit):
        largest = min(trusted, max_rank(*weight.shape))
        coordinates = unit @ directions.T
        squared = coordinates.square().cumsum(1)
        worst = squared.masked_fill(~counted[:, None], 1.0).amin(0)
        rank = 1 + int((worst < min_cosine**2).sum())
        scaled = norms[:, None] * coordinates
        step = 1
        # Rounding may break the bound by a little, so the cosines are measured. The
        # rank steps double, since no rank can beat the precision itself.
        while rank <= largest:
            left = to_precision(scaled[:, :rank], precision)
            right = to_precision(directions[:rank], precision)
            if bool((_cosines(unit, left @ right)[counted] >= min_cosine).all()):
                return left, right
            rank += step
            step *= 2
    return None


def _cosines(unit: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    return (unit * _unit_rows(decoded)[0]).sum(1)


def _unit_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of unit length [C, d] and norms [C]; negligible rows are zero."""
    tiny = torch.finfo(matrix.dtype).tiny
    # Scale first: squares of very small or large values leave float32's range.
    largest = matrix.abs().amax(1)
    scaled = matrix / largest.clamp_min(tiny)[:, None]
    lengths = scaled.norm(dim=1)
    norms = largest * lengths
    norms[norms < NEGLIGIBLE_NORM] = 0
    unit = scaled / lengths.clamp_min(tiny)[:, None]
    unit[norms == 0] = 0
    return unit, norms


def _leading_directions(unit: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield leading right-singular vectors [q, d], with q growing at each step.

    A randomised range finder with power iterations (Halko, Martinsson and Tropp 2011,
    Alg. 4.4) is cheap if few directions are needed. The leading half of its vectors
    is reliable. The last vectors come from a full SVD.

    Yields
    ------
    tuple of Tensor and int
        The vectors, and the number of reliable ones.
    """
    # Its own generator: equal gradients get equal codes, whatever was drawn before.
    generator = torch.Generator().manual_seed(0)
    columns = SKETCH_COLUMNS
    while 4 * columns <= min(unit.shape):
        basis = torch.randn(unit.shape[1], columns, generator=generator).to(unit)
        for _ in range(POWER_ITERATIONS):
            basis = torch.linalg.qr(unit.T @ (unit @ basis)).Q
        rotation = torch.linalg.svd(unit @ basis, full_matrices=False).Vh
        yield rotation @ basis.T, columns // 2
        columns *= 2
    directions = torch.linalg.svd(unit, full_matrices=False).Vh
    yield directions, len(directions)
