"""Combine the clients' models into one: mean, median or trimmed mean, and noise.

The mean weights each client by its number of images (FedAvg, McMahan et al. 2017).
The coordinate-wise median and trimmed mean (Yin et al. 2018) are not weighted.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clip2fl_common.config import Aggregation
from clip2fl_common.messages import VARIANCE
from clip2fl_common.randomness import Noise
from strategy.robust import Arrays, robust_mean

Model = dict[str, npt.NDArray[Any]]


def weighted_mean(models: Iterable[Arrays], weights: Sequence[float]) -> Model:
    """Return the weighted mean of models.

    Parameters
    ----------
    models : iterable of mapping of str to ndarray
        The same names and shapes in each; read one at a time.
    weights : sequence of float
        At least one above zero; they need not add up to 1.

    Returns
    -------
    dict of str to ndarray
    """
    total = sum(weights)
    mean: Model = {}
    for model, weight in zip(models, [w / total for w in weights], strict=True):
        for name, values in model.items():
            if name in mean:
                mean[name] += values * weight
            else:
                mean[name] = np.asarray(values * weight)
    return mean


def combined_model(
    models: Sequence[Arrays], weights: Sequence[float], aggregation: Aggregation
) -> Model:
    """Return the models combined by the configured rule.

    Parameters
    ----------
    models : sequence of mapping of str to ndarray
        The same names and shapes in each.
    weights : sequence of float
        One per model; only the mean uses them.
    aggregation : Aggregation
        Holds the rule.

    Returns
    -------
    dict of str to ndarray
    """
    if aggregation.rule == "mean":
        return weighted_mean(models, weights)
    combined: Model = {}
    for name in models[0]:
        stacked = np.stack([model[name] for model in models])
        combined[name] = robust_mean(stacked, aggregation)
    return combined


def noisy_model(model: Arrays, deviation: float, noise: Noise) -> Model:
    """Return a model with Gaussian noise on all floating-point values.

    Parameters
    ----------
    model : mapping of str to ndarray
        Not changed.
    deviation : float
        Standard deviation of the noise.
    noise : Noise
        Source of the noise, drawn array by array.

    Returns
    -------
    dict of str to ndarray
        BatchNorm's variances are clamped at zero.
    """
    noisy: Model = {}
    for name, values in model.items():
        if values.dtype.kind == "f":
            drawn = noise(values.shape).numpy()
            values = (values + deviation * drawn).astype(values.dtype)
            if name.endswith(VARIANCE):
                values = values.clip(min=0)
        noisy[name] = values
    return noisy


def summed_metrics(
    metrics: Sequence[Mapping[str, float]], weights: Sequence[float], mean: set[str]
) -> dict[str, float]:
    """Return metrics over all clients: some as weighted means, the others as sums.

    Parameters
    ----------
    metrics : sequence of mapping of str to float
        The same names in each.
    weights : sequence of float
        One per client.
    mean : set of str
        Names of the metrics that are averaged.

    Returns
    -------
    dict of str to float
    """
    total = sum(weights)
    shares = [weight / total for weight in weights]
    return {
        name: sum(
            own[name] * (share if name in mean else 1)
            for own, share in zip(metrics, shares, strict=True)
        )
        for name in metrics[0]
    }
