"""Nodes that tell which sites they are."""

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from tests.stand_in_grid import StandInGrid


class Nodes(StandInGrid):
    """A grid of nodes that answer queries with the given names."""

    def __init__(self, names: Mapping[int, Any]) -> None:
        self.names = dict(names)
        self.asked: list[int] = []

    def get_node_ids(self) -> list[int]:
        """Return the nodes' ids."""
        return list(self.names)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Return the nodes' answers, in the order of the queries."""
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.asked.append(node)
            content = RecordDict({"config": ConfigRecord({"site": self.names[node]})})
            replies.append(Message(content, reply_to=message))
        return replies
