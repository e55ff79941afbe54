"""Replies that are held do not hold others, nor the round."""

import threading
import time
from collections.abc import Collection, Iterable, Iterator

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from google.protobuf.message import DecodeError

from clip2fl_common.messages import CONFIG, PARTITION
from strategy.grid import LOST, NOT_READABLE, NOT_SENT, AttentiveGrid
from tests.flower_private import claim, give_id, lost_node_error
from tests.stand_in_grid import StandInGrid


class SlowGrid(StandInGrid):
    """Answers requests by their id: at once, after a signal, or by an error.

    Parameters
    ----------
    held : iterable of str
        Ids of the requests whose reply comes only after ``released`` is set.
    """

    def __init__(self, held: Iterable[str] = ()) -> None:
        self.held = set(held)
        self.released = threading.Event()
        self.polls: list[list[str]] = []
        self._requests: dict[str, Message] = {}
        self.unsent: set[int] = set()
        self.lost: set[str] = set()
        # What the first poll for a reply brings in its place, or before it, once.
        self.instead: dict[str, Message | Exception] = {}
        self.before: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        """Return no node: the tests say who is online."""
        return []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep the messages under the ids r0, r1, ..."""
        identifiers: list[str] = []
        for place, message in enumerate(messages):
            give_id(message, f"r{place}")
            self._requests[f"r{place}"] = message
            identifiers.append("" if place in self.unsent else f"r{place}")
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies, once none of them is held."""
        wanted = list(message_ids)
        self.polls.append(wanted)
        if self.held & set(wanted):
            assert self.released.wait(30)
        for n in wanted:
            if other := self.instead.pop(n, None):
                if isinstance(other, Exception):
                    raise other
                return [other]
        unasked = [self.before.pop(n) for n in wanted if n in self.before]
        return unasked + [
            lost_node_error(self._requests[n], n)
            if n in self.lost
            else Message(RecordDict(), reply_to=self._requests[n])
            for n in wanted
        ]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Refuse: `AttentiveGrid` has its own."""
        raise NotImplementedError


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look and lose patience after fractions of a second."""
    monkeypatch.setattr("strategy.grid.POLL_S", 0.0)
    monkeypatch.setattr("strategy.grid.HELD_S", 0.05)
    monkeypatch.setattr("strategy.grid.LOOK_S", 0.2)


@pytest.fixture
def grid() -> Iterator[SlowGrid]:
    """Return a grid that holds the reply of the first node."""
    made = SlowGrid(["r0"])
    yield made
    made.released.set()


def requests(number: int) -> list[Message]:
    """Return train requests to the nodes 10, 11, ... for the clients 0, 1, ..."""
    return [
        Message(RecordDict({CONFIG: ConfigRecord({PARTITION: n})}), 10 + n, "train")
        for n in range(number)
    ]


def online(*nodes: int) -> Collection[int]:
    """Return what a look returns."""
    return set(nodes)


def outcome(replies: Iterable[Message]) -> dict[int, str]:
    """Return each node's error; empty for a reply."""
    return {
        reply.metadata.src_node_id: (reply.error.reason or "")
        if reply.has_error()
        else ""
        for reply in replies
    }


def test_node_that_dies_while_it_sends_holds_nobody(grid: SlowGrid) -> None:
    arrived: list[int] = []
    told_while_held: list[int] = []

    def look(_: object) -> Collection[int]:
        if len(arrived) < 2:
            return online(10, 11, 12)
        told_while_held[:] = arrived
        return online(11, 12)

    whole = AttentiveGrid(grid, arrived.append, look)
    replies = whole.send_and_receive(requests(3))
    assert not grid.released.is_set()
    assert outcome(replies) == {10: LOST, 11: "", 12: ""}
    # The others' replies were there before anybody was counted as lost.
    assert sorted(told_while_held) == [1, 2] and sorted(arrived) == [1, 2]
    assert all(len(wanted) == 1 for wanted in grid.polls)


def test_slow_reply_of_a_node_that_is_online_is_waited_for(grid: SlowGrid) -> None:
    looks: list[float] = []

    def look(_: object) -> Collection[int]:
        looks.append(time.monotonic())
        if len(looks) == 3:
            grid.released.set()
        return online(10, 11)

    replies = AttentiveGrid(grid, look=look).send_and_receive(requests(2))
    assert outcome(replies) == {10: "", 11: ""}
    assert len(looks) >= 3


def test_reply_that_comes_while_its_node_is_missed_is_used(
    grid: SlowGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_over = threading.Event()
    pull = grid.pull_messages

    def pull_and_tell(message_ids: Iterable[str]) -> list[Message]:
        wanted = list(message_ids)
        found = pull(wanted)
        if "r0" in wanted:
            handed_over.set()
        return found

    monkeypatch.setattr(grid, "pull_messages", pull_and_tell)

    def look(_: object) -> Collection[int]:
        grid.released.set()
        assert handed_over.wait(30)
        time.sleep(0.3)  # the thread puts the reply into the queue
        return online(11)

    replies = AttentiveGrid(grid, look=look).send_and_receive(requests(2))
    assert outcome(replies) == {10: "", 11: ""}


def test_without_a_look_nobody_counts_as_lost(grid: SlowGrid) -> None:
    threading.Timer(0.6, grid.released.set).start()
    replies = AttentiveGrid(grid).send_and_receive(requests(2))
    assert outcome(replies) == {10: "", 11: ""}


def test_time_limit_holds_while_a_reply_is_held(grid: SlowGrid) -> None:
    whole = AttentiveGrid(grid, look=lambda _: online(10, 11))
    replies = whole.send_and_receive(requests(2), timeout=2.0)
    assert not grid.released.is_set()
    assert outcome(replies) == {11: ""}


def test_many_held_replies_hold_none_of_the_rest() -> None:
    grid = SlowGrid([f"r{n}" for n in range(0, 40, 2)])
    whole = AttentiveGrid(grid, look=lambda _: online(*range(11, 51, 2)))
    found = outcome(whole.send_and_receive(requests(40)))
    grid.released.set()
    assert found == {10 + n: "" if n % 2 else LOST for n in range(40)}


def test_lost_node_and_request_that_was_not_sent_are_errors_of_the_node() -> None:
    grid = SlowGrid()
    grid.lost, grid.unsent = {"r1"}, {2}
    found = outcome(AttentiveGrid(grid).send_and_receive(requests(3)))
    assert found[10] == "" and found[11] != "" and found[12] == NOT_SENT


@pytest.mark.parametrize(
    "error",
    [
        DecodeError("the body of a record"),
        ValueError("no JSON"),
        KeyError("children"),
        TypeError("content is no RecordDict"),
        AttributeError("no metadata"),
        RecursionError("nested"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_reply_that_cannot_be_decoded_costs_its_node_only(error: Exception) -> None:
    grid = SlowGrid()
    grid.instead["r1"] = error
    grid.lost = {"r1"}  # the SuperLink has handed the reply over
    arrived: list[int] = []
    replies = AttentiveGrid(grid, arrived.append).send_and_receive(requests(3))
    found = outcome(replies)
    assert found[10] == "" and found[12] == "" and sorted(arrived) == [0, 2]
    assert found[11].startswith(NOT_READABLE)


@pytest.mark.parametrize("answered", ["", "r0", "unknown"])
def test_reply_that_names_another_request_costs_its_node_only(answered: str) -> None:
    (request,) = requests(1)
    forged = Message(RecordDict(), reply_to=request)
    claim(forged, "_reply_to_message_id", answered)
    grid = SlowGrid()
    grid.instead["r1"], grid.lost = forged, {"r1"}
    found = outcome(AttentiveGrid(grid).send_and_receive(requests(3)))
    assert found[10] == "" and found[12] == ""
    assert found[11].startswith(NOT_READABLE)


def test_reply_that_names_another_sender_costs_its_node_only() -> None:
    request = requests(2)[1]
    give_id(request, "r1")
    forged = Message(RecordDict(), reply_to=request)
    claim(forged, "_src_node_id", 10)
    grid = SlowGrid()
    grid.instead["r1"], grid.lost = forged, {"r1"}
    replies = AttentiveGrid(grid).send_and_receive(requests(2))
    assert len(replies) == 2
    assert outcome(replies)[10] == ""
    assert outcome(replies)[11].startswith(NOT_READABLE)


def test_message_to_the_superlink_costs_nobody() -> None:
    """Flower's own SuperLink hands it over with the reply that is fetched next."""
    grid = SlowGrid()
    grid.before["r0"] = Message(RecordDict(), 1, "train")
    found = outcome(AttentiveGrid(grid).send_and_receive(requests(2)))
    assert found == {10: "", 11: ""}


def test_error_of_flowers_grid_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: SlowGrid, message_ids: Iterable[str]) -> list[Message]:
        raise ConnectionError("the SuperLink is gone")

    monkeypatch.setattr(SlowGrid, "pull_messages", fail)
    with pytest.raises(ConnectionError, match="is gone"):
        AttentiveGrid(SlowGrid()).send_and_receive(requests(2))


def test_no_requests_need_no_thread() -> None:
    before = threading.active_count()
    assert AttentiveGrid(SlowGrid()).send_and_receive([]) == []
    # A thread of an earlier test may have ended meanwhile.
    assert threading.active_count() <= before
