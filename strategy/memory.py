"""Memory that a method needs at the server, predicted before the first round."""

import os
from pathlib import Path

from clip2fl_common.config import ConfigError

GIB = 2**30
FLOAT_BYTES = 4
FEATURE_COPIES = 3
"""Federated features of the last round, of this round, and as re-training reads them.
"""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def least_server_bytes(
    classes: int, per_class: int, feature_dim: int, *, dense: bool
) -> int:
    """Return bytes that synthesis and re-training certainly need at the server.

    Parameters
    ----------
    classes, per_class, feature_dim : int
        C, m and d.
    dense : bool
        Whether clients send whole class gradients. Their mean over clients is then one
        array [C, C, d]. The size of thin factors depends on the images.

    Returns
    -------
    int
        A lower bound: the round's replies and one class's intermediate results come on
        top.
    """
    features = FEATURE_COPIES * classes * per_class * feature_dim
    gradients = classes * classes * feature_dim if dense else 0
    return FLOAT_BYTES * (features + gradients)


def machine_bytes() -> int:
    """Return the memory that this process may use: the machine's, or its container's.

    Returns
    -------
    int
        Without swap.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int(CGROUP_LIMIT.read_text("ascii"))
    except (OSError, ValueError):  # no cgroup, or "max"
        return physical
    return min(physical, limit)


def refuse_beyond_memory(
    classes: int, per_class: int, feature_dim: int, *, dense: bool
) -> None:
    """Raise if a run with these sizes cannot fit this machine's memory.

    Parameters
    ----------
    classes, per_class, feature_dim : int
        C, m and d.
    dense : bool
        Whether clients send whole class gradients.

    Raises
    ------
    ConfigError
        Names the keys, the predicted memory and this machine's.
    """
    needed = least_server_bytes(classes, per_class, feature_dim, dense=dense)
    available = machine_bytes()
    if needed <= available:
        return
    advice = f"lower synthesis.features-per-class (now {per_class})"
    if dense:
        advice = f"set upload.min-cosine below 1, for example to 0.99, or {advice}"
    raise ConfigError(
        f"{classes:,} classes and model.feature-dim = {feature_dim} need at least "
        f"{needed / GIB:.1f} GiB of memory at the server for federated features"
        f"{' and whole class gradients' if dense else ''}, but this machine has "
        f"{available / GIB:.1f} GiB: {advice}"
    )
