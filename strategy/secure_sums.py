"""The server's side of secure sums: collect keys, masked sums, signatures and seeds.

docs/secure-aggregation.md describes the protocol. The server adds masked vectors and
takes away the masks that are left. Of training it makes one reply of the sum: all that
follows treats it as the only reply of the round. Of evaluations it makes one evaluation
(`strategy.site_accuracy`).
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from logging import INFO, WARNING
from pathlib import Path
from typing import TypeVar

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from clip2fl_common import messages
from clip2fl_common.config import ConfigError
from clip2fl_common.messages import ReplyField
from clip2fl_common.messages.secure import (
    COMMIT,
    KEYS,
    REVEAL,
    Revealed,
    SecureRequest,
    key_in,
    partition_in,
    revealed_in,
    signature_in,
)
from clip2fl_common.messages.sums import SumFormat
from clip2fl_common.messages.vectors import VectorFormat, client_in
from clip2fl_common.secure.identities import (
    PinnedKeys,
    SimulatedKeys,
    Trust,
    has_signed,
)
from clip2fl_common.secure.masks import Vector, can_be_used, subtracts
from clip2fl_common.secure.statements import (
    LEAST_PARTIES,
    TRAINING,
    RoundName,
    SecureError,
    SignedKey,
    key_statement,
    sums_of,
)
from strategy.log import log
from strategy.outliers import LengthRule
from strategy.replies import ReplyCheck, Verdicts
from strategy.requests import Requests
from strategy.setting import Setting

SESSION_BYTES = 16
# Most bytes of a client's masked class gradients and moments. All clients' vectors are
# at the server at once, and nothing of this size was ever tried.
MOST_BYTES = 2**30

T = TypeVar("T")


@dataclass(frozen=True)
class Sum:
    """A sum without masks.

    Attributes
    ----------
    total : Vector
        The sum of the members' vectors.
    parties : int
        Number of parties of the round.
    members : list of int
        The clients in the sum.
    names : list of str
        Their names.
    size : int
        Bytes that each of them sent.
    """

    total: Vector
    parties: int
    members: list[int]
    names: list[str]
    size: int


class SecureSums:
    """The secure sums of a run for one purpose, one in each round.

    Parameters
    ----------
    setting : Setting
        The run's clients and configuration.
    requests : Requests
        Told of clients that leave a sum.
    purpose : {"train", "evaluate"}
        What is summed.

    Attributes
    ----------
    config : RunConfig
        The run's configuration.
    clients : Clients
        The run's clients.
    """

    def __init__(
        self, setting: Setting, requests: Requests, purpose: str = TRAINING
    ) -> None:
        config = setting.config
        self.clients = setting.clients
        self._requests = requests
        self.config = config
        self._purpose = purpose
        self._run = sums_of(setting.run, purpose)
        self._timeout = config.federation.round_timeout
        self._grid: Grid | None = None
        self._name = RoundName("", 0, b"")
        self._keys: dict[int, SignedKey] = {}
        # As they were when the round began: a node that leaves is forgotten.
        self._nodes: dict[int, int] = {}

    def refuse_if_huge(self, fields: Sequence[ReplyField[object]]) -> None:
        """Raise `ConfigError` if clients' sums are larger than is reasonable.

        Parameters
        ----------
        fields : sequence of ReplyField
            What replies hold besides model and metrics.
        """
        sums = SumFormat(self.config, {}, fields)
        size = sum(s.size * s.ring.bits // 8 for s in sums.segments.values())
        if size > MOST_BYTES:
            raise ConfigError(
                f"with aggregation.secure = true a client sends zeros for absent "
                f"classes: {size / 1e9:.2f} GB in each round for this number of "
                "classes. Use method = 'fedlda', whose sums are small"
            )

    def log_settings(self) -> None:
        """Log what is protected, and that a simulation protects nothing."""
        log(INFO, "\t├──> Secure aggregation: the server sees sums only")
        if self.config.simulated:
            log(
                WARNING,
                "aggregation.secure in a simulation: the identity keys of simulated "
                "clients come from the seed, so that secure aggregation protects "
                "nothing here. It is for measurements",
            )

    def agree(self, server_round: int, grid: Grid, numbers: Sequence[int]) -> list[int]:
        """Ask clients for their keys of a round.

        Parameters
        ----------
        server_round : int
            The round.
        grid : Grid
            Flower's grid.
        numbers : sequence of int
            The clients that are to train.

        Returns
        -------
        list of int
            Those whose keys can be used, ascending; none if they are too few.
        """
        self._grid = grid
        self._name = RoundName(self._run, server_round, os.urandom(SESSION_BYTES))
        self._nodes = {client: self.clients.node_of(client) for client in numbers}
        asked = {client: self._request(client) for client in numbers}
        trust = self._trust()
        self._keys, reasons = self._exchange(KEYS, asked, partial(self._key, trust))
        # All parties would refuse the whole round for these.
        owners = Counter(key.public for key in self._keys.values())
        for client, key in list(self._keys.items()):
            if owners[key.public] > 1:
                del self._keys[client]
                reasons[client] = "another client sent the same key"
        for client in self._keys.keys() - set(self.clients.available()):
            del self._keys[client]
            reasons[client] = "it has left since"
        self._tell(KEYS, reasons, f"sent no usable key to {self._purpose}")
        if len(self._keys) < LEAST_PARTIES:
            return []  # nobody trains; `add` says why
        return sorted(self._keys)

    def record(self) -> ConfigRecord:
        """Return the record with all parties' keys for the round's train requests."""
        keys = [self._keys[client] for client in sorted(self._keys)]
        return SecureRequest(
            self._name.server_round,
            self._name.session,
            purpose=self._purpose,
            names=tuple(key.name for key in keys),
            public_keys=tuple(key.public for key in keys),
            signatures=tuple(key.signature for key in keys),
        ).record()

    def add(
        self,
        replies: Sequence[Message],
        sums: VectorFormat,
        asked: Mapping[int, Mapping[int, int]],
        needed: int,
        verdicts: Verdicts,
    ) -> Sum:
        """Add up masked vectors and take their masks away.

        Parameters
        ----------
        replies : sequence of Message
            The replies of the round, errors among them.
        sums : VectorFormat
            The vectors that they must hold.
        asked : mapping of int to mapping of int to int
            The clients that each node was asked for (`Requests.asked`).
        needed : int
            Fewest clients in a sum, for this run.
        verdicts : Verdicts
            Gets the replies that are not in the sum, and the number of the others.

        Returns
        -------
        Sum

        Raises
        ------
        ReplyError
            If there is no sum in this round; says why.
        """
        found = _by_client(replies, asked, verdicts)
        if len(self._keys) < LEAST_PARTIES:
            raise messages.ReplyError(
                f"{len(self._keys)} clients sent a key, and {LEAST_PARTIES} are needed"
            )
        total, members, size = sums.zeros(), [], 0
        for client, message in sorted(found.items()):
            own = asked.get(message.metadata.src_node_id, {})
            try:
                vector = sums.vector_in(message.content, own)
            except messages.ReplyError as error:
                verdicts.dropped.append((message, str(error)))
                continue
            total.add(vector)
            members.append(client)
            size = messages.payload_bytes(message.content)
        parties = len(self._keys)
        verdicts.masked = len(members)
        needed = max(LEAST_PARTIES, needed, parties // 2 + 1)
        if len(members) < needed:
            raise messages.ReplyError(
                f"masked sums of {len(members)} of {parties} clients, and {needed} are "
                "needed"
            )
        self._unmask(total, members)
        names = [self._keys[client].name for client in members]
        return Sum(total, parties, members, names, size)

    def _unmask(self, total: Vector, members: Sequence[int]) -> None:
        """Take away the masks that are left in the sum of the members' vectors."""
        names = {client: self._keys[client].name for client in members}
        lost = {key.name for key in self._keys.values()} - set(names.values())
        listed = tuple(names.values())
        asked = {client: self._request(client, names=listed) for client in members}
        signatures, reasons = self._exchange(
            COMMIT, asked, lambda client, reply: signature_in(reply)
        )
        self._demand(COMMIT, reasons, "did not sign the set to be summed")
        signed = tuple(signatures[client] for client in members)
        asked = {
            client: self._request(client, names=listed, signatures=signed)
            for client in members
        }
        revealed, reasons = self._exchange(
            REVEAL, asked, lambda client, reply: revealed_in(reply, lost)
        )
        self._demand(REVEAL, reasons, "did not reveal its seeds")
        for client, name in names.items():
            own: Revealed = revealed[client]
            total.mask(own.own, subtract=True)
            for other, seed in own.pairs.items():
                total.mask(seed, subtract=not subtracts(name, other))

    def _request(
        self,
        client: int,
        names: tuple[str, ...] = (),
        signatures: tuple[bytes, ...] = (),
    ) -> SecureRequest:
        return SecureRequest(
            self._name.server_round,
            self._name.session,
            client,
            names=names,
            signatures=signatures,
            purpose=self._purpose,
        )

    def _exchange(
        self,
        action: str,
        asked: Mapping[int, SecureRequest],
        read: Callable[[int, RecordDict], T],
    ) -> tuple[dict[int, T], dict[int, str]]:
        """Return the clients' answers, and for each other client the reason."""
        assert self._grid is not None
        requests = [
            Message(
                RecordDict({messages.SECURE: request.record()}),
                self._nodes[client],
                f"{MessageType.TRAIN}.{action}",
                ttl=self._requests.lifetime,
            )
            for client, request in asked.items()
        ]
        found: defaultdict[int, list[T]] = defaultdict(list)
        errors: dict[int, str] = {}
        for reply in self._grid.send_and_receive(requests, timeout=self._timeout):
            node = reply.metadata.src_node_id
            if reply.has_error():
                errors[node] = messages.error_reason(reply)
                continue
            try:
                client = partition_in(reply.content)
                if client not in asked or self._nodes[client] != node:
                    raise messages.ReplyError(f"it answers for client {client}")
                found[client].append(read(client, reply.content))
            except messages.ReplyError as error:
                errors[node] = str(error)
        answers = {client: own[0] for client, own in found.items() if len(own) == 1}
        return answers, {
            client: errors.get(self._nodes[client], "no answer in time")
            for client in asked
            if client not in answers
        }

    def _key(self, trust: Trust | None, client: int, reply: RecordDict) -> SignedKey:
        """Return a client's key after checking it, its name, and a known signature."""
        key = key_in(reply)
        label = self.clients.label(client)
        name = label if isinstance(label, str) else SimulatedKeys.name_of(label)
        if key.name != name:
            raise messages.ReplyError(
                f"it signs as {key.name}, and the run knows it as {name}"
            )
        if trust is not None:
            known = trust.key_of(name)
            statement = key_statement(self._name, name, key.public)
            if known is None or not has_signed(known, key.signature, statement):
                raise messages.ReplyError("its signature is not that of its known key")
        if not can_be_used(key.public):
            raise messages.ReplyError("no secret can be agreed on with its key")
        return key

    def _trust(self) -> Trust | None:
        """Return the keys by which the server can tell bad signatures, if it has any.

        It only spares the other clients a useless round: they check all signatures
        themselves.
        """
        if self.config.simulated:
            return SimulatedKeys(self.config.seed)
        registry = self.config.federation.site_registry
        try:
            return PinnedKeys.read(Path(registry).expanduser()) if registry else None
        except SecureError as error:
            log(WARNING, "signatures are not checked at the server: %s", error)
            return None

    def _tell(self, action: str, reasons: Mapping[int, str], what: str) -> None:
        for client, reason in reasons.items():
            label = self.clients.label(client)
            log(
                WARNING,
                "round %d: client %s %s: %s",
                *(self._name.server_round, label, what, reason),
            )
            self._requests.note_unused(label, f"{self._purpose}.{action}", reason)

    def _demand(self, action: str, reasons: Mapping[int, str], what: str) -> None:
        """Raise `ReplyError` if any member failed: the round is lost then."""
        self._tell(action, reasons, what)
        if reasons:
            client, reason = next(iter(reasons.items()))
            raise messages.ReplyError(
                f"client {self.clients.label(client)} {what}: {reason}"
            )


@dataclass(frozen=True)
class SumCheck:
    """Checks a round with a secure sum, as `ReplyCheck` does without.

    Attributes
    ----------
    sums : SecureSums
        The run's secure sums of training.
    check : ReplyCheck
        The expectations that a reply, here the sum, must meet.
    needed : int
        Fewest clients in a sum, for this run.
    """

    sums: SecureSums
    check: ReplyCheck
    needed: int

    def judge(
        self, replies: Sequence[Message], lengths: LengthRule, *, noisy: bool
    ) -> Verdicts:
        """Return the sum as the only good reply; see `ReplyCheck.judge`."""
        verdicts = Verdicts()
        check = self.check
        sums = SumFormat(self.sums.config, check.sent, check.fields)
        try:
            found = self.sums.add(replies, sums, check.asked, self.needed, verdicts)
            images = {
                client: self.sums.clients.images_of(client) for client in found.members
            }
            reply = sums.reply_of(found.total, found.parties, images, found.size)
            size = check.measure(reply, not noisy)
            if too_long := lengths.too_long({reply.client: size}, check.sent):
                raise messages.ReplyError(f"of the sum: {too_long[reply.client]}")
        except messages.ReplyError as error:
            verdicts.lost = str(error)
            return verdicts
        verdicts.good = [reply]
        # Nobody knows the norms of single updates: all have that of the mean.
        verdicts.sizes = dict.fromkeys(reply.members, size)
        return verdicts


def _by_client(
    replies: Sequence[Message],
    asked: Mapping[int, Mapping[int, int]],
    verdicts: Verdicts,
) -> dict[int, Message]:
    """Return the reply of each client that sent one; the others are dropped."""
    found: defaultdict[int, list[Message]] = defaultdict(list)
    for message in replies:
        if message.has_error():
            verdicts.note_error(message)
            continue
        client = client_in(message.content)
        # First of all: a node that answers for another's client must not cost that one.
        if client is None or client not in asked.get(message.metadata.src_node_id, {}):
            reason = f"it answers for client {client}, and was not asked for that"
            verdicts.dropped.append((message, reason))
        else:
            found[client].append(message)
    single = {}
    for client, answers in found.items():
        if len(answers) == 1:
            single[client] = answers[0]
            continue
        reason = f"{len(answers)} replies for partition {client}"
        verdicts.dropped += [(message, reason) for message in answers]
    return single
