"""Differential privacy of a client's model: a bound and noise on its update.

Two clients' data are neighbours if one image is replaced by any other image. Nothing is
known of what training does with an image, but the update is shortened to a norm C. So
any replacement changes it by at most 2 C, which is the bound that the noise is scaled
by. The same bound holds if all of a client's images are replaced.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from clip2fl_common.messages import VARIANCE
from clip2fl_common.randomness import Noise
from clip2fl_common.updates import Arrays, bounded_update


def noisy_local_model(
    local: Arrays,
    sent: Arrays,
    max_norm: float,
    noise_multiplier: float,
    noise: Noise,
) -> dict[str, npt.NDArray[Any]]:
    """Return a local model whose update is bounded and has Gaussian noise.

    Parameters
    ----------
    local, sent : mapping of str to ndarray
        The model after and before training, BatchNorm's statistics included.
    max_norm : float
        Norm C to which the update is shortened.
    noise_multiplier : float
        Standard deviation of the noise on every value, in units of 2 C.
    noise : Noise
        Source of the noise; for real images `secret_noise`.

    Returns
    -------
    dict of str to ndarray
        In the types of ``local``. BatchNorm's variances are clamped at zero. An update
        that is not finite is taken as zero: no noise can hide a NaN.
    """
    deviation = noise_multiplier * 2 * max_norm
    updates = bounded_update(local, sent, max_norm)
    if not all(np.isfinite(update).all() for update in updates.values()):
        updates = {name: np.zeros_like(update) for name, update in updates.items()}
    noisy = {}
    for name, update in updates.items():
        # Rounding to the model's numbers comes after the noise: nothing would hide it.
        values = sent[name] + (update + deviation * noise(update.shape).numpy())
        if name.endswith(VARIANCE):
            values = values.clip(min=0)
        noisy[name] = np.asarray(values, local[name].dtype)
    return noisy
