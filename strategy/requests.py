"""A round's requests: one message per client, and a record of the clients asked."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from logging import INFO, WARNING

from flwr.app import DEFAULT_TTL, ConfigRecord, Message, Metadata, RecordDict

from clip2fl_common import messages
from clip2fl_common.provenance import code_fingerprint
from strategy.clients import Clients
from strategy.events import Events, What
from strategy.log import log

# Seconds for a reply on its way, besides the time for which it is waited for.
DELIVERY_S = 600.0


@dataclass(frozen=True)
class Unused:
    """A reply that is missing or not used.

    Attributes
    ----------
    client : str or int
        The site's name or the simulated client's number; ``node N`` if that is open.
    kind : str
        Type of the request: ``train``, ``evaluate``, or a step of a secure sum of
        either, such as ``train.keys``.
    reason : str
        Why, on one line.
    """

    client: str | int
    kind: str
    reason: str


class Requests:
    """Address a round's requests and remember which clients each node must answer for.

    Parameters
    ----------
    clients : Clients
        The run's clients.
    events : Events
        Told which clients are asked, and which do not reply.
    timeout : float
        Seconds for which replies are waited for.

    Attributes
    ----------
    lifetime : float
        Seconds after which Flower forgets a request that has no reply: its default of
        twelve hours, or longer if replies are waited for longer.
    asked : mapping of int to mapping of int to int
        The clients that each node was asked for, each with the most images that it
        can have.
    """

    def __init__(self, clients: Clients, events: Events, timeout: float) -> None:
        self._clients = clients
        self._events = events
        self.lifetime = max(float(DEFAULT_TTL), timeout + DELIVERY_S)
        self._unused: list[Unused] = []
        self.asked: defaultdict[int, dict[int, int]] = defaultdict(dict)
        self._names: dict[int, str] = {}
        self._kind = ""
        # A message gets its id when it is sent. Its content is not kept.
        self._sent: list[tuple[Metadata, int]] = []

    def begin_round(self) -> list[Unused]:
        """Return a list that gets the round's missing and unused replies."""
        self._unused = []
        return self._unused

    def address(
        self, content: RecordDict, numbers: Sequence[int], message_type: str
    ) -> list[Message]:
        """Return one message per client.

        Parameters
        ----------
        content : RecordDict
            Content of every message.
        numbers : sequence of int
            The clients.
        message_type : str
            One of Flower's `MessageType`.

        Returns
        -------
        list of Message
            In the order of the clients.
        """
        config = content.config_records[messages.CONFIG]
        labels = [self._clients.label(client) for client in numbers]
        log(
            INFO,
            "round %d: clients %s %s",
            *(config[messages.ROUND], labels, message_type),
        )
        size = messages.payload_bytes(content)
        self._kind = message_type
        self.asked.clear()
        self._sent.clear()
        requests = []
        for client in numbers:
            own = RecordDict(dict(content.items()))
            own[messages.CONFIG] = ConfigRecord(
                {
                    **config,
                    messages.PARTITION: client,
                    messages.STREAM: self._clients.stream_of(client),
                    messages.CODE_FINGERPRINT: code_fingerprint(),
                }
            )
            node, label = self._clients.node_of(client), self._clients.label(client)
            self.asked[node][client] = self._clients.images_of(client)
            site = f" ({label})" if isinstance(label, str) else ""
            self._names[node] = f"node {node}{site}"
            request = Message(own, node, message_type, ttl=self.lifetime)
            requests.append(request)
            self._sent.append((request.metadata, client))
            self._events.note(What.ASKED, label, size=size)
        return requests

    def name(self, reply: Message) -> str:
        """Return the name that logs use for the sender of a reply."""
        node = reply.metadata.src_node_id
        return self._names.get(node, f"node {node}")

    def client(self, reply: Message) -> str | int:
        """Return whose reply it is: a site's name, a client's number or ``node N``."""
        answered = reply.metadata.reply_to_message_id
        node = reply.metadata.src_node_id
        asked = self.asked.get(node, {})
        clients = [
            client
            for sent, client in self._sent
            if answered and sent.message_id == answered and client in asked
        ] or list(asked)
        # Without the id, a node that simulates several clients leaves it open.
        return self._clients.label(clients[0]) if len(clients) == 1 else f"node {node}"

    def note_dropped(self, reply: Message, reason: str) -> None:
        """Tell that a reply is not used, and whose it is."""
        self.note_unused(self.client(reply), self._kind, reason)

    def note_unused(self, client: str | int, kind: str, reason: str) -> None:
        """Tell that a client's reply to a request is not used, or that it is missing.

        Parameters
        ----------
        client : str or int
            As in `Unused`.
        kind : str
            As in `Unused`.
        reason : str
            Why.
        """
        self._unused.append(Unused(client, kind, messages.plain(reason)))
        self._events.note(What.DROPPED, client, reason=reason)

    def log_silent(self, server_round: int, replies: Sequence[Message]) -> None:
        """Log each node that has not replied at all."""
        answered = {reply.metadata.src_node_id for reply in replies}
        for node in self.asked.keys() - answered:
            log(
                WARNING,
                "round %d: %s did not reply in time; the round goes on without it",
                server_round,
                self._names[node],
            )
            for client in self.asked[node]:
                label = self._clients.label(client)
                self._unused.append(Unused(label, self._kind, "no reply in time"))
                self._events.note(What.SILENT, label)
