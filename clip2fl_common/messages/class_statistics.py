"""Class statistics in a reply: count, mean and covariance of each class's features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from clip2fl_common.config import RunConfig
from clip2fl_common.messages.arrays import ReplyError, checked
from clip2fl_common.messages.class_gradients import held_classes
from clip2fl_common.messages.names import CLASS_STATISTICS
from clip2fl_common.models import narrow_width

# A client rounds covariances to float32 before it sends them.
ROUNDING = 1.001
SMALLEST_COVARIANCE = 1e-12


@dataclass(frozen=True)
class ClassStatistics:
    """Count, mean and covariance of features, one row for each of K classes.

    Attributes
    ----------
    classes : Tensor of int64, shape [K]
        The classes.
    counts : Tensor of int64, shape [K]
        Number of images of each class, at least 1.
    means : Tensor, shape [K, D]
        Mean feature of each class.
    covariances : Tensor, shape [K, D (D + 1) / 2]
        Upper triangle of each class's unbiased covariance, row after row; zero for a
        class with one image.
    """

    classes: torch.Tensor
    counts: torch.Tensor
    means: torch.Tensor
    covariances: torch.Tensor

    @property
    def images(self) -> int:
        """Return the number of images of all classes together."""
        return sum(self.counts.tolist())

    def feature_scale(self) -> float:
        """Return the largest root mean square norm of a class's features; or 0.

        The mean square of a norm is the squared norm of the mean plus the trace of the
        covariance.
        """
        variances = self.covariances[:, diagonal(self.means.shape[1])].double()
        squares = self.means.double().square().sum(1) + variances.sum(1)
        return float(squares.amax().sqrt()) if len(squares) else 0.0


@dataclass(frozen=True)
class StatisticsFormat:
    """The format that the server expects of class statistics.

    Attributes
    ----------
    num_classes : int
        Number of classes C.
    width : int
        Width D of the features: the narrower of the pooled and the projected ones.
    """

    num_classes: int
    width: int

    @property
    def name(self) -> str:
        """Return the name of the record in a reply."""
        return CLASS_STATISTICS

    @classmethod
    def of(cls, config: RunConfig, num_classes: int) -> Self:
        """Return the format of a run."""
        model = config.model
        return cls(num_classes, narrow_width(model.name, model.feature_dim))

    @property
    def class_bytes(self) -> int:
        """Return the bytes of one class: two int64 numbers, and float32 moments."""
        return 2 * 8 + 4 * (self.width + triangle_size(self.width))

    def encode(self, statistics: ClassStatistics) -> ArrayRecord:
        """Return a client's statistics as arrays, moments rounded to float32."""
        return ArrayRecord(
            {
                "classes": Array(statistics.classes.cpu().numpy()),
                "counts": Array(statistics.counts.cpu().numpy()),
                "means": Array(statistics.means.float().cpu().numpy()),
                "covariances": Array(statistics.covariances.float().cpu().numpy()),
            }
        )

    def decode(self, arrays: ArrayRecord) -> ClassStatistics:
        """Return the statistics of a reply after checking them.

        Raises
        ------
        ReplyError
            If names, shapes, types, classes or values are not as expected, or if a
            covariance is larger than its two variances allow.
        """
        names = {"classes", "counts", "means", "covariances"}
        if set(arrays) != names:
            raise ReplyError(
                f"{self.name} has the arrays {sorted(arrays)}, expected {sorted(names)}"
            )
        classes = held_classes(self.name, arrays["classes"], self.num_classes)
        held = len(classes)
        counts = checked(f"{self.name}.counts", arrays["counts"], (held,), np.int64)
        if held and counts.min() < 1:
            raise ReplyError(
                f"array {self.name}.counts has values from {counts.min()}, expected 1 "
                "or more"
            )
        shapes = {
            "means": (held, self.width),
            "covariances": (held, triangle_size(self.width)),
        }
        means, covariances = (
            torch.from_numpy(
                checked(f"{self.name}.{name}", arrays[name], shape, np.float32).copy()
            )
            for name, shape in shapes.items()
        )
        self._check_covariances(covariances)
        return ClassStatistics(
            torch.tensor(classes, dtype=torch.int64),
            torch.from_numpy(counts.copy()),
            means,
            covariances,
        )

    def _check_covariances(self, covariances: torch.Tensor) -> None:
        """Check variances, and covariances by the inequality of Cauchy and Schwarz.

        Raises
        ------
        ReplyError
            If one is impossible.
        """
        rows, columns = torch.triu_indices(self.width, self.width)
        for covariance in covariances:  # all at once would take twice the memory
            variances = covariance[diagonal(self.width)]
            if variances.min() < 0:
                raise ReplyError(f"{self.name}.covariances has negative variances")
            deviations = variances.double().sqrt()
            bound = deviations[rows] * deviations[columns]
            if (covariance.abs() > ROUNDING * bound + SMALLEST_COVARIANCE).any():
                raise ReplyError(
                    f"{self.name}.covariances has values that are larger than their "
                    "variances allow"
                )


def triangle_size(width: int) -> int:
    """Return the number of values in the upper triangle of a [D, D] matrix."""
    return width * (width + 1) // 2


def diagonal(width: int) -> torch.Tensor:
    """Return the places of the diagonal in a [D, D] matrix's upper triangle."""
    rows, columns = torch.triu_indices(width, width)
    return torch.nonzero(rows == columns).flatten()


def upper_triangle(matrix: torch.Tensor) -> torch.Tensor:
    """Return the upper triangle [D (D + 1) / 2] of a matrix [D, D], row after row."""
    rows, columns = torch.triu_indices(*matrix.shape, device=matrix.device)
    return matrix[rows, columns]


def symmetric(triangle: torch.Tensor, width: int) -> torch.Tensor:
    """Return the symmetric matrix [D, D] whose upper triangle this is."""
    rows, columns = torch.triu_indices(width, width, device=triangle.device)
    matrix = triangle.new_empty(width, width)
    matrix[rows, columns] = triangle
    matrix[columns, rows] = triangle
    return matrix
