"""A run is followed to its end, through restarts, and its status is told."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip2fl_cli import federation as federate
from clip2fl_cli.federation import Federation

DOWN = "Error: Connection refused"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federate, "LOOK_SECONDS", 0.0)


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


def test_log_is_printed_once_through_a_restart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {
        "ls": [listed("running"), DOWN, DOWN, listed("finished:completed")],
        # Flower ends what it has so far with empty lines.
        "log": ["one\ntwo\n\n", "one\ntwo\nthree\nfour\n\n"],
    }
    status, _ = Scripted(tmp_path, answers, 60).follow("5")
    assert status == "finished:completed"
    assert capsys.readouterr().out.split() == ["one", "two", "three", "four"]


def test_failed_run_and_lost_superlink_are_told_apart(tmp_path: Path) -> None:
    answers = {"ls": [listed("finished:failed", "why")], "log": [""]}
    assert Scripted(tmp_path, answers, 60).follow("5") == ("finished:failed", "why")
    gone = {"ls": [listed("running"), DOWN, DOWN], "log": [""]}
    status, details = Scripted(tmp_path, gone, 0).follow("5")
    assert status == "unknown" and "no SuperLink" in details


def test_start_waits_for_the_superlink_but_not_for_a_better_configuration(
    tmp_path: Path,
) -> None:
    answers = {"run": [DOWN, "🎊 Successfully started run 77"]}
    assert Scripted(tmp_path, answers, 60).start(tmp_path, tmp_path) == "77"
    answers = {"run": ["app is not valid"]}
    with pytest.raises(RuntimeError, match="app is not valid"):
        Scripted(tmp_path, answers, 60).start(tmp_path, tmp_path)


def test_wrong_key_is_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--root-certificates", str(tmp_path / "ca.crt"), "--set", "oops=1"]
    assert federate.main(arguments) == 2
    assert "'oops' does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
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
    arguments = ["--root-certificates", str(tmp_path / "ca.crt"), "--set", setting]
    assert federate.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_odd_patience_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        federate.parse(["--root-certificates", "ca.crt", "--patience", "nan"])
    assert "argument --patience: must be" in capsys.readouterr().err
