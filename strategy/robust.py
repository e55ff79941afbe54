"""One model and one gradient a class out of many, some of which may be wrong.

Coordinate-wise median and trimmed mean (Yin et al. 2018) are Flower's own, for models;
here they serve class gradients as well. An update that is too long is shortened and
not dropped (norm thresholding, Sun et al. 2019): honest clients' updates differ in
length when their data do, and keep their direction and their say.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clip2fl_common.class_gradients import ClassGradient, CodedGradient, LowRankGradient
from clip2fl_common.config import Aggregation
from strategy.gradient_mean import mean_class_gradients

Arrays = Mapping[str, npt.NDArray[Any]]


def trimmed_mean(values: npt.NDArray[Any], trim: float) -> npt.NDArray[Any]:
    """Return the mean along the first axis without the extremes.

    Parameters
    ----------
    values : ndarray, shape [n, ...]
        One entry a client.
    trim : float
        Share of the n values that is cut off at each end, in [0, 0.5).

    Returns
    -------
    ndarray, shape [...]
    """
    cut = int(trim * len(values))
    kept = len(values) - cut
    ordered = np.partition(values, (cut, kept - 1), axis=0)
    return np.asarray(np.mean(ordered[cut:kept], axis=0))


def shorten_update(
    local: Arrays, reference: Arrays, max_norm: float
) -> dict[str, npt.NDArray[Any]] | None:
    """Shorten a client's update to a norm.

    Flower's own function for this divides by zero where a model is unchanged.

    Parameters
    ----------
    local : mapping of str to ndarray
        The client's model.
    reference : mapping of str to ndarray
        The model that it began with; same names and shapes.
    max_norm : float
        Greatest Euclidean norm, over all arrays, of local - reference.

    Returns
    -------
    dict of str to ndarray or None
        The model with the shortened update; None where it is short enough.
    """
    update = {
        name: values.astype(np.float64) - reference[name]
        for name, values in local.items()
    }
    norm = float(np.sqrt(sum(np.square(u).sum() for u in update.values())))
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
    return float(squared.clamp_min(0).sqrt())  # rounding may leave it below zero


def gradient_norm(gradient: CodedGradient) -> float:
    """Return the Euclidean norm of a class gradient, weight and bias together."""
    return math.hypot(weight_norm(gradient), float(gradient.bias.double().norm()))


def shorten_gradient(gradient: CodedGradient, max_norm: float) -> CodedGradient | None:
    """Shorten a class gradient to a norm; return None where it is short enough."""
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
    """Make one gradient a class of those of the clients that hold it.

    Parameters
    ----------
    replies : iterable of mapping from class to ClassGradient or LowRankGradient
        One mapping per client. The mean keeps none of them; the others need them all
        at once.
    aggregation : Aggregation
        Which rule. With one client that holds a class every rule returns its
        gradient, and with two the median is their mean: there is no majority.

    Returns
    -------
    mapping of int to ClassGradient or LowRankGradient
        In ascending order of class.
    """
    if aggregation.rule == "mean":
        return mean_class_gradients(replies)
    held = list(replies)

    def combine(values: list[torch.Tensor]) -> torch.Tensor:
        stacked = torch.stack(values).numpy()
        combined = (
            np.median(stacked, axis=0)
            if aggregation.rule == "median"
            else trimmed_mean(stacked, aggregation.trim)
        )
        return torch.from_numpy(np.asarray(combined, dtype=np.float32))

    combined = {}
    for c in sorted({c for reply in held for c in reply}):
        of_class = [reply[c] for reply in held if c in reply]
        combined[c] = ClassGradient(
            combine([gradient.weight for gradient in of_class]),
            combine([gradient.bias for gradient in of_class]),
        )
    return combined
