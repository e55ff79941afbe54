"""What a run does about bad replies, and about a bad model that came of them."""

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


class NoRepliesError(RuntimeError):
    """A round brought no usable reply; the run stops instead of going on unchanged."""


@dataclass(frozen=True)
class WayBack:
    """The earlier model with which a run goes on.

    Attributes
    ----------
    earlier : Earlier
        Model and state.
    origin : int
        Round that made it.
    left_out : list of int
        Clients that are left out from here on.
    """

    earlier: Earlier
    origin: int
    left_out: list[int]


class Safeguards:
    """Judges a round's replies, and finds the way back from a poisoned model.

    Parameters
    ----------
    clients : Clients
        The run's.
    lengths : LengthRule
        Drops updates that are far too long.
    min_replies : int
        ``federation.min-replies``.
    noisy_gradients : bool
        Whether clients add noise to class gradients, so that these may be anything.
    """

    def __init__(
        self,
        clients: Clients,
        lengths: LengthRule,
        min_replies: int,
        *,
        noisy_gradients: bool,
    ) -> None:
        self._clients = clients
        self._lengths = lengths
        self._min_replies = min_replies
        self._noisy = noisy_gradients
        self._recovery = Recovery()

    def sample(self, server_round: int) -> list[int]:
        """Return the clients that train in a round, without those that are left out."""
        clients = self._clients
        available = clients.available()
        usual = min(clients.clients_per_round, len(available))
        needed = max(clients.replies_needed(self._min_replies), -(-usual // 2))
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
        check: ReplyCheck,
        replies: Sequence[Message],
        name: Callable[[Message], str],
    ) -> Verdicts:
        """Tell good replies from bad ones, and log these.

        Parameters
        ----------
        server_round : int
            The round.
        check : ReplyCheck
            What is expected.
        replies : sequence of Message
            As they arrived.
        name : callable
            Returns what logs call the sender of a reply.

        Raises
        ------
        DatasetError
            If a simulated client's images cannot be read and are not to be skipped.
        NoRepliesError
            If no reply is usable, and later rounds bring none either.
        """
        verdicts = check.judge(replies, self._lengths, noisy=self._noisy)
        # The same images are missing in every round and in every run: nothing is won
        # by going on. A site may say so for reasons of its own.
        if verdicts.unreadable and not self._clients.come_and_go:
            raise DatasetError(f"round {server_round}: {verdicts.unreadable}")
        named = verdicts.reasons(name)
        for reason in named:
            log(WARNING, "round %d: dropped the reply of %s", server_round, reason)
        if verdicts.good or verdicts.poisoned:
            return verdicts
        self._recovery.empty_rounds += 1
        hopeless = (
            not self._recovery.succeeded and self._recovery.empty_rounds >= MOST_EMPTY
        )
        if hopeless or not self._clients.come_and_go:
            raise NoRepliesError(
                f"round {server_round}: no usable reply from "
                f"{self._clients.clients_per_round} clients ("
                + ("; ".join(named) or "none arrived before federation.round-timeout")
                + ")"
            )
        return verdicts

    def go_back(
        self,
        server_round: int,
        verdicts: Verdicts,
        earlier: Callable[[int], Earlier | None],
        name: Callable[[Message], str],
    ) -> WayBack | None:
        """Find the last model that clients can train on; leave out who made this one.

        Parameters
        ----------
        server_round : int
            The round in which most clients diverged.
        verdicts : Verdicts
            On its replies.
        earlier : callable
            Returns a run's state after the last round before a given one.
        name : callable
            Returns what logs call the sender of a reply.

        Returns
        -------
        WayBack or None
            None: there is none, and the model stays.

        Raises
        ------
        NoRepliesError
            If there is none, and later rounds would be no better.
        """
        bad = self._recovery.origin
        found = (
            f"round {server_round}: training diverged at {verdicts.diverged} of "
            f"{verdicts.diverged + len(verdicts.good)} clients, so the model of round "
            f"{bad} is at fault"
        )
        state = earlier(bad) if bad else None
        # A round that kept its model has that of the round that made it.
        origin = int(state.strategy[ORIGIN]) if state else 0
        if state is None or self._recovery.returns[origin] == MOST_RETURNS:
            if self._clients.come_and_go and self._recovery.succeeded:
                log(WARNING, "%s; there is none to go back to, so it stays", found)
                return None
            raise NoRepliesError(
                f"{found} ("
                + "; ".join(verdicts.reasons(name))
                + "), and there is none to go back to; lower client.learning-rate, or "
                "keep more models (checkpoint.every, checkpoint.keep)"
            )
        culprits = self._recovery.leave_out(server_round)
        self._recovery.returns[origin] += 1
        log(
            WARNING,
            "%s; the run goes on with that of round %d and leaves out for some rounds "
            "the clients that made the bad one: %s",
            found,
            origin,
            ", ".join(str(self._clients.label(client)) for client in culprits),
        )
        return WayBack(state, origin, culprits)

    def note(self, server_round: int, verdicts: Verdicts) -> None:
        """Note whose updates, and how long, made a round's model."""
        lengths = {client: size.update for client, size in verdicts.sizes.items()}
        self._recovery.note(server_round, lengths)
        self._lengths.remember(list(verdicts.sizes.values()))

    def state(self) -> dict[str, torch.Tensor]:
        """Return all of it by name."""
        return {**self._recovery.state(), **self._lengths.state()}

    def absences(self) -> dict[str, torch.Tensor]:
        """Return the part of the state that going back does not undo."""
        return self._recovery.absences()

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` returned."""
        self._recovery.load_state(state)
        self._lengths.load_state(state)
