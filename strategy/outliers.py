"""Updates and class gradients that no honest training brings about, told by their size.

One client whose weights are all a million passes every check of format, and an average
with it is lost for all others. Its length gives it away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import median_low

import numpy as np
import torch

from clip2fl_common.class_gradients import CodedGradient
from clip2fl_common.messages import RUNNING_STATISTICS
from strategy.robust import Arrays, weight_norm

# Rounds whose typical length is remembered.
REMEMBERED = 5
# Values from which on a median outvotes one liar.
QUORUM = 3
# An update grows with the square root of the number of steps, as a random walk does; a
# claim of more images makes room for this many times the length at most.
LARGEST_ALLOWANCE = 10.0
# BatchNorm's statistics move further than weights do, and by more unequal steps.
STATISTICS_FACTOR = 10.0
# A row of softmax minus one-hot has at most this norm, and so has a mean of rows.
LARGEST_RESIDUAL = sqrt(2)
# Uploads of half precision have eight bits.
ROUNDING = 1.02

# Name in a strategy's state.
TYPICAL = "typical-lengths"


@dataclass(frozen=True)
class ReplySize:
    """How large what one client sent is.

    Attributes
    ----------
    images : int
        Training images that it claims.
    update : float
        Euclidean norm of local minus global weights and biases.
    statistics : float
        Norm of BatchNorm's running means and variances.
    features : float or None
        Norm of its features, as far as its class gradients tell (see
        `feature_scale`); None without class gradients.
    """

    images: int
    update: float
    statistics: float
    features: float | None = None


def reply_size(
    local: Arrays, sent: Arrays, images: int, features: float | None = None
) -> ReplySize:
    """Measure a client's model.

    Parameters
    ----------
    local, sent : mapping of str to ndarray
        The client's model and the one it began with; same names and shapes.
    images : int
        Training images that the client claims.
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
    """Return the length of features that some class gradients speak of.

    A class gradient is ``P^T f / n`` with the rows of P for its bias, so that the norm
    of its weight part is at most that of the bias part times the longest feature.
    Unlike the gradients themselves, that hardly differs between classes that the
    model knows well and those it does not.

    Parameters
    ----------
    gradients : mapping of int to ClassGradient or LowRankGradient
        A client's, without noise.

    Returns
    -------
    float
        The greatest ratio of both norms; 0 where all gradients are zero.
    """
    ratios = [0.0]
    for gradient in gradients.values():
        weight, bias = weight_norm(gradient), float(gradient.bias.double().norm())
        if weight > 0:
            ratios.append(weight / bias if bias > 0 else np.inf)
    return max(ratios)


def impossible_gradient(gradients: Mapping[int, CodedGradient]) -> str:
    """Say what about some class gradients no features can bring about, if anything.

    Parameters
    ----------
    gradients : mapping of int to ClassGradient or LowRankGradient
        A client's, without noise.

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


class LengthRule:
    """Drops replies that are many times longer than the round's median.

    Norm bounds are a common defence (Sun et al. 2019) whose bound somebody has to
    guess. Here it is ``ratio`` times the median length of the round's updates and of
    the medians of the last rounds, which a minority cannot move far. Honest updates in
    the demo and on real photographs (Dirichlet 0.1 and 0.5) are 3.4 times the median at
    most, so that the default ratio of 10 leaves them alone; where one client has n
    times the median's images, its update may be longer by the square root of n.

    With fewer than `QUORUM` lengths to compare there is no majority. Then an update
    must not be longer than ``ratio`` times the global model itself.

    Parameters
    ----------
    ratio : float
        Above 1, or 0 for no such rule.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self._typical: list[float] = []

    def state(self) -> dict[str, torch.Tensor]:
        """Return the typical lengths of the last rounds by name."""
        return {TYPICAL: torch.tensor(self._typical, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` returned."""
        self._typical = state[TYPICAL].tolist()

    def too_long(self, sizes: Mapping[int, ReplySize], sent: Arrays) -> dict[int, str]:
        """Return the clients whose replies are to be dropped, and why.

        Parameters
        ----------
        sizes : mapping of int to ReplySize
            Of the round's replies that are otherwise good.
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
        features = median_low(scales) if len(scales) >= QUORUM else 0.0
        reasons: dict[int, str] = {}
        for client, size in sizes.items():
            allowance = min(LARGEST_ALLOWANCE, max(1.0, sqrt(size.images / images)))
            bounds = {
                "update has": (size.update, allowance * typical),
                "BatchNorm statistics have": (
                    size.statistics,
                    STATISTICS_FACTOR * statistics,
                ),
                "class gradients are of features with": (size.features, features),
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
        """Take the lengths of the replies that were used into the next rounds' median.

        Parameters
        ----------
        sizes : sequence of ReplySize
            At least one.
        """
        typical = median_low([size.update for size in sizes])
        if typical > 0 and isfinite(typical):
            self._typical = [*self._typical, typical][-REMEMBERED:]


def _norm(arrays: Sequence[np.ndarray]) -> float:
    return sqrt(sum(float(np.square(a, dtype=np.float64).sum()) for a in arrays))
