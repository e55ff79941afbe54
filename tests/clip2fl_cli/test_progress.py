"""What a person sees of a run's log, on a terminal and elsewhere."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from clip2fl_cli.progress import Kind, Line, Reader, RunOutput, RunProgress
from clip2fl_common.metrics import AccuracyReport
from server_app.console import Progress
from server_app.file_names import CONFIG, LOG

ROUND = "round 1/2: 5 clients; re-trained head balanced 9.9 %; 15.1 s, 0:00:15 left"
DROPPED = "round 1: dropped the reply of client 5: a number is not finite"

# As the simulation of two rounds of a run with a bad client writes it.
LOG_LINES = f"""\
Using SuperLink: simulation (127.0.0.1:40437)
WARNING :   Since flwr 1.32, default simulated SuperNodes changed from 10 to 2.
INFO :      To change federation size, use the following command:
method = 'fedavg' does not read distillation.weight = 2.0: the run is the same
(pid=17570) [2026-11-27 11:05:55,233 E 17570 17643] logging.cc:474: *** SIGABRT ***
(raylet) [2026-11-27 11:05:55,233 E 17570] The disk is 95 % full.
2026-11-27 11:05:55,233 INFO worker.py:1 -- Started a local Ray instance.
run folder: FOLDER
INFO :      Starting CLIP2FL strategy:
INFO :      \t├── Number of rounds: 2
INFO :
INFO :      [ROUND 1/2]
WARNING :   {DROPPED}
{ROUND}
INFO :      [ROUND 2/2]
(ClientAppActor pid=7) round 1/2: a client prints what it likes
{ROUND.replace("1/2", "2/2")}
INFO :      Final results:

Accuracy on the test images, %
  1.0
""".replace("\nINFO :\n", "\nINFO :      \n")
SHOWN = f"""\
method = 'fedavg' does not read distillation.weight = 2.0: the run is the same
run folder: FOLDER
warning: {DROPPED}
{ROUND}
{ROUND.replace("1/2", "2/2")}

Accuracy on the test images, %
  1.0
"""
FAILED = """\
ERROR :     Simulation raised an exception
Traceback (most recent call last):
  File "/x/app.py", line 3, in main
    raise OSError("disk") from None
OSError: disk

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/x/app.py", line 9, in main
clip2fl.StorageError: round 3 could not be written
after
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a run's folder, as the server has made it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG).write_text("{}")
    return tmp_path / "run"


def printed(text: str, *, terminal: bool = False, verbose: bool = False) -> str:
    """Return what is printed for a log that comes in pieces."""
    stream = io.StringIO()
    console = Console(file=stream, width=60, force_terminal=terminal, color_system=None)
    with RunProgress(console, verbose) as progress:
        for start in range(0, len(text), 7):
            progress.output.write(text[start : start + 7])
    return stream.getvalue()


def test_lines_that_matter_are_shown_without_a_terminal(folder: Path) -> None:
    text = LOG_LINES.replace("FOLDER", str(folder))
    assert printed(text) == SHOWN.replace("FOLDER", str(folder))


def test_log_file_has_all_lines_with_time_stamps(folder: Path) -> None:
    text = LOG_LINES.replace("FOLDER", str(folder))
    printed(text)
    stamped = (folder / LOG).read_text("utf-8").splitlines()
    assert [line.split(" ", 1)[1] for line in stamped] == text.splitlines()
    times = [line.split(" ", 1)[0] for line in stamped]
    assert times == sorted(times)
    assert len(times[0]) == len("2026-11-27T11:37:14.786+00:00")


def test_end_is_told_once_after_the_last_round() -> None:
    told: list[str] = []
    stream = io.StringIO()
    with RunProgress(
        Console(file=stream), at_end=lambda: told.append(stream.getvalue())
    ) as progress:
        for number in (1, 2):
            progress.output.write(f"INFO :      [ROUND {number}/2]\n")
            assert not told
            progress.output.write(f"round {number}/2: 5 clients; loss 1.0\n")
        progress.output.write("Results and model: somewhere\n")
    assert len(told) == 1 and "somewhere" not in told[0]


def test_verbose_shows_flowers_log_but_not_its_housekeeping(folder: Path) -> None:
    text = LOG_LINES.replace("FOLDER", str(folder))
    lines = text.splitlines()
    kept = [line for n, line in enumerate(lines) if n not in (0, 1, 2)]
    shown = printed(text, verbose=True)
    assert shown.splitlines() == [line.expandtabs() for line in kept]


def test_terminal_has_one_bar_and_the_last_round_below(folder: Path) -> None:
    text = printed(LOG_LINES.replace("FOLDER", str(folder)), terminal=True)
    # Erased and drawn again: what stays begins after the last erasure.
    *_, last = text.split("\x1b[2K")
    assert last.startswith("round 2 ")
    assert "2/2 rounds" in last
    assert ROUND.replace("1/2", "2/2")[:50] in last
    assert f"warning: {DROPPED}" in text
    assert "Number of rounds" not in text
    assert "ClientAppActor" not in text


def test_error_is_shown_without_the_lines_of_its_traceback() -> None:
    reader = Reader()
    found = [reader.read(line) for line in FAILED.splitlines()]
    assert [line.text for line in found if line.kind is Kind.ERROR] == [
        "error: Simulation raised an exception",
        "OSError: disk",
        "clip2fl.StorageError: round 3 could not be written",
    ]
    assert found[-1] == Line(Kind.TEXT, "after")
    hidden = [line.text for line in found if line.kind is Kind.HIDDEN]
    assert len(hidden) == 6


TAKES_PART = "site a (node 7) takes part: x 1"


@pytest.mark.parametrize(
    ("line", "kind", "text"),
    [
        ("INFO :      [ROUND 3/30]", Kind.BEGINNING, "[ROUND 3/30]"),
        ("INFO :      round 3/30: a", Kind.HIDDEN, "INFO :      round 3/30: a"),
        ("WARNING :   lost", Kind.WARNING, "warning: lost"),
        ("CRITICAL :  lost", Kind.ERROR, "critical: lost"),
        ("INFO :      waiting for sites: 1", Kind.TEXT, "waiting for sites: 1"),
        ("INFO :      site a (node 7) takes part: x 1", Kind.TEXT, TAKES_PART),
        ("ERROR :     ", Kind.HIDDEN, "ERROR :     "),
        ("information: x", Kind.TEXT, "information: x"),
        (" round 1/2: x", Kind.TEXT, " round 1/2: x"),
        ("round 1: x", Kind.TEXT, "round 1: x"),
    ],
)
def test_kinds_of_lines(line: str, kind: Kind, text: str) -> None:
    assert Reader().read(line) == Line(kind, text)


def test_line_that_the_server_prints_is_known() -> None:
    report = AccuracyReport(5.0, 5.0, 0.0, 0.0, 9.0, (5.0,))
    line = Progress(30).line(7, {"fedavg": report}, 1.0, clients=3)
    assert Reader().read(line).kind is Kind.ROUND


def test_names_from_outside_cannot_steer_the_terminal() -> None:
    assert printed("a \x1b[31m [red] :boom:\n") == "a \\x1b[31m [red] :boom:\n"


def test_log_stays_in_the_users_folder_if_the_run_has_none(tmp_path: Path) -> None:
    """The server never began, or its folder is on another machine or not writable."""
    for text in ("x\n", f"x\nrun folder: {tmp_path / 'elsewhere'}\n"):
        output = RunOutput(lambda *_: None)
        assert output.log.path is None
        output.write(text)
        assert output.folder is None
        assert output.log.path is not None
        assert output.log.path.parent == tmp_path / "user-logs"
        assert " x\n" in output.log.path.read_text("utf-8")


def test_log_moves_to_the_runs_folder_and_goes_on_there(folder: Path) -> None:
    (folder / LOG).write_text("before the interruption\n")
    output = RunOutput(lambda *_: None)
    output.write("early\n")
    early = output.log.path
    assert early is not None and early.exists()
    output.write(f"run folder: {folder}\nlate")
    assert output.log.path == folder / LOG
    assert not early.exists()
    # Each line is there as soon as it is whole.
    output.write("r\n")
    lines = (folder / LOG).read_text("utf-8").splitlines()
    assert [line.rsplit(" ")[-1] for line in lines] == [
        "interruption",
        "early",
        str(folder),
        "later",
    ]


def test_log_is_not_written_through_a_link(folder: Path, tmp_path: Path) -> None:
    (folder / LOG).symlink_to(tmp_path / "target")
    output = RunOutput(lambda *_: None)
    output.write(f"run folder: {folder}\n")
    assert not (tmp_path / "target").exists()
    assert output.log.path is not None and output.log.path.parent != folder


def test_run_goes_on_without_any_place_for_its_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platformdirs.user_log_dir", lambda *_: "/dev/null/x")
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/dev/null/x")
    output = RunOutput(lambda *_: None)
    assert output.write("x\n") == 2
    assert output.log.path is None
