"""A round's requests: one message for each client, and who was asked for what."""

from collections import defaultdict
from collections.abc import Sequence

from flwr.app import ConfigRecord, Message, RecordDict

from clip2fl_common import messages
from clip2fl_common.provenance import code_fingerprint
from strategy.clients import Clients


class Requests:
    """Addresses a round's requests and knows which replies they can have.

    Parameters
    ----------
    clients : Clients
        The run's.

    Attributes
    ----------
    asked : mapping of int to mapping of int to int
        For each node the clients that it was asked for, with the most images that
        they can have.
    """

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self.asked: defaultdict[int, dict[int, int]] = defaultdict(dict)
        self._names: dict[int, str] = {}

    def address(
        self, content: RecordDict, numbers: Sequence[int], message_type: str
    ) -> list[Message]:
        """Return one message for each client.

        Parameters
        ----------
        content : RecordDict
            What all of them get.
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
        self.asked.clear()
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
            requests.append(Message(own, node, message_type))
        return requests

    def name(self, reply: Message) -> str:
        """Return what logs call the sender of a reply."""
        node = reply.metadata.src_node_id
        return self._names.get(node, f"node {node}")

    def silent(self, replies: Sequence[Message]) -> list[str]:
        """Return the names of the nodes that have not replied at all."""
        answered = {reply.metadata.src_node_id for reply in replies}
        return [self._names[node] for node in self.asked.keys() - answered]
