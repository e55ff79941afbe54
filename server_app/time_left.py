"""How long a run still takes, by its rounds so far; this module needs no torch."""

from collections.abc import Sequence
from statistics import fmean


def seconds_left(durations: Sequence[float], rounds: int) -> float:
    """Return how many seconds some more rounds take.

    Parameters
    ----------
    durations : sequence of float
        Seconds of the rounds since the run started or resumed, at least one.
    rounds : int
        Number of rounds that are left.

    Returns
    -------
    float
    """
    # The first round starts the workers and fills the caches.
    return rounds * fmean(durations[1:] or durations)
