"""Epsilon of Gaussian noise, by Flower's accountant: one definition for both sides."""

import bisect
from collections.abc import Iterable
from functools import lru_cache


@lru_cache
def epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    """Return the epsilon that Gaussian releases of one record spend.

    Parameters
    ----------
    noise_multiplier : float
        Standard deviation of the noise over what the record can change, above 0.
    releases : int
        Number of releases.
    delta : float
        The delta for which epsilon holds.

    Returns
    -------
    float
        By Renyi differential privacy (Mironov 2017); 0 without a release.
    """
    # Not at the top: a node without a budget of epsilon does not need it.
    from flwr.serverapp import (
        GaussianPrivacyEvent,
        NeighboringRelation,
        PrivacyConfig,
        RdpAccountant,
        SamplingMethod,
    )

    if releases == 0:
        return 0.0
    accountant = RdpAccountant(
        PrivacyConfig(
            target_delta=delta,
            population_size=1,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
            sampling_method=SamplingMethod.NO_AMPLIFICATION,
        )
    )
    accountant.compose(GaussianPrivacyEvent(noise_multiplier, 1, 1), releases)
    return accountant.get_epsilon(delta)


def cost(noise_multipliers: Iterable[float]) -> float:
    """Return what Gaussian releases of one record cost: the sum of their z^-2.

    Costs add up, over releases and over what one release holds. A single release with
    the multiplier ``cost ** -0.5`` spends as much as all of them (Mironov 2017).

    Parameters
    ----------
    noise_multipliers : iterable of float
        The multiplier z of each release, above 0.
    """
    return sum(z**-2 for z in noise_multipliers)


def answers_within(most: float, each: float, delta: float) -> int:
    """Return how many releases of one cost stay within an epsilon.

    Parameters
    ----------
    most : float
        The epsilon that all releases may spend together.
    each : float
        The `cost` of one release, above 0.
    delta : float
        The delta for which epsilon holds.
    """

    def fits(releases: int) -> bool:
        return epsilon((each * releases) ** -0.5, 1, delta) <= most

    if not fits(1):
        return 0
    upper = 1
    while fits(2 * upper):
        upper *= 2
    return (
        bisect.bisect_left(range(upper, 2 * upper), True, key=lambda n: not fits(n + 1))
        + upper
    )
