"""A round's requests, and who is told what of them."""

import pytest
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict

from clip2fl_common import messages
from strategy.events import Event, Events, What
from strategy.requests import Requests
from tests.flower_private import give_id
from tests.strategy.messages import client_plan


@pytest.mark.usefixtures("federation_process")
def test_dropped_reply_is_its_clients_by_the_id_of_the_request() -> None:
    """Clients 0 and 2 are simulated by one node."""
    told: list[Event] = []
    requests = Requests(client_plan(), Events(told.append), 60.0)
    content = RecordDict({messages.CONFIG: ConfigRecord({messages.ROUND: 1})})
    sent = requests.address(content, [0, 1, 2], MessageType.TRAIN)
    assert [(e.what, e.site) for e in told] == [(What.ASKED, n) for n in (0, 1, 2)]
    told.clear()

    def drop(number: int) -> str | int | None:
        reply = Message(Error(code=2, reason="x"), reply_to=sent[number])
        requests.note_dropped(reply, "why")
        event = told.pop()
        assert (event.what, event.reason) == (What.DROPPED, "why")
        return event.site

    node = sent[0].metadata.dst_node_id
    assert sent[2].metadata.dst_node_id == node
    # Not sent, so without ids: only the second node leaves no doubt.
    assert [drop(n) for n in (0, 1, 2)] == [f"node {node}", 1, f"node {node}"]
    for number, request in enumerate(sent):
        give_id(request, f"id-{number}")
    assert [drop(n) for n in (0, 1, 2)] == [0, 1, 2]


@pytest.mark.usefixtures("federation_process")
@pytest.mark.parametrize(("timeout", "hours"), [(60.0, 12), (24 * 3600.0, 24)])
def test_request_lives_as_long_as_its_reply_is_waited_for(
    timeout: float, hours: int
) -> None:
    """Flower forgets a request after twelve hours, unless told otherwise."""
    requests = Requests(client_plan(), Events(), timeout)
    content = RecordDict({messages.CONFIG: ConfigRecord({messages.ROUND: 1})})
    (request,) = requests.address(content, [0], MessageType.TRAIN)
    assert hours * 3600 <= request.metadata.ttl <= hours * 3600 + 600
