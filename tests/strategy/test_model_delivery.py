"""Whatever a site answers, a delivery ends, and the others get the model."""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Error, Message, RecordDict

from clip2fl_common import messages
from clip2fl_common.messages import ModelAnswer, ModelOffer, ModelState
from clip2fl_common.signed_folder import Manifest, sign_folder
from strategy.model_delivery import MAX_STANDSTILLS, PIECE_TIMEOUT_S, deliver_model
from tests.flower_private import act_as_flower_process
from tests.stand_in_grid import StandInGrid

CONTENT = {"a": bytes(range(100)), "b": bytes(range(100, 250)), "c": b"\xff"}
WHOLE = b"".join(CONTENT.values())
PIECE = 60

Answer = Callable[[ModelOffer], RecordDict | Error | None]


class Site:
    """A site that collects pieces, as an honest one does."""

    def __init__(self, name: str = "", room: int = messages.PIECE_BYTES) -> None:
        self.name = name
        self.room = room
        self.found = b""

    def __call__(self, offer: ModelOffer) -> RecordDict:
        """Append the piece."""
        if offer.start == len(self.found):
            self.found += offer.piece
        there = len(self.found)
        state = ModelState.STORED if there == len(WHOLE) else ModelState.WANTED
        return ModelAnswer(state, there, self.room, site=self.name).content()


class Sites(StandInGrid):
    """A grid whose nodes answer by functions."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = dict(enumerate(answers, 1))
        self.asked = 0

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes' numbers, from 1."""
        return list(self._answers)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Return the answers that there are."""
        replies = []
        for request in messages:
            assert request.metadata.message_type == "query.model"
            self.asked += 1
            offer = ModelOffer.parse(request.content)
            answer = self._answers[request.metadata.dst_node_id](offer)
            if isinstance(answer, Error):
                replies.append(Message(answer, reply_to=request))
            elif answer is not None:
                replies.append(Message(answer, reply_to=request))
        return replies


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send pieces of a few bytes; be what Flower takes for one of its processes."""
    act_as_flower_process(monkeypatch.setattr)
    monkeypatch.setattr(messages, "PIECE_BYTES", PIECE)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Sign a folder of three small files."""
    for name, data in CONTENT.items():
        (tmp_path / name).write_bytes(data)
    made = datetime(2026, 11, 27, tzinfo=UTC)
    return sign_folder(tmp_path, "run", made, CONTENT, Ed25519PrivateKey.generate())


def test_sites_get_all_bytes_in_pieces_that_they_have_room_for(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip2fl_common.messages.delivery.MIN_PIECE_BYTES", 1)
    wide, narrow, begun = Site("wide"), Site("narrow", room=7), Site("begun")
    begun.found = WHOLE[:130]
    grid = Sites(wide, narrow, begun)
    delivered = deliver_model(grid, tmp_path, manifest, None)
    assert wide.found == narrow.found == begun.found == WHOLE
    assert delivered.have == dict.fromkeys(["wide", "narrow", "begun"], "stored")
    # An offer each, then 251 bytes in pieces of 60, 7 and 60 bytes.
    assert grid.asked == 3 + 5 + 36 + 3
    lines = list(delivered.lines("run-1"))
    assert lines[0] == "delivery: 3 of 3 connected sites have run-1"


def answers(content: RecordDict | Error | None) -> Answer:
    """Return a site that always gives the same answer."""
    return lambda offer: content


def record(**values: Any) -> RecordDict:
    """Return an answer with changes."""
    fields: dict[str, Any] = {
        "state": "wanted",
        "next": 0,
        "room": 2**23,
        "note": "",
        "site": "",
    }
    return RecordDict({"model-answer": ConfigRecord(fields | values)})


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (answers(None), "no answer in 480 s"),
        (answers(Error(1002, "the site takes no models")), "the site takes no models"),
        (answers(Error(2, "x" * 10_000)), "xxx"),
        (answers(RecordDict()), "its answer to a model is None"),
        (answers(record(state="gone")), "'gone'"),
        (answers(record(next=-1)), "it wants byte -1"),
        (answers(record(next=len(WHOLE) + 1)), "it wants byte 252"),
        (answers(record(next="0")), "it wants byte '0'"),
        (answers(record(next=len(WHOLE))), "251 of 251 bytes, and says wanted"),
        (answers(record(state="stored")), "0 of 251 bytes, and says stored"),
        (answers(record(room=1)), "it has room for 1 bytes"),
        (answers(record(note=7)), "its answer to a model"),
        (answers(record(site="s\u0456te")), "it calls itself"),
        (answers(record()), "it still wants byte 0"),
        (answers(record(next=5)), "it still wants byte 5"),
    ],
)
def test_odd_site_is_given_up_and_named(
    tmp_path: Path, manifest: Manifest, answer: Answer, said: str
) -> None:
    good = Site("good")
    grid = Sites(answer, good)
    delivered = deliver_model(grid, tmp_path, manifest, None)
    assert good.found == WHOLE and delivered.have == {"good": "stored"}
    (reason,) = delivered.failed.values()
    assert said in reason
    assert len(reason) < 400 and reason.isprintable()
    assert grid.asked <= 6 + 1 + MAX_STANDSTILLS


def test_site_that_takes_single_bytes_is_given_up(
    tmp_path: Path, manifest: Manifest
) -> None:
    """Else it would cost a message for each byte of a large model."""
    taken = iter(range(len(WHOLE)))
    grid = Sites(lambda offer: record(next=next(taken)))
    delivered = deliver_model(grid, tmp_path, manifest, None)
    assert list(delivered.failed) == ["node 1"]
    assert grid.asked == 1 + MAX_STANDSTILLS


def test_slow_site_with_little_room_does_not_hold_the_delivery(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers each piece in time, and wants hundreds of them."""
    clock = [1000.0]
    monkeypatch.setattr("strategy.model_delivery.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("clip2fl_common.messages.delivery.MIN_PIECE_BYTES", 1)
    tardy, good = Site("tardy", room=1), Site("good")

    def answer(offer: ModelOffer) -> RecordDict:
        clock[0] += PIECE_TIMEOUT_S - 1
        return tardy(offer)

    delivered = deliver_model(Sites(answer, good), tmp_path, manifest, None)
    assert good.found == WHOLE and delivered.have == {"good": "stored"}
    # The offer, five whole pieces, and three answers that do not take one.
    assert clock[0] - 1000 <= PIECE_TIMEOUT_S * (1 + 5 + MAX_STANDSTILLS + 1)
    (reason,) = delivered.failed.values()
    assert list(delivered.failed) == ["tardy"]
    assert "it still wants byte 9 after 4320 s" in reason


def test_equal_names_are_told_apart(tmp_path: Path, manifest: Manifest) -> None:
    grid = Sites(Site("a"), Site("a"))
    assert set(deliver_model(grid, tmp_path, manifest, None).have) == {
        "a",
        "a (node 2)",
    }


def test_nobody_there_is_no_error(tmp_path: Path, manifest: Manifest) -> None:
    delivered = deliver_model(Sites(), tmp_path, manifest, None)
    assert list(delivered.lines("m")) == ["delivery: 0 of 0 connected sites have m"]
