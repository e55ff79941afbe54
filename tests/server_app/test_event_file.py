"""``events.jsonl``: written as things happen, and read back."""

import json
import logging
import os
import resource
import signal
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_app.event_file import EventReader, EventWriter
from strategy.events import MAX_COUNT, MAX_SECONDS, Event, Events, What

NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=64
)
EVENTS = st.builds(
    Event,
    time=st.datetimes(timezones=st.just(UTC)),
    what=st.sampled_from(What),
    round=st.integers(0, MAX_COUNT),
    site=st.none() | NAMES | st.integers(0, MAX_COUNT),
    phase=st.none() | NAMES,
    images=st.none() | st.integers(0, MAX_COUNT),
    seconds=st.none() | st.floats(0, MAX_SECONDS),
    bytes=st.none() | st.integers(0, MAX_COUNT),
    reason=st.none() | NAMES,
)


def read(path: Path) -> tuple[list[Event], int]:
    """Return the events in a file, and the number of other lines."""
    found: list[Event] = []
    reader = EventReader(path)
    reader.read(found.append, found.clear)
    return found, reader.unreadable


@given(events=st.lists(EVENTS, max_size=5))
def test_written_events_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, events: list[Event]
) -> None:
    path = tmp_path_factory.mktemp("events") / "events.jsonl"
    writer = EventWriter(path)
    for number, event in enumerate(events, start=1):
        writer(event)
        # At once, and as one line of JSON.
        assert len(path.read_bytes().splitlines()) == number
        assert read(path) == (events[:number], 0)
    writer.close()


@given(events=st.lists(EVENTS, min_size=2, max_size=4), data=st.data())
def test_a_torn_line_costs_no_other(
    tmp_path_factory: pytest.TempPathFactory, events: list[Event], data: st.DataObject
) -> None:
    """A crash may leave any part of the last line; a resumed run appends."""
    path = tmp_path_factory.mktemp("events") / "events.jsonl"
    first = EventWriter(path)
    for event in events[:-1]:
        first(event)
    first.close()
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    kept = data.draw(st.integers(0, len(last)))
    path.write_bytes(whole[: len(whole) - len(last) + kept])
    second = EventWriter(path)
    second(events[-1])
    second.close()
    # Without its line end alone, the last line is whole.
    lost = kept < len(last) - 1
    expected = [*(events[:-2] if lost else events[:-1]), events[-1]]
    assert read(path) == (expected, int(lost and kept > 0))


def test_events_have_the_time_the_round_and_a_safe_reason() -> None:
    told: list[Event] = []
    events = Events(told.append)
    before = datetime.now(UTC)
    events.begin_run(3)
    events.begin_round(4)
    events.begin_phase("clients")
    events.begin_phase("clients")
    events.note(What.DROPPED, "site-a", reason="bad\n\x1b[31m" + "x" * 5000)
    assert [(e.what.value, e.round) for e in told] == [
        ("run-started", 3),
        ("round-started", 4),
        ("phase", 4),
        ("dropped", 4),
    ]
    assert all(before <= e.time <= datetime.now(UTC) for e in told)
    reason = told[-1].reason
    assert reason is not None
    assert reason.startswith(r"bad\n\x1b[31mxx")
    assert len(reason) < 400


def test_a_full_disk_is_reported_once_and_leaves_whole_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The limit on a file's size cuts a line, as a full disk does."""
    path = tmp_path / "events.jsonl"
    told: list[Event] = []
    events = Events(told.append)
    for number in range(6):
        events.note(What.ASKED, f"site-{number}")
    writer = EventWriter(path)
    writer(told[0])
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 40, hard))
            for event in told[1:4]:
                writer(event)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
    (record,) = caplog.records
    assert "the run goes on" in record.getMessage()
    writer(told[4])
    writer(told[5])
    writer.close()
    assert read(path) == ([told[0], told[4], told[5]], 1)


def test_no_link_and_no_fifo_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "other").write_text("mine")
    (tmp_path / "link").symlink_to("other")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo"):
        caplog.clear()
        writer = EventWriter(tmp_path / name)
        Events(writer).begin_run(0)
        writer.close()
        assert len(caplog.records) == 1, name
    assert (tmp_path / "other").read_text() == "mine"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        '{"what": "asked"}',
        '{"time": "2026-11-27T12:00:00Z", "what": "asked", "round": -1}',
        '{"time": "2026-11-27T12:00:00", "what": "asked", "round": 1}',
        '{"time": "2026-11-27T12:00:00Z", "what": "else", "round": 1}',
        '{"time": "2026-11-27T12:00:00Z", "what": "asked", "round": 1, "site": []}',
        '{"time": "2026-11-27T12:00:00Z", "what": "asked", "round": 1, "seconds": NaN}',
        "x" * 20_000,
        "[" * 10_000,
        "\ud800",
    ],
)
def test_damaged_lines_are_counted(tmp_path: Path, line: str) -> None:
    path = tmp_path / "events.jsonl"
    good = {"time": "2026-11-27T12:00:00Z", "what": "asked", "round": 1, "later": 1}
    text = f"{json.dumps(good)}\n{line}\n{json.dumps(good)}\n"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    found, unreadable = read(path)
    assert [event.what for event in found] == [What.ASKED, What.ASKED]
    assert unreadable == int(line != "")
