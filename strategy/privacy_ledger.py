"""What a run has given away so far: (epsilon, delta), accounted for by Flower.

Both mechanisms are Gaussian, with noise in units of what one record changes: an image
in the class gradients of its client, a client in the mean update. A record takes part
in the rounds in which its client was asked; the worst off has been asked most often.
Nothing is won from sampling, since Flower's own accounting has no such bound for a
fixed number of clients a round, and since who is asked is drawn from a known seed.
"""

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

import torch
from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    RdpAccountant,
    SamplingMethod,
)

from clip2fl_common.config import Privacy

# Names in a strategy's state.
CLIENTS, TIMES = "privacy-clients", "privacy-times"


@lru_cache
def epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    """Return the epsilon of some Gaussian releases of one record.

    Parameters
    ----------
    noise_multiplier : float
        Standard deviation of the noise over what the record can change, above 0.
    releases : int
        How many.
    delta : float
        At which delta.

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
    """Counts how often each client was asked, and tells what that has cost.

    Parameters
    ----------
    mechanisms : mapping of str to float
        What is protected, and its noise multiplier; those without noise do not count.
    delta : float
        At which delta.
    """

    def __init__(self, mechanisms: Mapping[str, float], delta: float) -> None:
        self._mechanisms = {name: z for name, z in mechanisms.items() if z > 0}
        self._delta = delta
        self._asked: Counter[int] = Counter()

    @classmethod
    def of(cls, privacy: Privacy, class_gradients: bool) -> "PrivacyLedger":
        """Return the ledger of a method that asks for class gradients, or does not."""
        gradients = privacy.gradient_noise_multiplier if class_gradients else 0.0
        return cls(
            {
                "class_gradients": gradients,
                "updates": privacy.update_noise_multiplier,
            },
            privacy.delta,
        )

    def note(self, client: int) -> None:
        """Count a request, answered or not: the answer may have been seen."""
        self._asked[client] += 1

    def spent(self) -> dict[str, dict[str, float]]:
        """Return by mechanism what one round costs, and all so far for the worst off.

        Returns
        -------
        dict of str to dict of str to float
            ``epsilon_round``, ``epsilon_total`` and ``delta``.
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
        """Return clients and how often they were asked; nothing without noise."""
        if not self._mechanisms:
            return {}
        clients = sorted(self._asked)
        return {
            CLIENTS: torch.tensor(clients, dtype=torch.int64),
            TIMES: torch.tensor([self._asked[c] for c in clients], dtype=torch.int64),
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` returned."""
        if self._mechanisms:
            pairs = zip(state[CLIENTS].tolist(), state[TIMES].tolist(), strict=True)
            self._asked = Counter(dict(pairs))
