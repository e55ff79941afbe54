"""The update of a local model, bounded by its norm."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[Any]]


def bounded_update(
    local: Arrays, sent: Arrays, max_norm: float
) -> dict[str, npt.NDArray[np.float64]]:
    """Return local minus sent, shortened to a norm.

    Parameters
    ----------
    local, sent : mapping of str to ndarray
        A client's model and the model it began with; same names and shapes.
    max_norm : float
        Largest Euclidean norm over all arrays; 0: any.

    Returns
    -------
    dict of str to ndarray of float64
        With a bound, an update whose norm is not finite is NaN everywhere.
    """
    with np.errstate(invalid="ignore"):  # inf - inf
        update = {
            name: values.astype(np.float64) - sent[name]
            for name, values in local.items()
        }
    if max_norm == 0:
        return update
    norm = update_norm(update)
    if norm <= max_norm:
        return update
    # A comparison with NaN is false: such an update must not pass as a short one.
    scale = max_norm / norm if math.isfinite(norm) else math.nan
    return {name: part * scale for name, part in update.items()}


def update_norm(update: Arrays) -> float:
    """Return the Euclidean norm of an update over all its arrays."""
    return math.sqrt(sum(float(np.square(part).sum()) for part in update.values()))
