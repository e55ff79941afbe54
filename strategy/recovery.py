"""The way back from a model that makes all honest training diverge.

A poisoned average shows one round late: every client that trains on it fails. Then the
model of an earlier round takes its place, and the clients whose updates made the bad
one are left out for some rounds, longer each time.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord

# Rounds for which clients are left out at first; each further time twice as many.
LEFT_OUT_ROUNDS = 5
MOST_DOUBLINGS = 10
# Times that a run goes back to the same round. One client that poisons models is left
# out by then; what still fails is the run itself.
MOST_RETURNS = 2
# Rounds without a usable reply after which a run of sites ends that never had one.
MOST_EMPTY = 5

# Names in a strategy's state.
ORIGIN = "recovery-origin"
CONTRIBUTORS, LENGTHS = "recovery-clients", "recovery-lengths"
LEFT_OUT, LEFT_OUT_LENGTHS = "recovery-left-out", "recovery-left-out-lengths"
SUCCEEDED, RETURNS = "recovery-succeeded", "recovery-returns"


@dataclass(frozen=True)
class Earlier:
    """A run's state after one of its rounds.

    Attributes
    ----------
    arrays : ArrayRecord
        The global model.
    strategy : mapping of str to Tensor
        The strategy's state.
    """

    arrays: ArrayRecord
    strategy: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Absence:
    """Why a client is left out.

    Attributes
    ----------
    until : int
        Last round without it.
    times : int
        How often it has been left out.
    length : float
        Of the update for which it is.
    """

    until: int
    times: int
    length: float


class Recovery:
    """Who made the global model, and who is left out because an earlier one was bad.

    Attributes
    ----------
    origin : int
        Round that brought about the global model; 0: the initial one.
    succeeded : bool
        Whether any round has brought about a model.
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
        """Note which clients' updates, and how long, made a round's model."""
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
        """Return which of the available clients are left out in a round.

        Parameters
        ----------
        server_round : int
            Which round.
        available : collection of int
            Clients that could take part.
        needed : int
            How many must be left, where there are as many. If that is not so without
            the absent ones, those with the shortest updates come back first.

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
        """Return all of it by name."""
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
        """Take back what `state` returned."""
        self.origin = int(state[ORIGIN])
        self.succeeded = bool(state[SUCCEEDED])
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
