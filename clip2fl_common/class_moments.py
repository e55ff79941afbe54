"""Class moments: sums over a client's images that determine a linear discriminant.

With z_i [w] the statistic of image i (see `moment_width`) and y_i its class, they are

    n_c = number of images of class c,    s_c = sum of z_i over class c,
    Q = sum of z_i z_i^T over all images.

They are plain sums of fixed shape: the moments of two sets of images are the sum of the
sets' moments, and a class without images has zeros.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch.nn import functional

from clip2fl_common.config import RunConfig
from clip2fl_common.models import narrow_width

# Largest change of (n / 2, s / B, Q / B^2) if an image is replaced, for statistics no
# longer than B. Let u and v be the two images' z / B, and p = u.v. The squared change
# of Q / B^2 is |u|^4 + |v|^4 - 2 p^2. Within a class, that of s / B is
# |u|^2 + |v|^2 - 2p; with -2p - 2p^2 <= 1/2, both together are at most 4.5. Between two
# classes it is |u|^2 + |v|^2, and that of n / 2 is 2 / 4: at most 4.5 as well.
SENSITIVITY = math.sqrt(4.5)
# Unit of the counts in that vector; both cases then have the same bound.
COUNT_UNIT = 2.0


@dataclass(frozen=True)
class ClassMoments:
    """Counts, sums and scatter of some images' statistics.

    Attributes
    ----------
    count : Tensor, shape [C]
        Images of each class.
    total : Tensor, shape [C, w]
        Sum of the statistics of each class.
    scatter : Tensor, shape [w, w]
        Sum of the statistics' outer products.
    """

    count: torch.Tensor
    total: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def zeros(cls, num_classes: int, width: int) -> Self:
        """Return the moments of no image, in float64."""
        return cls(
            torch.zeros(num_classes, dtype=torch.float64),
            torch.zeros(num_classes, width, dtype=torch.float64),
            torch.zeros(width, width, dtype=torch.float64),
        )

    @classmethod
    def of(cls, statistics: torch.Tensor, labels: torch.Tensor, classes: int) -> Self:
        """Return the moments of images.

        Parameters
        ----------
        statistics : Tensor, shape [N, w]
            Statistics z of the images.
        labels : Tensor of int64, shape [N]
            Their classes.
        classes : int
            Number of classes C.
        """
        values = statistics.double()
        member = functional.one_hot(labels, classes).double()
        return cls(member.sum(0), member.T @ values, values.T @ values)

    def plus(self, other: Self, own_weight: float = 1.0) -> "ClassMoments":
        """Return ``own_weight`` times these moments plus others."""
        return ClassMoments(
            own_weight * self.count + other.count,
            own_weight * self.total + other.total,
            own_weight * self.scatter + other.scatter,
        )

    def named(self) -> dict[str, torch.Tensor]:
        """Return the three tensors by name."""
        return {"count": self.count, "total": self.total, "scatter": self.scatter}


def moment_width(config: RunConfig) -> int:
    """Return the width w of the statistics: pooled output or features, the narrower.

    The features are a linear function of the pooled output. So where the pooled output
    is narrower, a linear classifier on it is one on the features too
    (`strategy.discriminant.on_features`), and takes fewer numbers. Where the features
    are narrower, the delivered classifier sees only them.
    """
    return narrow_width(config.model.name, config.model.feature_dim)


def shorten_rows(statistics: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Return the rows, the longer ones scaled to a norm; 0 leaves all as they are.

    With a norm, a row that is not finite becomes zero: no noise can hide a NaN.
    """
    if max_norm == 0:
        return statistics
    norms = statistics.norm(dim=1, keepdim=True)
    shortened = statistics * (max_norm / norms.clamp(min=max_norm))
    return torch.where(norms.isfinite(), shortened, 0)


def noise_deviations(multiplier: float, max_norm: float) -> tuple[float, float, float]:
    """Return the deviations of the noise on counts, sums and scatter.

    Parameters
    ----------
    multiplier : float
        Noise in units of the largest change that one image can cause.
    max_norm : float
        Largest norm B of an image's statistic.

    Returns
    -------
    tuple of float
        Standard deviations of an entry of each; for the scatter before it is made
        symmetric.
    """
    deviation = multiplier * SENSITIVITY
    return COUNT_UNIT * deviation, max_norm * deviation, max_norm**2 * deviation
