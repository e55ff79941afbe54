"""Account for the privacy a run has spent, as (epsilon, delta), by Flower's code.

All mechanisms add Gaussian noise, in units of what one record can change. For the
class gradients, class moments and model of a client a record is one of its images; for
the mean update it is a client. A record takes part in the rounds in which its client
was asked, so the client asked most often has spent the most.

Sampling clients does not lower the epsilon here: Flower's accounting has no bound for a
fixed number of clients a round, and the sample is drawn from a known seed.
"""

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from math import hypot

import torch
from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    RdpAccountant,
    SamplingMethod,
)

from clip2fl_common.config import Privacy

# Names of the entries in the strategy's state.
CLIENTS, TIMES = "privacy-clients", "privacy-times"


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


class PrivacyLedger:
    """Count how often each client was asked, and return the privacy spent.

    Parameters
    ----------
    mechanisms : mapping of str to float
        Name and noise multiplier of each mechanism; those with 0 do not count.
    delta : float
        The delta for which epsilon holds.
    """

    def __init__(self, mechanisms: Mapping[str, float], delta: float) -> None:
        self._mechanisms = {name: z for name, z in mechanisms.items() if z > 0}
        self._delta = delta
        self._asked: Counter[int] = Counter()

    @classmethod
    def of(
        cls, privacy: Privacy, class_gradients: bool, class_moments: bool = False
    ) -> "PrivacyLedger":
        """Return the ledger of a run, with or without these statistics.

        If clients send more than one thing with noise, ``images`` accounts for all of
        them together. Gaussian releases of multipliers a and b spend as much as one of
        (a^-2 + b^-2)^(-1/2).
        """
        gradients = privacy.gradient_noise_multiplier if class_gradients else 0.0
        moments = privacy.moment_noise_multiplier if class_moments else 0.0
        models = privacy.model_noise_multiplier
        each = [1 / z for z in (gradients, moments, models) if z > 0]
        return cls(
            {
                "class_gradients": gradients,
                "class_moments": moments,
                "models": models,
                "images": 1 / hypot(*each) if len(each) > 1 else 0.0,
                "updates": privacy.update_noise_multiplier,
            },
            privacy.delta,
        )

    def note(self, client: int) -> None:
        """Count a request, even without a reply: somebody may have seen the reply."""
        self._asked[client] += 1

    def spent(self) -> dict[str, dict[str, float]]:
        """Return the cost of one round and of all rounds so far, by mechanism.

        Returns
        -------
        dict of str to dict of str to float
            ``epsilon_round``, ``epsilon_total`` (of the client asked most often) and
            ``delta``.
        """
        times = max(self._asked.values(), default=0)
        return {
            name: {
                "epsilon_round": epsilon(multiplier, 1, self._delta),
                "epsilon_total": epsilon(multiplier, times, self._delta),
                "delta": self._delta,
            }
            for name, multiplier in self._mechanisms.items()
        }

    def state(self) -> dict[str, torch.Tensor]:
        """Return the clients and how often each was asked; empty without noise."""
        if not self._mechanisms:
            return {}
        clients = sorted(self._asked)
        return {
            CLIENTS: torch.tensor(clients, dtype=torch.int64),
            TIMES: torch.tensor([self._asked[c] for c in clients], dtype=torch.int64),
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore a state that `state` returned."""
        if self._mechanisms:
            pairs = zip(state[CLIENTS].tolist(), state[TIMES].tolist(), strict=True)
            self._asked = Counter(dict(pairs))
