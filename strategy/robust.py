"""Combine models or class gradients when some of them may be wrong.

The coordinate-wise median and trimmed mean (Yin et al. 2018) serve models and class
gradients. An update that is too long is shortened, not dropped (norm thresholding, Sun
et al. 2019): honest updates differ in length when the clients' data differ, and a
shortened update keeps its direction and its weight.
"""

import math
from collections.abc import Iterable, Mapping
from logging import INFO, WARNING
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clip2fl_common.class_gradients import ClassGradient, CodedGradient, LowRankGradient
from clip2fl_common.config import Aggregation
from clip2fl_common.updates import bounded_update, update_norm
from strategy.gradient_mean import mean_class_gradients
from strategy.log import log

Arrays = Mapping[str, npt.NDArray[Any]]

# Fewer values have none in the middle.
SMALLEST_TRIMMED = 3


def log_rule(rule: Aggregation, drawn: int) -> None:
    """Log how models are combined; warn if the trimmed mean drops no client.

    Parameters
    ----------
    rule : Aggregation
        The run's settings.
    drawn : int
        Clients in a round.
    """
    log(INFO, "\t├──> Aggregation:")
    log(INFO, "\t│\t├── Rule: %s, trim %g", rule.rule, rule.trim)
    log(
        INFO,
        "\t│\t├── Longest update, in medians of the round (0: any): %g",
        rule.max_length_ratio,
    )
    log(
        INFO,
        "\t│\t└── Norms allowed (0: any): update %g, class gradient %g",
        rule.max_update_norm,
        rule.max_gradient_norm,
    )
    if rule.rule == "trimmed-mean" and _cut(drawn, rule.trim) == 0:
        log(
            WARNING,
            "aggregation.trim = %g of %d clients a round drops no client: this is "
            "the unweighted mean; %s",
            rule.trim,
            drawn,
            "raise it" if drawn >= SMALLEST_TRIMMED else "three clients are needed",
        )


def _cut(values: int, trim: float) -> int:
    """Return how many of the values are dropped at each end.

    Of three and more it is at least one. Otherwise a reply that is missing would let
    the extreme values in.
    """
    least = 1 if trim > 0 and values >= SMALLEST_TRIMMED else 0
    return max(least, int(trim * values))


def trimmed_mean(values: npt.NDArray[Any], trim: float) -> npt.NDArray[Any]:
    """Return the mean along the first axis without the extreme values.

    Parameters
    ----------
    values : ndarray, shape [n, ...]
        One entry per client.
    trim : float
        Share of the n values that is dropped at each end, in [0, 0.5); above 0 at
        least one of three and more.

    Returns
    -------
    ndarray, shape [...]
    """
    cut = _cut(len(values), trim)
    kept = len(values) - cut
    ordered = np.partition(values, (cut, kept - 1), axis=0)
    return np.asarray(np.mean(ordered[cut:kept], axis=0))


def robust_mean(values: npt.NDArray[Any], rule: Aggregation) -> npt.NDArray[Any]:
    """Return the median or the trimmed mean along the first axis, by the rule."""
    if rule.rule == "median":
        return np.asarray(np.median(values, axis=0))
    return trimmed_mean(values, rule.trim)


def shorten_update(
    local: Arrays, reference: Arrays, max_norm: float
) -> dict[str, npt.NDArray[Any]] | None:
    """Return a client's model with its update shortened to a norm.

    Flower's function for this divides by zero if a model is unchanged.

    Parameters
    ----------
    local : mapping of str to ndarray
        The client's model.
    reference : mapping of str to ndarray
        The model that the client began with; same names and shapes.
    max_norm : float
        Largest Euclidean norm of local - reference over all arrays.

    Returns
    -------
    dict of str to ndarray or None
        The model with the shortened update; None if it is short enough already.
    """
    update = bounded_update(local, reference, 0)
    norm = update_norm(update)
    if norm <= max_norm:
        return None
    return {
        name: (reference[name] + u * (max_norm / norm)).astype(local[name].dtype)
        for name, u in update.items()
    }


def weight_norm(gradient: CodedGradient) -> float:
    """Return the Euclidean norm of a class gradient's weight part."""
    if isinstance(gradient, LowRankGradient):
        left, right = gradient.left.double(), gradient.right.double()
        squared = ((left.T @ left) * (right @ right.T)).sum()
    else:
        squared = gradient.weight.double().square().sum()
    return float(squared.clamp_min(0).sqrt())  # rounding may make it negative


def gradient_norm(gradient: CodedGradient) -> float:
    """Return the Euclidean norm of a class gradient, weight and bias together."""
    return math.hypot(weight_norm(gradient), float(gradient.bias.double().norm()))


def shorten_gradient(gradient: CodedGradient, max_norm: float) -> CodedGradient | None:
    """Return the gradient shortened to a norm; None if it is short enough already."""
    norm = gradient_norm(gradient)
    if norm <= max_norm:
        return None
    scale = max_norm / norm
    if isinstance(gradient, LowRankGradient):
        return LowRankGradient(
            gradient.left * scale, gradient.right, gradient.bias * scale
        )
    return ClassGradient(gradient.weight * scale, gradient.bias * scale)


def combine_class_gradients(
    replies: Iterable[Mapping[int, CodedGradient]], aggregation: Aggregation
) -> Mapping[int, CodedGradient]:
    """Return one gradient per class, combined over the clients that hold the class.

    Parameters
    ----------
    replies : iterable of mapping from class to ClassGradient or LowRankGradient
        One mapping per client. The mean reads them one at a time; the other rules
        need them all at once.
    aggregation : Aggregation
        Holds the rule. If one client holds a class, every rule returns its gradient.
        With two clients the median is their mean, since there is no majority.

    Returns
    -------
    mapping of int to ClassGradient or LowRankGradient
        In ascending order of class.
    """
    if aggregation.rule == "mean":
        return mean_class_gradients(replies)
    held = list(replies)

    def combine(values: list[torch.Tensor]) -> torch.Tensor:
        combined = robust_mean(torch.stack(values).numpy(), aggregation)
        return torch.from_numpy(combined.astype(np.float32))

    combined = {}
    for c in sorted({c for reply in held for c in reply}):
        of_class = [reply[c] for reply in held if c in reply]
        combined[c] = ClassGradient(
            combine([gradient.weight for gradient in of_class]),
            combine([gradient.bias for gradient in of_class]),
        )
    return combined
