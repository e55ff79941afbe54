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
    """
    update = {
        name: values.astype(np.float64) - sent[name] for name, values in local.items()
    }
    norm = math.sqrt(sum(float(np.square(part).sum()) for part in update.values()))
    if not 0 < max_norm < norm:
        return update
    return {name: part * (max_norm / norm) for name, part in update.items()}
