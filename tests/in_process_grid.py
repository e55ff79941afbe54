"""A Flower grid without Flower's processes: the ClientApp answers in this one."""

import random
from collections.abc import Callable, Iterable
from typing import Any, cast

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid

from client_app.app import app
from clip2fl_common.config import RunConfig

Tamper = Callable[[Message, Message], Message]


class InProcessGrid:
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
    """

    def __init__(
        self,
        config: RunConfig,
        nodes: int = 2,
        order_seed: int = 0,
        tamper: Tamper | None = None,
    ) -> None:
        self._shuffle = random.Random(order_seed)
        self._ids = self._shuffle.sample(range(1, 10**6), nodes)
        self._config = config
        self._tamper = tamper
        self.requests: list[Message] = []

    def get_node_ids(self) -> list[int]:
        """Return the nodes' ids, in no particular order."""
        return self._shuffle.sample(self._ids, len(self._ids))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Return the ClientApp's replies."""
        replies = []
        for message in messages:
            context = Context(
                run_id=1,
                node_id=message.metadata.dst_node_id,
                node_config={
                    "partition-id": self._ids.index(message.metadata.dst_node_id)
                },
                state=RecordDict(),
                run_config=cast(Any, self._config.to_flat()),
            )
            reply = app(message, context)
            if message.metadata.message_type == "train":
                self.requests.append(message)
                reply = self._tamper(message, reply) if self._tamper else reply
            replies.append(reply)
        self._shuffle.shuffle(replies)
        return replies


def as_grid(grid: InProcessGrid) -> Grid:
    """Return the grid under Flower's type."""
    return cast(Grid, grid)
