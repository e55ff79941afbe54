"""A command hears of lost sites and of the run's end, and cannot hurt the run."""

import json
import os
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path
from queue import Empty

import pytest

from server_app import hook as module
from server_app.hook import VARIABLE, Hook
from strategy.events import Events, What
from tests.federation import federate

KEEP = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read())"


def command(*arguments: str) -> str:
    """Return a command line that runs Python."""
    return shlex.join([sys.executable, "-c", *arguments])


def told(file: Path) -> list[dict[str, object]]:
    """Return the events that a command has kept."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def hook(monkeypatch: pytest.MonkeyPatch, value: str, folder: Path) -> Hook:
    """Return the hook of an environment."""
    monkeypatch.setenv(VARIABLE, value)
    found = Hook.of_environment(folder)
    assert found is not None
    return found


def test_command_gets_the_events_in_order_as_json_without_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "told $(touch never); é"
    called = hook(monkeypatch, command(KEEP, str(file)), tmp_path)
    events = Events(called)
    events.begin_run(0)
    events.begin_round(1)
    events.note(What.ASKED, "north")
    events.note(What.AWAY, "north")
    events.note(What.RUN_FAILED, reason="no\nspace é")
    called.close()
    lost, failed = told(file)
    assert (lost["what"], lost["site"], lost["round"]) == ("away", "north", 1)
    assert (failed["what"], failed["reason"]) == ("run-failed", r"no\nspace é")
    assert lost["folder"] == str(tmp_path)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("/no/such/program", "No such file"),
        (command("import sys; sys.exit(3)"), "ended with status 3"),
    ],
)
def test_failure_is_a_line_in_the_log(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    value: str,
    said: str,
) -> None:
    called = hook(monkeypatch, value, tmp_path)
    Events(called).note(What.RUN_ENDED)
    called.close()
    (line,) = caplog.messages
    assert said in line and "run-ended" in line


def test_unreadable_or_missing_command_is_no_hook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for value in (None, "", "   "):
        if value is None:
            monkeypatch.delenv(VARIABLE, raising=False)
        else:
            monkeypatch.setenv(VARIABLE, value)
        assert Hook.of_environment(tmp_path) is None
    assert caplog.messages == []
    monkeypatch.setenv(VARIABLE, "mail 'open")
    assert Hook.of_environment(tmp_path) is None
    assert "No closing quotation" in caplog.text


def test_command_that_hangs_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The child would hold the pipe open, and the run does not wait for it."""
    monkeypatch.setattr(module, "COMMAND_S", 3.0)
    pid = tmp_path / "pid"
    script = ["sh", "-c", 'sleep 600 & echo $! > "$0"; wait', str(pid)]
    called = hook(monkeypatch, shlex.join(script), tmp_path)
    Events(called).note(What.AWAY, "a")
    assert called._events.unfinished_tasks  # the run did not wait
    while called._events.unfinished_tasks and not (
        pid.exists() and pid.read_text("utf-8").strip()
    ):
        time.sleep(0.02)
    called.close()
    assert "took more than 3 s" in caplog.text
    child = int(pid.read_text())
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        # An ended process without a parent may wait for init to collect it.
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the command's child still runs")


def test_end_of_a_run_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "END_S", 0.2)
    monkeypatch.setattr(module, "COMMAND_S", 0.5)
    called = hook(monkeypatch, "sleep 600", tmp_path)
    try:
        for _ in range(module.WAITING + 10):
            Events(called).note(What.AWAY, "a")
        started = time.monotonic()
        called.close()
        # All the commands together would take 50 s.
        assert 0.1 < time.monotonic() - started < 10
    finally:
        # The thread would start commands during later tests.
        with suppress(Empty):
            while True:
                called._events.get_nowait()
                called._events.task_done()
        monkeypatch.setattr(module, "END_S", 10.0)
        called.close()
    assert not called._events.unfinished_tasks


@pytest.mark.usefixtures("federation_process")
def test_whole_run_tells_of_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "told"
    monkeypatch.setenv(VARIABLE, command(KEEP, str(file)))
    federate(tmp_path / "run", "fedavg", federation__rounds=1)
    (event,) = told(file)
    assert (event["what"], event["round"]) == ("run-ended", 1)
    assert event["folder"] == str(tmp_path / "run")
