"""A run is followed to its end, through restarts, and its status is told."""

import io
import json
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import certifi
import pytest

from clip2fl_cli import federation as module
from clip2fl_cli.app_folder import write_app_folder
from clip2fl_cli.federation import Federation
from clip2fl_cli.flower_command import SimulationError
from clip2fl_common.project import PROJECT
from tests.clip2fl_cli.commands import refused, run

# The output of flwr if no SuperLink listens at the address.
DOWN = json.dumps(
    {
        "success": False,
        "error-message": "Connection to the SuperLink is unavailable. Please check "
        "your network connection and 'address' in the SuperLink connection "
        "configuration.",
    }
)
LOG = re.compile(r"the whole log is in (.+)")
STARTED = json.dumps({"success": True, "run-id": "77", "fab-id": "clip2fl/clip2fl"})


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)


def listed(status: str, details: str = "N/A") -> str:
    """Return what ``flwr ls --format json`` prints of one run."""
    run = {"run-id": "5", "status": status, "status-details": details}
    return json.dumps({"success": True, "runs": [run]})


class Scripted(Federation):
    """Answers ``flwr`` commands from a script."""

    def __init__(self, folder: Path, answers: dict[str, list[str]], patience: float):
        super().__init__("h:1", folder / "ca.crt", folder, patience)
        self._answers: dict[str, Iterator[str]] = {
            k: iter(v) for k, v in answers.items()
        }

    def _ask(self, *arguments: str) -> str:
        return next(self._answers[arguments[0]])


def test_log_is_passed_on_once_through_a_restart(tmp_path: Path) -> None:
    answers = {
        "ls": [listed("running"), DOWN, DOWN, listed("finished:completed")],
        # Flower ends the available log with empty lines.
        "log": ["one\ntwo\n\n", "one\ntwo\nthree\nfour\n\n"],
    }
    output = io.StringIO()
    status, _ = Scripted(tmp_path, answers, 60).follow("5", output)
    assert status == "finished:completed"
    assert output.getvalue().split("\n") == ["one", "two", "three", "four", ""]


def test_failed_run_and_lost_superlink_are_told_apart(tmp_path: Path) -> None:
    answers = {"ls": [listed("finished:failed", "why")], "log": [""]}
    assert Scripted(tmp_path, answers, 60).follow("5", io.StringIO()) == (
        "finished:failed",
        "why",
    )
    gone = {"ls": [listed("running"), DOWN, DOWN], "log": [""]}
    status, details = Scripted(tmp_path, gone, 0).follow("5", io.StringIO())
    assert status == "unknown" and "no SuperLink" in details


def test_start_waits_for_the_superlink_but_not_for_a_better_configuration(
    tmp_path: Path,
) -> None:
    answers = {"run": [DOWN, DOWN, STARTED], "ls": [DOWN, DOWN]}
    assert Scripted(tmp_path, answers, 60).start(tmp_path, tmp_path) == "77"
    refusal = json.dumps({"success": False, "error-message": "app is not valid\n"})
    answers = {"run": [refusal], "ls": [json.dumps({"success": True, "runs": []})]}
    with pytest.raises(SimulationError, match="not started: app is not valid$"):
        Scripted(tmp_path, answers, 60).start(tmp_path, tmp_path)
    answers = {"run": [DOWN], "ls": [DOWN]}
    with pytest.raises(SimulationError, match="SuperLink is unavailable"):
        Scripted(tmp_path, answers, 0).start(tmp_path, tmp_path)


def test_flower_itself_says_so_when_nobody_listens(tmp_path: Path) -> None:
    """The installed Flower answers in the same way as the scripted answers above."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shutil.copy(certifi.where(), tmp_path / "ca.crt")
    federation = Federation(address, tmp_path / "ca.crt", tmp_path, 0)
    assert not federation._is_there()
    write_app_folder(PROJECT, tmp_path / "app")
    (tmp_path / "run.toml").write_text("seed = 8\n")
    with pytest.raises(SimulationError, match="SuperLink is unavailable"):
        federation.start(tmp_path / "app", tmp_path / "run.toml")


def test_exit_status_tells_how_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Federation, "start", lambda *_: "5")
    arguments = ("federate", "--root-certificates", tmp_path / "ca.crt")
    for outcome, status, said in (
        (("finished:completed", ""), 0, "finished:completed\n"),
        (("finished:failed", "why"), 1, "finished:failed (why)\n"),
        (("unknown", "no SuperLink for 3 s"), 1, "unknown (no SuperLink for 3 s)\n"),
    ):
        monkeypatch.setattr(Federation, "follow", lambda *_, o=outcome: o)
        assert run(monkeypatch, *arguments) == status
        captured = capsys.readouterr()
        assert captured.out == f"run 5\n{said}"
        (log,) = LOG.findall(captured.err)
        assert Path(log).read_text("utf-8").endswith(" run 5\n")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_follower_leaves_nothing_and_says_that_the_run_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signum: signal.Signals,
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr(Federation, "start", lambda *_: "5")

    def follow(_: Federation, run: str, output: TextIO) -> tuple[str, str]:
        assert list(temporary.glob("clip2fl-*/app/pyproject.toml"))
        signal.raise_signal(signum)
        raise AssertionError("the signal was passed over")

    monkeypatch.setattr(Federation, "follow", follow)
    arguments = ("federate", "--root-certificates", tmp_path / "ca.crt")
    assert run(monkeypatch, *arguments) == 128 + signum
    assert "a run that has started goes on" in capsys.readouterr().err
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("oops=1", "'oops' does not exist"),
        ('method="fedavgn"', "did you mean 'fedavg'"),
        ("client.epochs=0", "client.epochs = 0, but it must be"),
        ("federation.min-replies=6", "federation.min-replies = 6 is more than"),
        ('run.name="../x"', "run.name = '../x', but it must be"),
        ("seed=1979-05-27", "--set: cannot read 'seed=1979-05-27'"),
    ],
)
def test_wrong_configuration_is_refused_before_the_superlink_is_asked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    message: str,
) -> None:
    monkeypatch.delattr(Federation, "start")
    arguments = ("--root-certificates", tmp_path / "ca.crt", "--set", setting)
    assert message in refused(monkeypatch, capsys, "federate", *arguments)


def test_odd_patience_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in ("nan", "-1"):
        arguments = ("--root-certificates", "ca.crt", "--patience", value)
        line = refused(monkeypatch, capsys, "federate", *arguments)
        assert "Invalid value for '--patience'" in line
