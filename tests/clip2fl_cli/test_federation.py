"""A run is followed to its end, through restarts, and its status is told."""

import io
import json
import re
import shlex
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
from clip2fl_cli.progress import Kind, Reader, RunOutput
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
    monkeypatch.setattr(Federation, "active", lambda _: [])


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
    shutil.copy(certifi.where(), tmp_path / "ca.crt")
    write_app_folder(PROJECT, tmp_path / "app")
    (tmp_path / "run.toml").write_text("seed = 8\n")
    # Bound, so that no other program listens there meanwhile.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        federation = Federation(address, tmp_path / "ca.crt", tmp_path, 0)
        assert not federation._is_there()
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
    told = capsys.readouterr().err
    options = f"--root-certificates {tmp_path / 'ca.crt'}"
    assert "run 5 goes on" in told
    assert f"to follow it: clip2fl attach 5 {options}\n" in told
    assert f"to end it: clip2fl stop 5 {options}\n" in told
    assert list(temporary.iterdir()) == []


def test_signal_before_the_start_is_over_says_how_to_find_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        Federation, "start", lambda *_: signal.raise_signal(signal.SIGTERM)
    )
    arguments = ("--root-certificates", tmp_path / "ca.crt", "--superlink", "h:1")
    assert run(monkeypatch, "federate", *arguments) == 128 + signal.SIGTERM
    options = f"--root-certificates {tmp_path / 'ca.crt'} --superlink h:1"
    told = capsys.readouterr().err
    assert "a run that has started goes on" in told
    assert f"clip2fl attach {options} follows it" in told


def runs(**status: str) -> str:
    """Return what ``flwr ls --format json`` prints of all runs."""
    listed = [
        {"run-id": n.removeprefix("r"), "status": s, "status-details": "N/A"}
        for n, s in status.items()
    ]
    return json.dumps({"success": True, "runs": listed})


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find out which runs have not ended as the program does."""
    monkeypatch.setattr(Federation, "active", ACTIVE)


ACTIVE = Federation.active
NOT_FOUND = json.dumps({"success": False, "error-message": "Run ID 9 not found"})


@pytest.mark.usefixtures("asking")
def test_the_only_run_that_has_not_ended_needs_no_number(tmp_path: Path) -> None:
    def known(*answers: str, run: str | None = None) -> str:
        return Scripted(tmp_path, {"ls": list(answers)}, 0).known(run)

    two = runs(r7="running", r5="finished:failed", r8="pending")
    assert known(runs(r7="starting", r5="finished:failed")) == "7"
    with pytest.raises(SimulationError, match=r"2 runs have not ended \(7, 8\)"):
        known(two)
    with pytest.raises(SimulationError, match=r"0 runs have not ended \(none\)"):
        known(runs(r5="finished:completed"))
    assert known(two, listed("finished:failed"), run="5") == "5"
    with pytest.raises(SimulationError, match="run 9 is not found: Run ID 9 not.*7, 8"):
        known(two, NOT_FOUND, run="9")


@pytest.mark.usefixtures("asking")
def test_second_run_at_once_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "checked_run_config", lambda *_: "")
    monkeypatch.setattr(module, "write_app_folder", lambda *_: None)
    for others, count in (
        (runs(r7="running", r3="finished:completed"), 1),
        (runs(r3="finished:completed"), 0),
        (DOWN, 0),
    ):
        output = io.StringIO()
        scripted = Scripted(tmp_path, {"ls": [others], "run": [STARTED]}, 0)
        assert module.begin(scripted, None, [], output) == "77"
        first, *rest = output.getvalue().splitlines()
        assert first == "run 77"
        assert len(rest) == count
        if count:
            line = Reader().read(rest[0])
            assert line.kind is Kind.WARNING
            assert "1 other runs have not ended on this SuperLink: 7." in line.text


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"stop": [STARTED], "ls": [listed("finished:stopped")]}, "finished:stopped"),
        # It takes some time, and one answer gets lost.
        (
            {
                "stop": [STARTED],
                "ls": [listed("running"), DOWN, listed("finished:stopped")],
            },
            "finished:stopped",
        ),
        # It ended by itself before it was asked to.
        (
            {"stop": [NOT_FOUND], "ls": [listed("finished:completed")]},
            "finished:completed",
        ),
        ({"stop": [NOT_FOUND], "ls": [NOT_FOUND]}, "run 9 was not stopped: Run ID 9"),
        ({"stop": [DOWN], "ls": [DOWN]}, "SuperLink is unavailable"),
    ],
)
def test_stop_waits_for_the_end(
    tmp_path: Path, answers: dict[str, list[str]], expected: str
) -> None:
    scripted = Scripted(tmp_path, answers, 0)
    if expected.startswith("finished"):
        assert scripted.stop("9") == (expected, "")
    else:
        with pytest.raises(SimulationError, match=expected):
            scripted.stop("9")


def test_detached_start_names_the_commands_and_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Federation, "start", lambda *_: "5")
    monkeypatch.delattr(Federation, "follow")
    arguments = ("federate", "--root-certificates", tmp_path / "ca.crt", "--detach")
    assert run(monkeypatch, *arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == "run 5\n"
    assert f"clip2fl attach 5 --root-certificates {tmp_path}" in captured.err


@pytest.mark.parametrize("command", ["federate", "attach"])
def test_run_that_failed_says_how_to_go_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    def follow(_: Federation, run: str, output: TextIO) -> tuple[str, str]:
        output.write("run folder: /results/a run\n")
        return "finished:failed", "why"

    monkeypatch.setattr(Federation, "start", lambda *_: "5")
    monkeypatch.setattr(Federation, "known", lambda *_: "5")
    monkeypatch.setattr(Federation, "follow", follow)
    options = ("--root-certificates", tmp_path / "ca.crt")
    settings = ("--set", "seed=3") if command == "federate" else ("5",)
    assert run(monkeypatch, command, *options, *settings) == 1
    told = capsys.readouterr().err
    (said,) = re.findall("last checkpoint: (.+)", told)
    assert shlex.split(said)[-2:] == ["--set", 'run.resume="/results/a run"']
    if command == "federate":
        assert said.startswith(f"clip2fl federate --root-certificates {tmp_path}")
        assert "--set seed=3" in said


def test_stop_command_says_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Federation, "known", lambda _, run: run or "5")
    options = ("--root-certificates", tmp_path / "ca.crt")
    for outcome, status, resumes in (
        (("finished:stopped", ""), 0, True),
        (("finished:completed", ""), 0, False),
        (("unknown", "no end within 60 s"), 1, False),
    ):
        monkeypatch.setattr(Federation, "stop", lambda *_, o=outcome: o)
        assert run(monkeypatch, "stop", *options) == status
        captured = capsys.readouterr()
        assert captured.out.startswith(f"run 5: {outcome[0]}")
        assert ("run.resume=" in captured.err) == resumes


def test_log_of_a_run_that_is_followed_again_has_each_line_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    earlier = ["run 4", "one", f"run folder: {folder}", "earlier"]
    log = ["run 5", "one", f"run folder: {folder}", "two", "three", "four"]

    def follow(*lines: str) -> list[str]:
        output = RunOutput(lambda whole, line: None)
        output.write("".join(f"{line}\n" for line in lines))
        output.log.close()
        text = (folder / "run.log").read_text("utf-8")
        return [line.split(" ", 1)[1] for line in text.splitlines()]

    assert follow(*earlier) == earlier
    # A resumed run, followed in three pieces.
    assert follow(*log[:4]) == [*earlier, *log[:4]]
    assert follow(*log[:3]) == [*earlier, *log[:4]]
    assert follow(*log) == [*earlier, *log]
    # A line that differs ends the comparison: nothing is lost.
    assert follow(*log[:4], "else", "four") == [*earlier, *log, "else", "four"]


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
