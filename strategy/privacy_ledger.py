"""Account for the privacy a run has spent, as (epsilon, delta).

All mechanisms add Gaussian noise, in units of what one record can change. For the
class gradients, class moments and model of a client a record is one of its images; for
the mean update it is a client. A record takes part in the rounds in which its client
was asked, so the client asked most often has spent the most.

Sampling clients does not lower the epsilon here: Flower's accounting has no bound for a
fixed number of clients a round, and the sample is drawn from a known seed.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch

from clip2fl_common.config import Privacy
from clip2fl_common.epsilon import cost, epsilon
from clip2fl_common.protection import protection

# Names of the entries in the strategy's state.
CLIENTS, TIMES = "privacy-clients", "privacy-times"


class PrivacyLedger:
    """Count how often each client was asked, and return the privacy spent.

    Parameters
    ----------
    mechanisms : mapping of str to float
        Name and noise multiplier of each mechanism; those with 0 do not count.
    delta : float
        The delta for which epsilon holds.

    Attributes
    ----------
    keep : callable or None
        Receives how often each client was asked, before the requests of a round leave:
        a run that ends within the round must not forget them.
    """

    def __init__(self, mechanisms: Mapping[str, float], delta: float) -> None:
        self._mechanisms = {name: z for name, z in mechanisms.items() if z > 0}
        self._delta = delta
        self._asked: Counter[int] = Counter()
        self.keep: Callable[[Mapping[int, int]], None] | None = None

    @classmethod
    def of(cls, privacy: Privacy, fields: Iterable[str] = ()) -> "PrivacyLedger":
        """Return the ledger of a run whose clients send these fields.

        If clients send more than one thing with noise, ``images`` accounts for all of
        them together.

        Parameters
        ----------
        privacy : Privacy
            The run's settings of privacy.
        fields : iterable of str
            Names of what replies hold besides model and metrics.
        """
        statistics = {
            field.replace("-", "_"): own.noise
            for field in fields
            if (own := protection(field, privacy))
        }
        models = privacy.model_noise_multiplier
        each = [z for z in (*statistics.values(), models) if z > 0]
        return cls(
            {
                **statistics,
                "models": models,
                "images": cost(each) ** -0.5 if len(each) > 1 else 0.0,
                "updates": privacy.update_noise_multiplier,
            },
            privacy.delta,
        )

    def note(self, *clients: int) -> None:
        """Count a request to each, even without a reply: somebody may have seen it."""
        self._asked.update(clients)
        if self.keep is not None and self._mechanisms:
            self.keep(self._asked)

    def at_least(self, asked: Mapping[int, int]) -> None:
        """Count as many requests as were kept, where a checkpoint knows of fewer."""
        self._asked |= Counter(asked)

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
