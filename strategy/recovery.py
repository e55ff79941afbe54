"""Go back from a model that makes all honest training diverge.

A poisoned average shows one round late: every client that trains on it fails. Then the
run goes back to the model of an earlier round. The clients whose updates made the bad
model are left out for some rounds, twice as many each time.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord

# Rounds for which a client is left out the first time; doubled each further time.
LEFT_OUT_ROUNDS = 5
MOST_DOUBLINGS = 10
# How often a run goes back to the same round. A single client that poisons models is
# left out by then; if training still diverges, the run itself is at fault.
MOST_RETURNS = 2
# A federation of sites that never had a usable reply ends after this many rounds.
MOST_EMPTY = 5

# Names of the entries in the strategy's state.
ORIGIN = "recovery-origin"
CONTRIBUTORS, LENGTHS = "recovery-clients", "recovery-lengths"
LEFT_OUT, LEFT_OUT_LENGTHS = "recovery-left-out", "recovery-left-out-lengths"
SUCCEEDED, RETURNS = "recovery-succeeded", "recovery-returns"
EMPTY_ROUNDS = "recovery-empty-rounds"


@dataclass(frozen=True)
class Earlier:
    """A run's state after one of its rounds.

    Attributes
    ----------
    arrays : ArrayRecord
        The global model after that round.
    strategy : mapping of str to Tensor
        The strategy's state.
    """

    arrays: ArrayRecord
    strategy: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Absence:
    """The absence of a client from training.

    Attributes
    ----------
    until : int
        Last round in which the client is left out.
    times : int
        How often the client has been left out.
    length : float
        Norm of the update for which the client is left out.
    """

    until: int
    times: int
    length: float


class Recovery:
    """Which clients made the global model, and which are left out for a bad one.

    Attributes
    ----------
    origin : int
        Round that made the global model; 0 for the initial model.
    succeeded : bool
        Whether any round has made a model.
    empty_rounds : int
        Rounds without a usable reply before the first one with some.
    returns : Counter of int
        How often the run has gone back to each round.
    """

    def __init__(self) -> None:
        self.origin = 0
        self.succeeded = False
        self.empty_rounds = 0
        self.returns: Counter[int] = Counter()
        self._contributors: dict[int, float] = {}
        self._absent: dict[int, _Absence] = {}

    def note(self, server_round: int, lengths: Mapping[int, float]) -> None:
        """Record the clients whose updates made a round's model, and the norms."""
        self.origin = server_round
        self.succeeded = True
        self._contributors = dict(lengths)

    def leave_out(self, server_round: int) -> list[int]:
        """Leave out, from this round on, the clients that made the global model.

        Parameters
        ----------
        server_round : int
            The round in which the model turned out to be bad.

        Returns
        -------
        list of int
            The clients, ascending.
        """
        for client, length in self._contributors.items():
            before = self._absent.get(client)
            times = 1 + (before.times if before else 0)
            rounds = LEFT_OUT_ROUNDS * 2 ** min(times - 1, MOST_DOUBLINGS)
            self._absent[client] = _Absence(server_round + rounds, times, length)
        return sorted(self._contributors)

    def absent(
        self, server_round: int, available: Collection[int], needed: int
    ) -> set[int]:
        """Return the clients that are left out in a round.

        Parameters
        ----------
        server_round : int
            The round.
        available : collection of int
            Clients that could take part.
        needed : int
            How many clients must remain, if as many are available. Clients with the
            shortest updates come back first until that many remain.

        Returns
        -------
        set of int
        """
        out = [
            client
            for client in available
            if client in self._absent and self._absent[client].until >= server_round
        ]
        out.sort(key=lambda client: (-self._absent[client].length, client))
        return set(out[: max(0, len(available) - needed)])

    def state(self) -> dict[str, torch.Tensor]:
        """Return the whole state by name."""
        whole = torch.int64
        return {
            ORIGIN: torch.tensor(self.origin),
            CONTRIBUTORS: torch.tensor(list(self._contributors), dtype=whole),
            LENGTHS: torch.tensor(
                list(self._contributors.values()), dtype=torch.float64
            ),
            **self.absences(),
        }

    def absences(self) -> dict[str, torch.Tensor]:
        """Return the part of the state that going back does not undo."""
        absences = self._absent.items()
        return {
            SUCCEEDED: torch.tensor(self.succeeded),
            EMPTY_ROUNDS: torch.tensor(self.empty_rounds),
            RETURNS: torch.tensor(
                list(self.returns.items()), dtype=torch.int64
            ).reshape(-1, 2),
            LEFT_OUT: torch.tensor(
                [(client, a.until, a.times) for client, a in absences],
                dtype=torch.int64,
            ).reshape(-1, 3),
            LEFT_OUT_LENGTHS: torch.tensor(
                [a.length for _, a in absences], dtype=torch.float64
            ),
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore a state that `state` returned."""
        self.origin = int(state[ORIGIN])
        self.succeeded = bool(state[SUCCEEDED])
        # A checkpoint of an earlier release has none.
        self.empty_rounds = int(state.get(EMPTY_ROUNDS, 0))
        self.returns = Counter(dict(state[RETURNS].tolist()))
        self._contributors = dict(
            zip(state[CONTRIBUTORS].tolist(), state[LENGTHS].tolist(), strict=True)
        )
        lengths = state[LEFT_OUT_LENGTHS].tolist()
        self._absent = {
            client: _Absence(until, times, length)
            for (client, until, times), length in zip(
                state[LEFT_OUT].tolist(), lengths, strict=True
            )
        }
