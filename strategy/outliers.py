"""Detect updates and class gradients that are too large for honest training.

A single client whose weights are all a million passes every check of format, and then
spoils the average for all clients. The norm of its update gives it away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import median_low

import numpy as np
import torch

from clip2fl_common.class_gradients import CodedGradient
from clip2fl_common.class_moments import ClassMoments
from clip2fl_common.messages import RUNNING_STATISTICS
from strategy.robust import Arrays, weight_norm

# Number of rounds whose typical norm is kept.
REMEMBERED = 5
# With this many values or more, the median outvotes one liar.
QUORUM = 3
# An update grows with the square root of the number of steps, as a random walk does. A
# client that claims more images may send an update longer by this factor at most.
LARGEST_ALLOWANCE = 10.0
# BatchNorm's statistics move further than weights do, and by more unequal steps.
STATISTICS_FACTOR = 10.0
# A row of softmax minus one-hot has at most this norm. So has a mean of such rows.
LARGEST_RESIDUAL = sqrt(2)
# Allows for rounding: uploads in half precision (bfloat16) keep eight bits.
ROUNDING = 1.02
# Error of sums that were sent in float32, relative to the largest entry.
SUM_ROUNDING = 1e-4

# Names of the entries in the strategy's state.
TYPICAL = "typical-lengths"
TYPICAL_FEATURES = "typical-features"


@dataclass(frozen=True)
class ReplySize:
    """Norms of one client's reply.

    Attributes
    ----------
    images : int
        Number of training images that the client claims.
    update : float
        Euclidean norm of local minus global weights and biases.
    statistics : float
        Euclidean norm of BatchNorm's running means and variances.
    features : float or None
        Norm of the client's features, estimated from its class gradients (see
        `feature_scale`) or computed from its class statistics; None without them.
    """

    images: int
    update: float
    statistics: float
    features: float | None = None


def reply_size(
    local: Arrays, sent: Arrays, images: int, features: float | None = None
) -> ReplySize:
    """Return the norms of a client's reply.

    Parameters
    ----------
    local, sent : mapping of str to ndarray
        The client's model and the model it began with; same names and shapes.
    images : int
        Number of training images that the client claims.
    features : float or None
        See `ReplySize`.

    Returns
    -------
    ReplySize
    """
    weights = [name for name in sent if not name.endswith(RUNNING_STATISTICS)]
    statistics = [name for name in sent if name.endswith(RUNNING_STATISTICS)]
    return ReplySize(
        images,
        _norm([local[name].astype(np.float64) - sent[name] for name in weights]),
        _norm([local[name] for name in statistics]),
        features,
    )


def feature_scale(gradients: Mapping[int, CodedGradient]) -> float:
    """Return the norm of a client's features, estimated from its class gradients.

    A class gradient is ``P^T f / n``, and P's mean row is its bias part. So the norm
    of the weight part is at most the norm of the bias part times the longest feature.
    Their ratio hardly differs between classes that the model knows well or badly,
    unlike the gradients themselves.

    Parameters
    ----------
    gradients : mapping of int to ClassGradient or LowRankGradient
        The client's class gradients, without noise.

    Returns
    -------
    float
        The largest ratio of the two norms; 0 if all gradients are zero.
    """
    ratios = [0.0]
    for gradient in gradients.values():
        weight, bias = weight_norm(gradient), float(gradient.bias.double().norm())
        if weight > 0:
            ratios.append(weight / bias if bias > 0 else np.inf)
    return max(ratios)


def impossible_gradient(gradients: Mapping[int, CodedGradient]) -> str:
    """Return why class gradients cannot come from any features, or an empty string.

    Parameters
    ----------
    gradients : mapping of int to ClassGradient or LowRankGradient
        The client's class gradients, without noise.

    Returns
    -------
    str
        Empty if they are possible.
    """
    for c, gradient in gradients.items():
        norm = float(gradient.bias.double().norm())
        if norm > LARGEST_RESIDUAL * ROUNDING:
            return (
                f"the bias gradient of class {c} has the norm {norm:.3g}, and softmax "
                f"minus one-hot has {LARGEST_RESIDUAL:.3g} at most"
            )
    return ""


def impossible_moments(moments: ClassMoments, images: int) -> str:
    """Return why no images have these class moments, or an empty string.

    Parameters
    ----------
    moments : ClassMoments
        A client's moments, without noise.
    images : int
        Number of training images that the client claims.

    Returns
    -------
    str
        Empty if some images have them. Counts need not be integers.
    """
    count, total, scatter = moments.count, moments.total, moments.scatter
    if count.min() < 0 or count.sum() > images * ROUNDING:
        return (
            f"class moments count {float(count.sum()):.6g} images, the least of a "
            f"class {float(count.min()):.3g}, and the client has {images}"
        )
    largest = float(scatter.abs().max())
    if (scatter - scatter.T).abs().max() > SUM_ROUNDING * largest:
        return "the scatter of the class moments is not symmetric"
    held = count > 0
    if total[~held].any():
        return "class moments have a sum for a class without images"
    if not held.any() and scatter.any():
        return "class moments have a scatter without images"
    means = total[held] / count[held, None]
    within = scatter - total[held].T @ means
    # Rounding in float32 is relative to the scatter, from which the means' part is
    # taken away. The check also bounds the means: |s_c|^2 <= n_c trace(Q).
    least = float(torch.linalg.eigvalsh((within + within.T) / 2).min())
    if not least >= -SUM_ROUNDING * float(scatter.trace()):
        return "the scatter of the class moments is smaller than that of its means"
    return ""


def statistic_length(moments: ClassMoments) -> float:
    """Return a norm of a client's features: root mean square, or the longest mean."""
    held = moments.count > 0
    if not held.any():
        return 0.0
    means = moments.total[held].norm(dim=1) / moments.count[held]
    square = float(moments.scatter.trace() / moments.count.sum())
    return max(sqrt(max(square, 0.0)), float(means.max()))


class LengthRule:
    """Drop replies that are many times longer than the round's median.

    A bound on the norm is a common defence (Sun et al. 2019), but somebody has to
    guess the bound. Here it is ``ratio`` times the median of the round's norms and the
    medians of the last rounds, which a minority of clients cannot move far. In the
    demo and on real photographs (Dirichlet 0.1 and 0.5), honest updates are at most 3.4
    times the median, so the default ratio of 10 keeps them. A client with n times the
    median number of images may send an update sqrt(n) times longer.

    With fewer than `QUORUM` norms to compare there is no majority. Then an update must
    not be longer than ``ratio`` times the global model itself, and features not longer
    than ``ratio`` times those of the last rounds, if there are any.

    Parameters
    ----------
    ratio : float
        Above 1, or 0 to turn the rule off.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self._typical: list[float] = []
        self._features: list[float] = []

    def state(self) -> dict[str, torch.Tensor]:
        """Return the typical norms of the last rounds by name."""
        return {
            TYPICAL: torch.tensor(self._typical, dtype=torch.float64),
            TYPICAL_FEATURES: torch.tensor(self._features, dtype=torch.float64),
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore a state that `state` returned."""
        self._typical = state[TYPICAL].tolist()
        # A checkpoint of an earlier release has none.
        self._features = state.get(TYPICAL_FEATURES, torch.empty(0)).tolist()

    def too_long(self, sizes: Mapping[int, ReplySize], sent: Arrays) -> dict[int, str]:
        """Return the clients whose replies must be dropped, and the reasons.

        Parameters
        ----------
        sizes : mapping of int to ReplySize
            Norms of the round's replies that are good in all other respects.
        sent : mapping of str to ndarray
            The global model that was sent.

        Returns
        -------
        dict of int to str
            Reasons, by client.
        """
        if self.ratio == 0 or not sizes:
            return {}
        model = reply_size(sent, {n: np.zeros_like(a) for n, a in sent.items()}, 0)
        images = median_low([size.images for size in sizes.values()])
        moved = [size.update for size in sizes.values() if size.update > 0]
        lengths = moved + self._typical
        typical = median_low(lengths) if len(lengths) >= QUORUM else model.update
        statistics = max(
            model.statistics, median_low([s.statistics for s in sizes.values()])
        )
        scales = [s.features for s in sizes.values() if s.features]
        kept = self._features or [0.0]
        features = median_low(scales if len(scales) >= QUORUM else kept)
        reasons: dict[int, str] = {}
        for client, size in sizes.items():
            allowance = min(LARGEST_ALLOWANCE, max(1.0, sqrt(size.images / images)))
            bounds = {
                "update has": (size.update, allowance * typical),
                "BatchNorm statistics have": (
                    size.statistics,
                    STATISTICS_FACTOR * statistics,
                ),
                "class gradients or statistics imply features with": (
                    size.features,
                    features,
                ),
            }
            for what, (found, usual) in bounds.items():
                if found is not None and usual > 0 and found > self.ratio * usual:
                    reasons[client] = (
                        f"its {what} the norm {found:.3g}, and "
                        f"aggregation.max-length-ratio = {self.ratio:g} allows "
                        f"{self.ratio * usual:.3g} in this round"
                    )
                    break
        return reasons

    def remember(self, sizes: Sequence[ReplySize]) -> None:
        """Add the norms of the used replies to those kept for the next rounds.

        Parameters
        ----------
        sizes : sequence of ReplySize
            At least one.
        """
        typical = median_low([size.update for size in sizes])
        if typical > 0 and isfinite(typical):
            self._typical = [*self._typical, typical][-REMEMBERED:]
        scales = [s.features for s in sizes if s.features and isfinite(s.features)]
        if scales:
            self._features = [*self._features, median_low(scales)][-REMEMBERED:]


def _norm(arrays: Sequence[np.ndarray]) -> float:
    return sqrt(sum(float(np.square(a, dtype=np.float64).sum()) for a in arrays))
