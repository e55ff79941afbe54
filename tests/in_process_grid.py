"""A Flower grid without Flower's processes: the ClientApp answers in this one."""

import copy
import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from flwr.app import Context, Error, Message, RecordDict

from client_app.app import app
from clip2fl_common.config import RunConfig
from clip2fl_common.messages import METRICS, PARTITION
from tests.flower_private import give_id
from tests.stand_in_grid import StandInGrid

Tamper = Callable[[Message, Message], Message]


class InProcessGrid(StandInGrid):
    """Calls the real ClientApp for every message; replies arrive in any order.

    Parameters
    ----------
    config : RunConfig
        The run configuration that clients see.
    nodes : int
        Number of nodes.
    order_seed : int
        Seed of the order in which replies arrive, and of the node ids.
    tamper : callable or None
        Takes a train request and its reply; returns the reply that arrives.
    node_configs : sequence of mapping or None
        What each node was started with; by default its partition.

    Attributes
    ----------
    requests, replies : list of Message
        Train requests, and everything that nodes sent.
    away : set of int
        Nodes, by their place, that are not connected.
    """

    def __init__(
        self,
        config: RunConfig,
        nodes: int = 2,
        order_seed: int = 0,
        tamper: Tamper | None = None,
        node_configs: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self._shuffle = random.Random(order_seed)
        self._ids = self._shuffle.sample(range(1, 10**6), nodes)
        self._config = config
        self._tamper = tamper
        self._node_configs = node_configs or [
            {"partition-id": place} for place in range(nodes)
        ]
        self._numbers = itertools.count()
        self._waiting: dict[str, Message] = {}
        self.requests: list[Message] = []
        self.replies: list[Message] = []
        self.away: set[int] = set()

    def get_node_ids(self) -> list[int]:
        """Return the nodes' ids, in no particular order."""
        there = [n for place, n in enumerate(self._ids) if place not in self.away]
        return self._shuffle.sample(there, len(there))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Return the ClientApp's replies."""
        replies = []
        for message in messages:
            context = Context(
                run_id=1,
                node_id=message.metadata.dst_node_id,
                node_config=cast(
                    Any,
                    self._node_configs[self._ids.index(message.metadata.dst_node_id)],
                ),
                state=RecordDict(),
                run_config=cast(Any, self._config.to_flat()),
            )
            try:
                reply = app(message, context)
            except Exception as error:  # as Flower's process does
                reason = f"{type(error)}:<'{error}'>"
                reply = Message(Error(code=2, reason=reason), reply_to=message)
            if message.metadata.message_type == "train":
                self.requests.append(message)
                reply = self._tamper(message, reply) if self._tamper else reply
            self.replies.append(copy.deepcopy(reply))
            replies.append(reply)
        self._shuffle.shuffle(replies)
        return replies

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Have the messages answered, and return their ids."""
        requests = list(messages)
        for request in requests:
            give_id(request, f"request-{next(self._numbers)}")
        for reply in self.send_and_receive(requests):
            self._waiting[reply.metadata.reply_to_message_id] = reply
        return [request.metadata.message_id for request in requests]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to messages, as far as there are any."""
        found = [self._waiting.pop(n, None) for n in message_ids]
        return [reply for reply in found if reply is not None]


def client_of(reply: Message) -> int:
    """Return the client that a reply speaks of, unchecked."""
    return cast(int, reply.content.metric_records[METRICS][PARTITION])
