"""Flower's grid, for sites that come and go."""

import time
from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid

# Seconds between two looks for replies.
POLL_S = 1.0


class AttentiveGrid:
    """Flower's grid for sites: it looks often, and says which node is lost.

    A node that was killed may be back seconds after it counted as offline; its message
    is lost then, and only who looks in between learns of it. Flower looks every three
    seconds, and signs the errors of lost nodes with the SuperLink's id.

    Parameters
    ----------
    grid : Grid
        Flower's.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def get_node_ids(self) -> list[int]:
        """Return the ids of the connected nodes."""
        return list(self._grid.get_node_ids())

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send requests and return the replies that arrive in time.

        Parameters
        ----------
        messages : iterable of Message
            One or more for each node.
        timeout : float or None
            Seconds to wait; None waits for all.

        Returns
        -------
        list of Message
            Replies and errors, each from the node that was asked.
        """
        requests = list(messages)
        identifiers = list(self._grid.push_messages(requests))
        waiting = dict(zip(identifiers, requests, strict=True))
        end = None if timeout is None else time.monotonic() + timeout
        replies = []
        while waiting:
            for reply in self._grid.pull_messages(list(waiting)):
                request = waiting.pop(reply.metadata.reply_to_message_id)
                if reply.has_error():
                    reply = Message(reply.error, reply_to=request)
                replies.append(reply)
            if not waiting or (end is not None and time.monotonic() > end):
                break
            time.sleep(POLL_S)
        return replies
