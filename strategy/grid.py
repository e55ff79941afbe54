"""Flower's grid, with additions for a federation of sites."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from clip2fl_common.messages import CONFIG, PARTITION

# Seconds between two polls for replies.
POLL_S = 1.0
# Seconds between two looks at the connected nodes while replies are missing.
LOOK_S = 10.0


class AttentiveGrid(Grid):
    """Poll for replies often, and name the node that went offline.

    A killed node may reconnect seconds after the SuperLink counted it as offline. Its
    message is lost then. Flower's grid polls every three seconds; a node that
    reconnects between two polls is not noticed. Its errors for lost nodes also name
    the SuperLink as their source, not the node.

    It hands every other call on to Flower's grid.

    Parameters
    ----------
    grid : Grid
        Flower's.
    arrived : callable
        Called with the number of a client when its reply has arrived.
    look : callable
        Called with Flower's grid every `LOOK_S` seconds while replies are missing. A
        round may take hours, and a site that is lost is noticed here.
    """

    def __init__(
        self,
        grid: Grid,
        arrived: Callable[[int], None] = lambda client: None,
        look: Callable[[Grid], object] = lambda grid: None,
    ) -> None:
        self._grid = grid
        self._arrived = arrived
        self._look = look

    # Flower's type of a run is not public.
    def set_run(self, run: Any) -> None:
        """Set the run of the grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Return the run of the grid."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message to a node."""
        return self._grid.create_message(
            content, message_type, dst_node_id, group_id, ttl
        )

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the connected nodes."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, and return their ids."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have arrived."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send requests and return the replies that arrive in time.

        Parameters
        ----------
        messages : iterable of Message
            Any number for each node.
        timeout : float or None
            Seconds to wait; None waits for all.

        Returns
        -------
        list of Message
            Replies and errors, each with the asked node as its source.
        """
        requests = list(messages)
        identifiers = list(self._grid.push_messages(requests))
        waiting = dict(zip(identifiers, requests, strict=True))
        started = looked = time.monotonic()
        end = None if timeout is None else started + timeout
        replies = []
        while waiting:
            for reply in self._grid.pull_messages(list(waiting)):
                request = waiting.pop(reply.metadata.reply_to_message_id)
                # Flower's error for a lost node is not the node's.
                if reply.metadata.src_node_id == request.metadata.dst_node_id:
                    self._tell(request)
                if reply.has_error():
                    reply = Message(reply.error, reply_to=request)
                replies.append(reply)
            if not waiting or (end is not None and time.monotonic() > end):
                break
            time.sleep(POLL_S)
            if time.monotonic() - looked >= LOOK_S:
                self._look(self._grid)
                looked = time.monotonic()
        return replies

    def _tell(self, request: Message) -> None:
        # A query, which finds out which site a node is, names no client.
        if config := request.content.config_records.get(CONFIG):
            self._arrived(int(str(config[PARTITION])))
