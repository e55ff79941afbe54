"""Flower's grid, with additions for a federation of sites."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from logging import WARNING
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from clip2fl_common.messages import CONFIG, PARTITION
from strategy.log import log

# Least seconds between two polls for a reply, and polls in a second.
POLL_S = 1.0
POLLS_PER_S = 20
# Seconds between two looks at the connected nodes while replies are missing.
LOOK_S = 10.0
# Seconds after which a poll counts as held: its reply arrives slowly, or not at all.
HELD_S = 5.0
UNKNOWN_ERROR = 0
NOT_SENT = "the request could not be sent to the SuperLink"
LOST = "the node was lost while it sent its reply"
NOT_READABLE = "its reply cannot be read"
# What Flower raises for a message that it cannot decode. An error of the connection to
# the SuperLink is none of these.
UNREADABLE = (
    DecodeError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class AttentiveGrid(Grid):
    """Poll for replies often, and name the node that went offline.

    A killed node may reconnect seconds after the SuperLink counted it as offline. Its
    message is lost then. Flower's grid polls every three seconds; a node that
    reconnects between two polls is not noticed. Its errors for lost nodes also name
    the SuperLink as their source, not the node.

    A node that is killed while it sends its reply leaves half of it at the SuperLink.
    Flower's grid then waits for the other half, for three minutes, and for as long
    hands over no other reply, whatever the time-out is. Here each reply is fetched by
    itself, and such a node counts as lost once Flower no longer has it online.

    The SuperLink passes on what a node sends without decoding it. Flower's grid raises
    an error for a reply that cannot be decoded, and believes a reply that names another
    sender or another request. Here such a reply costs its own node only.

    It hands every other call on to Flower's grid.

    Parameters
    ----------
    grid : Grid
        Flower's.
    arrived : callable
        Called with the number of a client when its reply has arrived.
    look : callable
        Called with Flower's grid every `LOOK_S` seconds while replies are missing;
        returns the nodes that are online, or None. A round may take hours, and a site
        that is lost is noticed here.
    """

    def __init__(
        self,
        grid: Grid,
        arrived: Callable[[int], None] = lambda client: None,
        look: Callable[[Grid], Collection[int] | None] = lambda grid: None,
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
        replies, waiting = [], {}
        for identifier, request in zip(identifiers, requests, strict=True):
            if not identifier:  # Flower has no id for what it could not send
                replies.append(_error(NOT_SENT, request))
            else:
                waiting[identifier] = request
        started = looked = time.monotonic()
        end = None if timeout is None else started + timeout
        with _Fetching(self._grid, waiting) as fetching:
            while waiting:
                now = time.monotonic()
                if end is not None and now > end:
                    break
                until = looked + LOOK_S if end is None else min(looked + LOOK_S, end)
                for identifier, reply in fetching.replies(max(0.0, until - now)):
                    request = waiting.pop(identifier)
                    answer = reply.error if reply.has_error() else reply.content
                    # Flower's error for a lost node is not the node's.
                    if reply.metadata.src_node_id == request.metadata.dst_node_id:
                        self._tell(request)
                    elif identifier in fetching.spoiled:
                        reason = f"{NOT_READABLE} ({reply.error.reason})"
                        answer = Error(UNKNOWN_ERROR, reason)
                    replies.append(Message(answer, reply_to=request))
                if waiting and time.monotonic() - looked >= LOOK_S:
                    online = self._look(self._grid)
                    looked = time.monotonic()
                    if online is not None:
                        away = [
                            identifier
                            for identifier, request in waiting.items()
                            if request.metadata.dst_node_id not in online
                        ]
                        for identifier in fetching.give_up_held(away):
                            replies.append(_error(LOST, waiting.pop(identifier)))
        return replies

    def _tell(self, request: Message) -> None:
        # A query, which finds out which site a node is, names no client.
        if config := request.content.config_records.get(CONFIG):
            self._arrived(int(str(config[PARTITION])))


def _error(reason: str, request: Message) -> Message:
    return Message(Error(UNKNOWN_ERROR, reason), reply_to=request)


class _Fetching:
    """Fetches replies one by one, in a thread, and in one more for each that is held.

    Parameters
    ----------
    grid : Grid
        Flower's.
    requests : mapping of str to Message
        The requests by their ids.

    Attributes
    ----------
    spoiled : set of str
        Ids of the requests in whose polls came a message that cannot be used.
    """

    def __init__(self, grid: Grid, requests: Mapping[str, Message]) -> None:
        self._grid = grid
        self._nodes = {i: r.metadata.dst_node_id for i, r in requests.items()}
        # When each request was asked for last; the longest ago comes first.
        self._asked = dict.fromkeys(requests, float("-inf"))
        self._pause = max(POLL_S, len(requests) / POLLS_PER_S)
        self.spoiled: set[str] = set()
        # When the polls that are under way began.
        self._under_way: dict[str, float] = {}
        self._lock = Lock()
        self._found: SimpleQueue[tuple[str, Message] | BaseException] = SimpleQueue()
        self._ended = Event()
        self._threads = 0

    def __enter__(self) -> "_Fetching":
        """Begin to fetch."""
        if self._asked:
            self._start()
        return self

    def __exit__(self, *error: object) -> None:
        """Fetch no more; a poll that is held ends by itself."""
        self._ended.set()

    def replies(self, seconds: float) -> list[tuple[str, Message]]:
        """Return the replies that have come, at least one unless the time is over.

        Each comes with the id of its request.

        Raises
        ------
        Exception
            What Flower's grid raises.
        """
        found: list[tuple[str, Message]] = []
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            try:
                # After one reply, only those that are there already.
                wait = 0.0 if found else max(0.0, min(left, HELD_S))
                got = self._found.get(wait > 0, wait or None)
            except Empty:
                with self._lock:
                    all_held = len(self._held()) >= self._threads
                if all_held:
                    self._start()
                if found or left <= HELD_S:
                    return found
                continue
            if isinstance(got, BaseException):
                raise got
            found.append(got)

    def give_up_held(self, identifiers: Collection[str]) -> list[str]:
        """Return those of some requests whose reply is held, and ask no more for it.

        A reply that comes in this moment is returned by `replies`, and not given up.
        """
        with self._lock:
            given_up = [i for i in self._held() if i in identifiers]
            for identifier in given_up:
                del self._asked[identifier], self._under_way[identifier]
            self._threads -= len(given_up)
        return given_up

    def _held(self) -> list[str]:
        """Return the ids of the requests whose reply is held; needs the lock."""
        now = time.monotonic()
        return [i for i, t in self._under_way.items() if now - t >= HELD_S]

    def _start(self) -> None:
        self._threads += 1
        # A daemon: a poll that is held must not hold the end of the run.
        Thread(target=self._fetch, daemon=True).start()

    def _next(self) -> tuple[str | None, float]:
        """Return whom to ask, or for how many seconds to wait."""
        now = time.monotonic()
        with self._lock:
            free = [i for i in self._asked if i not in self._under_way]
            if not free:
                return None, self._pause
            oldest = min(free, key=self._asked.__getitem__)
            wait = self._asked[oldest] + self._pause - now
            if wait > 0:
                return None, wait
            self._asked[oldest] = self._under_way[oldest] = now
            return oldest, 0.0

    def _fetch(self) -> None:
        try:
            while not self._ended.is_set():
                identifier, wait = self._next()
                if identifier is None:
                    self._ended.wait(wait)
                    continue
                reply = self._poll(identifier)
                with self._lock:
                    given_up = identifier not in self._asked
                    self._under_way.pop(identifier, None)
                    if reply is not None:
                        self._asked.pop(identifier, None)
                    if not self._asked:
                        self._ended.set()
                if given_up:
                    return
                if reply is not None:
                    self._found.put((identifier, reply))
        except BaseException as error:
            self._found.put(error)

    def _poll(self, identifier: str) -> Message | None:
        """Return the reply to a request, if there is one.

        What cannot be used is no reply. If the node sent it in place of one, the
        SuperLink has handed the reply over, and has an error for the next poll.

        Flower's SuperLink adds to a reply what nodes send to itself, and hands each
        over once: one such message that cannot be read would cost the reply.
        deploy/superlink.py takes no such messages.
        """
        node = self._nodes[identifier]
        try:
            found = list(self._grid.pull_messages([identifier]))
        except UNREADABLE as error:
            if identifier not in self.spoiled:
                log(
                    WARNING,
                    "a message in place of a reply of node %d cannot be read (%s)",
                    node,
                    type(error).__name__,
                )
            self.spoiled.add(identifier)
            return None
        for reply in found:
            answers = reply.metadata.reply_to_message_id == identifier
            # Flower's errors have the SuperLink as their source.
            if answers and (reply.has_error() or reply.metadata.src_node_id == node):
                return reply
            self.spoiled.add(identifier)
        return None
