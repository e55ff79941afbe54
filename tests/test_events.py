"""The events of whole runs, against what the runs record elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message, MessageType

from clip2fl_cli.live import RunState, RunWatch, SiteState
from server_app.event_file import EventReader
from server_app.folder_lock import in_use
from strategy.events import Event, What
from strategy.safeguards import NoRepliesError
from tests.federation import federate
from tests.in_process_grid import client_of

pytestmark = pytest.mark.usefixtures("federation_process")

CLIENT_PHASES = ["clients", "checks"]
PHASES = {
    "fedavg": [*CLIENT_PHASES, "aggregation", "evaluation"],
    "clip2fl": [*CLIENT_PHASES, "synthesis", "retraining", "aggregation", "evaluation"],
    "ccvr": [*CLIENT_PHASES, "sampling", "retraining", "aggregation", "evaluation"],
}


class Stop(BaseException):
    """Ends a run as a signal would; nothing catches it."""


def events_of(folder: Path) -> list[Event]:
    """Return all events of a run; all lines are whole."""
    found: list[Event] = []
    reader = EventReader(folder / "events.jsonl")
    reader.read(found.append, found.clear)
    assert reader.unreadable == 0
    return found


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's ``metrics.jsonl``."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("method", PHASES)
def test_events_agree_with_the_metrics(tmp_path: Path, method: str) -> None:
    folder = tmp_path / "run"
    federate(folder, method, federation__rounds=2)
    events = events_of(folder)
    assert [events[0].what, events[0].round] == [What.RUN_STARTED, 0]
    assert events[-1].what is What.RUN_ENDED
    assert [e.time for e in events] == sorted(e.time for e in events)
    for line in rounds_of(folder):
        own = [e for e in events[1:-1] if e.round == line["round"]]
        assert own[0].what is What.ROUND_STARTED
        assert own[-1].what is What.ROUND_ENDED
        phases = [e for e in own if e.what is What.PHASE]
        assert [e.phase for e in phases] == PHASES[method]
        accepted = [e for e in own if e.what is What.ACCEPTED]
        assert [e.site for e in accepted] == line["clients"]
        assert [e.bytes for e in accepted] == line["bytes"]["per_client"]
        assert all(e.images for e in accepted)
        measured = sum(s for n, s in line["seconds"].items() if "clients-" in n)
        assert sum(e.seconds or 0 for e in accepted) == pytest.approx(
            measured, abs=1e-2
        )
        assert [e.site for e in own if e.what is What.ASKED] == line["clients"]
        # What the phases take, by the times of the events.
        ends = [e.time for e in [*phases[1:], own[-1]]]
        for event, end in zip(phases, ends, strict=True):
            assert event.phase is not None
            took = (end - event.time).total_seconds()
            assert took >= line["seconds"][event.phase] - 0.01


def test_dropped_reply_names_its_client_and_reason(tmp_path: Path) -> None:
    """A node that simulates several clients leaves open which, without Flower's ids."""
    dropped: list[int] = []

    def tamper(request: Message, reply: Message) -> Message:
        if request.content.config_records["config"]["server-round"] != 2 or dropped:
            return reply
        dropped.append(client_of(reply))
        return Message(Error(code=2, reason="no\nmemory"), reply_to=request)

    folder = tmp_path / "run"
    federate(folder, "fedavg", nodes=1, tamper=tamper, federation__rounds=2)
    (event,) = [e for e in events_of(folder) if e.what is What.DROPPED]
    assert event.round == 2
    assert event.reason == r"no\nmemory"
    kept = rounds_of(folder)[1]["clients"]
    assert str(event.site).startswith("node ")
    assert dropped[0] not in kept


def test_failed_run_says_why(tmp_path: Path) -> None:
    def tamper(request: Message, reply: Message) -> Message:
        return Message(Error(code=2, reason="broken"), reply_to=request)

    folder = tmp_path / "run"
    with pytest.raises(NoRepliesError):
        federate(folder, "fedavg", tamper=tamper)
    last = events_of(folder)[-1]
    assert last.what is What.RUN_FAILED
    assert last.reason is not None
    assert last.reason.startswith("NoRepliesError: round 1: no usable reply")
    status = RunWatch(folder).look()
    assert status.state is RunState.FAILED
    assert status.reason == last.reason


def test_state_during_the_run_after_a_stop_and_after_resuming(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    seen = []

    def look(request: Message, reply: Message) -> Message:
        if request.metadata.message_type == MessageType.TRAIN:
            assert in_use(folder)
            seen.append(RunWatch(folder).look())
            if seen[-1].round == 2:
                raise Stop
        return reply

    with pytest.raises(Stop):
        federate(folder, "fedavg", tamper=look, federation__rounds=3)
    first, second = seen[0], seen[-1]
    assert [first.state, first.round, first.done] == [RunState.RUNNING, 1, 0]
    assert [phase.name for phase in first.phases] == ["clients"]
    assert {site.state for site in first.sites} == {SiteState.TRAINING}
    assert first.seconds_left is None
    assert [second.round, second.done, second.rounds] == [2, 1, 3]
    assert second.seconds_left is not None
    line = rounds_of(folder)[0]
    assert second.accuracy["fedavg"].balanced == line["accuracy"]["fedavg"]["balanced"]
    assert not in_use(folder)
    status = RunWatch(folder).look()
    assert [status.state, status.round, status.done] == [RunState.STOPPED, None, 1]
    assert status.reason == "Stop"
    federate(folder, "fedavg", run__resume=str(folder), federation__rounds=3)
    status = RunWatch(folder).look()
    assert [status.state, status.done] == [RunState.COMPLETED, 3]
    started = [e.round for e in events_of(folder) if e.what is What.RUN_STARTED]
    assert started == [0, 1]
    ended = [e.round for e in events_of(folder) if e.what is What.ROUND_ENDED]
    assert ended == [1, 2, 3]
