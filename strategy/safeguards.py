"""Handle bad replies, and a bad model that was made from them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from logging import INFO, WARNING

import torch
from flwr.app import Message

from clip2fl_common.data.datasets import DatasetError
from strategy.clients import Clients
from strategy.log import log
from strategy.outliers import LengthRule
from strategy.recovery import MOST_EMPTY, MOST_RETURNS, ORIGIN, Earlier, Recovery
from strategy.replies import ReplyCheck, Verdicts
from strategy.requests import Requests
from strategy.secure_sums import SumCheck


class NoRepliesError(RuntimeError):
    """No reply of a round is usable; the run stops, since going on changes nothing."""


@dataclass(frozen=True)
class WayBack:
    """The earlier model with which a run continues.

    Attributes
    ----------
    earlier : Earlier
        The earlier model and state.
    origin : int
        Round that made the earlier model.
    left_out : list of int
        Clients that are left out from now on.
    """

    earlier: Earlier
    origin: int
    left_out: list[int]


class Safeguards:
    """Check a round's replies, and go back from a poisoned model.

    Parameters
    ----------
    clients : Clients
        The run's clients.
    lengths : LengthRule
        Drops updates that are far too long.
    min_replies : int
        ``federation.min-replies``.
    least : int
        Fewest clients that can make a model: with secure aggregation, the parties of a
        sum.
    noisy_gradients : bool
        Whether clients add noise to class gradients. Then any gradient is possible.
    """

    def __init__(
        self,
        clients: Clients,
        lengths: LengthRule,
        min_replies: int,
        least: int,
        *,
        noisy_gradients: bool,
    ) -> None:
        self._clients = clients
        self._lengths = lengths
        self._min_replies = min_replies
        self._least = least
        self._noisy = noisy_gradients
        self._recovery = Recovery()

    def sample(self, server_round: int) -> list[int]:
        """Return the clients that train in a round; left-out clients are not drawn."""
        clients = self._clients
        available = clients.available()
        usual = min(clients.clients_per_round, len(available))
        replies = clients.replies_needed(self._min_replies)
        needed = max(replies, self._least, -(-usual // 2))
        absent = self._recovery.absent(server_round, available, needed)
        if absent:
            log(
                INFO,
                "round %d: left out because of an earlier model: %s",
                server_round,
                ", ".join(str(clients.label(client)) for client in sorted(absent)),
            )
        return clients.sample(server_round, absent)

    def judge(
        self,
        server_round: int,
        check: ReplyCheck | SumCheck,
        replies: Sequence[Message],
        requests: Requests,
    ) -> Verdicts:
        """Return the verdicts on a round's replies, and log the dropped ones.

        Parameters
        ----------
        server_round : int
            The round.
        check : ReplyCheck or SumCheck
            The expectations that the replies must meet.
        replies : sequence of Message
            In the order of arrival.
        requests : Requests
            The requests that the replies answer.

        Raises
        ------
        DatasetError
            If a simulated client's images cannot be read and are not to be skipped.
        NoRepliesError
            If no reply is usable, and later rounds cannot bring one; or if a process of
            a simulation has ended by itself.
        """
        verdicts = check.judge(replies, self._lengths, noisy=self._noisy)
        for reply, reason in verdicts.dropped:
            requests.note_dropped(reply, reason)
        # A simulated client misses the same images in every round and every run, so
        # going on does not help. A site may repair its images.
        if verdicts.unreadable and not self._clients.come_and_go:
            raise DatasetError(f"round {server_round}: {verdicts.unreadable}")
        # Flower goes on with the dead process, which then fails most clients of each
        # round at once: a run of a few clients, which would look complete.
        if verdicts.unknown and not self._clients.come_and_go:
            raise NoRepliesError(
                f"round {server_round}: a process that trains clients has ended by "
                f"itself, maybe for want of memory ({verdicts.unknown}); resume the "
                "run, with more memory or with fewer clients at a time "
                "(--cpus-per-client)"
            )
        named = verdicts.reasons(requests.name)
        for reason in named:
            log(WARNING, "round %d: dropped the reply of %s", server_round, reason)
        if verdicts.lost:
            log(WARNING, "round %d: no secure sum: %s", server_round, verdicts.lost)
            named.append(verdicts.lost)
        if verdicts.good or self.poisoned(verdicts):
            return verdicts
        self._recovery.empty_rounds += 1
        # A sum may fail once for a reason that the next round does not have.
        lasting = not self._clients.come_and_go and not verdicts.lost
        if self._hopeless() or lasting:
            raise NoRepliesError(
                f"round {server_round}: no usable reply from "
                f"{self._clients.clients_per_round} clients ("
                + ("; ".join(named) or "none arrived before federation.round-timeout")
                + ")"
            )
        return verdicts

    def _hopeless(self) -> bool:
        """Return whether no round has succeeded, and none is likely to."""
        recovery = self._recovery
        return not recovery.succeeded and recovery.empty_rounds >= MOST_EMPTY

    def poisoned(self, verdicts: Verdicts) -> bool:
        """Return whether most clients diverged, so the model sent is at fault.

        As many clients must report it as a round needs good replies. Otherwise one
        client alone could decide it in a round in which the others' replies are missing
        or make no sum. A ``federation.min-replies`` above the clients' own number does
        not count here: one hostile client could then hold the run at a bad model.
        """
        clients = self._clients
        quorum = min(map(clients.replies_needed, (self._min_replies, 0)))
        return verdicts.diverged > verdicts.trained and verdicts.diverged >= quorum

    def go_back(
        self,
        server_round: int,
        verdicts: Verdicts,
        earlier: Callable[[int], Earlier | None],
        name: Callable[[Message], str],
    ) -> WayBack | None:
        """Return the last usable model; leave out the clients that made the bad one.

        Parameters
        ----------
        server_round : int
            The round in which most clients diverged.
        verdicts : Verdicts
            The verdicts on its replies.
        earlier : callable
            Returns the run's state after the last kept round before a given one.
        name : callable
            Returns the name that logs use for the sender of a reply.

        Returns
        -------
        WayBack or None
            None if there is no earlier model; the current one stays.

        Raises
        ------
        NoRepliesError
            If there is no earlier model, and later rounds would not be better.
        """
        bad = self._recovery.origin
        found = (
            f"round {server_round}: training diverged at {verdicts.diverged} of "
            f"{verdicts.diverged + verdicts.trained} clients, so the model of round "
            f"{bad} is at fault"
        )
        state = earlier(bad) if bad else None
        # A round that kept its model holds the model of an earlier round, its origin.
        origin = int(state.strategy[ORIGIN]) if state else 0
        if state is None or self._recovery.returns[origin] == MOST_RETURNS:
            # One broken site may be all that answered; others may in the next rounds.
            self._recovery.empty_rounds += 1
            if self._clients.come_and_go and not self._hopeless():
                log(WARNING, "%s; there is no earlier model, so it stays", found)
                return None
            raise NoRepliesError(
                f"{found} ("
                + "; ".join(verdicts.reasons(name))
                + "), and there is no earlier model; lower client.learning-rate, or "
                "keep more models (checkpoint.every, checkpoint.keep)"
            )
        culprits = self._recovery.leave_out(server_round)
        self._recovery.returns[origin] += 1
        log(
            WARNING,
            "%s; the run goes on with the model of round %d. The clients that made the "
            "bad model are left out for some rounds: %s",
            found,
            origin,
            ", ".join(str(self._clients.label(client)) for client in culprits),
        )
        return WayBack(state, origin, culprits)

    def note(self, server_round: int, verdicts: Verdicts) -> None:
        """Record the clients whose updates made a round's model, and the norms."""
        lengths = {client: size.update for client, size in verdicts.sizes.items()}
        self._recovery.note(server_round, lengths)
        self._lengths.remember(list(verdicts.sizes.values()))

    def state(self) -> dict[str, torch.Tensor]:
        """Return the whole state by name."""
        return {**self._recovery.state(), **self._lengths.state()}

    def absences(self) -> dict[str, torch.Tensor]:
        """Return the part of the state that going back does not undo."""
        return self._recovery.absences()

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore a state that `state` returned."""
        self._recovery.load_state(state)
        self._lengths.load_state(state)
