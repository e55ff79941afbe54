"""The state of a run, from made-up files in its folder."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_cli.live import VANISHED, RunState, RunWatch, SiteState, Status
from clip2fl_cli.run_schema import Images
from clip2fl_cli.status import sentences, site_rows
from clip2fl_common.metrics import ShotGroups
from server_app.console import COLUMNS, Row, final_table
from server_app.folder_lock import in_use
from strategy.events import What
from tests.clip2fl_cli.commands import refused, run
from tests.clip2fl_cli.made_up_live import (
    BEGIN,
    after,
    tell,
    two_rounds_and_a_half,
    unfinished,
    used,
)


def test_running_run(tmp_path: Path) -> None:
    folder = unfinished(tmp_path / "run", 2, 5, method="creff", seed=3)
    two_rounds_and_a_half(folder)
    with used(folder):
        status = RunWatch(folder).look(after(61))
    assert (status.name, status.method, status.seed) == ("run", "creff", 3)
    assert status.state is RunState.RUNNING
    assert (status.round, status.done, status.rounds) == (3, 2, 5)
    assert [(p.name, p.seconds) for p in status.phases] == [("clients", 10)]
    assert status.elapsed == 61
    # The first round counts only if there is no other: 3 x 20 s, of which 10 are over.
    assert status.seconds_left == 50
    assert status.accuracy["fedavg"].balanced == 20.0
    assert (status.accuracy_round, status.images) == (2, Images.ALL)
    rows = [(s.name, s.state, s.round, s.images, s.reason) for s in status.sites]
    assert rows == [
        ("b", SiteState.TRAINING, 3, 20, ""),
        ("c", SiteState.DROPPED, 3, None, "not finite"),
        ("a", SiteState.AWAY, 2, 20, ""),
        ("node 7", SiteState.REFUSED, None, None, "no key"),
    ]
    # A site that was asked, or is away, has not been heard of.
    seen = {s.name: s.last_seen for s in status.sites}
    assert seen == {"a": after(49), "b": after(49), "c": after(57), "node 7": after(59)}


def test_site_has_its_accuracy_and_the_time_that_it_still_needs(
    tmp_path: Path,
) -> None:
    folder = unfinished(tmp_path / "run", 1, 3)
    tell(folder, 0, What.RUN_STARTED, 0)
    # It trains for 30 s, and evaluates for 8 s.
    for number, start in ((1, 0), (2, 50)):
        tell(folder, start, What.ROUND_STARTED, number)
        tell(folder, start, What.PHASE, number, phase="clients")
        tell(folder, start + 1, What.ASKED, number, site="a", bytes=4000)
        if number == 2:
            break
        tell(folder, start + 31, What.REPLIED, number, site="a")
        own = {"images": 7, "seconds": 25.0, "bytes": 1000}
        tell(folder, start + 33, What.ACCEPTED, number, site="a", **own)
        tell(folder, start + 34, What.PHASE, number, phase="evaluation")
        tell(folder, start + 34, What.ASKED, number, site="a")
        tell(folder, start + 42, What.REPLIED, number, site="a")
        found = {"images": 3, "seconds": 6.0, "accuracy": 62.5}
        tell(folder, start + 43, What.EVALUATED, number, site="a", **found)
        tell(folder, start + 44, What.ROUND_ENDED, number)
    watch = RunWatch(folder)
    with used(folder):
        (site,) = watch.look(after(63)).sites
        assert (site.state, site.seconds_left) == (SiteState.TRAINING, 18)
        assert (site.accuracy, site.images, site.seconds) == (62.5, 7, 25.0)
        assert watch.look(after(200)).sites[0].seconds_left == 0
        tell(folder, 90, What.PHASE, 2, phase="evaluation")
        tell(folder, 90, What.ASKED, 2, site="a")
        (site,) = watch.look(after(93)).sites
        assert (site.state, site.seconds_left) == (SiteState.EVALUATING, 5)
        header, rows = site_rows(watch.look(after(93)), after(93))
        row = dict(zip(header, rows[0], strict=True))
        assert (row["accuracy, %"], row["left"]) == ("62.5", "0:00:05")
        # Lost while it is asked: Flower's error for the lost node comes after.
        tell(folder, 95, What.AWAY, 2, site="a")
        tell(folder, 96, What.DROPPED, 2, site="a", reason="node unavailable")
        (site,) = watch.look(after(97)).sites
        assert (site.state, site.reason) == (SiteState.AWAY, "node unavailable")
        assert site.seconds_left is None
        tell(folder, 98, What.BACK, 2, site="a")
        assert watch.look(after(99)).sites[0].state is SiteState.CONNECTED


def test_the_same_watch_sees_what_comes(tmp_path: Path) -> None:
    folder = unfinished(tmp_path / "run", 1, 3)
    watch = RunWatch(folder)
    with used(folder):
        status = watch.look(BEGIN)
        assert (status.state, status.has_events) == (RunState.RUNNING, False)
        assert (status.done, status.round, status.sites) == (1, None, [])
        tell(folder, 0, What.RUN_STARTED, 0)
        tell(folder, 0, What.ROUND_STARTED, 1)
        for second, name in ((1, "clients"), (4, "checks"), (5, "evaluation")):
            tell(folder, second, What.PHASE, 1, phase=name)
            phases = watch.look(after(6)).phases
            assert phases[-1].name == name
            assert phases[-1].seconds == 6 - second
        tell(folder, 5, What.ASKED, 1, site="a")
        assert watch.look(after(6)).sites[0].state is SiteState.EVALUATING
        tell(folder, 7, What.ROUND_ENDED, 1)
        status = watch.look(after(9))
        assert (status.round, status.done, status.seconds_left) == (None, 1, 14)
        assert [p.seconds for p in status.phases] == [3, 1, 2]
        # It has not replied, and the round is over.
        assert status.sites[0].state is SiteState.SILENT
        # A resumed run begins anew after an earlier checkpoint.
        tell(folder, 100, What.RUN_STARTED, 0)
        status = watch.look(after(110))
        assert (status.done, status.elapsed, status.seconds_left) == (0, 10, None)


@pytest.mark.parametrize(
    ("what", "state", "reason"),
    [
        (What.RUN_ENDED, RunState.COMPLETED, ""),
        (What.RUN_FAILED, RunState.FAILED, "OSError: no space"),
        (What.RUN_STOPPED, RunState.STOPPED, "SystemExit"),
        (None, RunState.STOPPED, VANISHED),
    ],
)
def test_run_that_is_over(
    tmp_path: Path, what: What | None, state: RunState, reason: str
) -> None:
    folder = unfinished(tmp_path / "run", 2, 5)
    two_rounds_and_a_half(folder)
    if what is not None:
        told = {"reason": reason} if reason else {}
        tell(folder, 59, what, 3, **told)
    (folder / ".lock").touch()
    status = RunWatch(folder).look(after(10_000))
    assert (status.state, status.reason) == (state, reason)
    assert (status.round, status.done, status.seconds_left) == (None, 2, None)
    assert status.elapsed == 59
    if what is not None:
        assert status.sites[0].state is SiteState.SILENT


@pytest.mark.parametrize("what", [What.RUN_STOPPED, What.RUN_FAILED])
def test_run_that_is_resumed_works_before_it_says_so(
    tmp_path: Path, what: What
) -> None:
    """It may compute its teacher's accuracy for minutes; a complete run stays so."""
    folder = unfinished(tmp_path / "run", 2, 5)
    two_rounds_and_a_half(folder)
    tell(folder, 59, what, 3, reason="SystemExit")
    with FileLock(folder / ".lock"):
        assert RunWatch(folder).look(after(70)).state is RunState.RUNNING
        tell(folder, 71, What.RUN_ENDED, 3)
        assert RunWatch(folder).look(after(80)).state is RunState.COMPLETED


def test_complete_run_of_an_early_version(tmp_path: Path) -> None:
    folder = unfinished(tmp_path / "run", 3, 3)
    (folder / "model.safetensors").touch()
    status = RunWatch(folder).look()
    assert (status.state, status.done) == (RunState.COMPLETED, 3)
    assert "no events.jsonl" in " ".join(sentences(status))


def test_images_that_are_held_out_stay_unseen(tmp_path: Path) -> None:
    folder = unfinished(tmp_path / "run", 1, 3, evaluation__tuning_share=0.2)
    watch = RunWatch(folder)
    status = watch.look()
    assert status.images is Images.TUNING
    assert status.accuracy["fedavg"].balanced == 14.0
    assert watch.curves()["fedavg"]["balanced"] == [(1, 14.0)]


def test_log_tail_leaves_out_what_the_table_tells_of_held_out_images(
    tmp_path: Path,
) -> None:
    rows: dict[str, Row] = {
        "clip2fl, re-trained head": dict.fromkeys(COLUMNS, 31.5),
        "clip2fl, re-trained head, held out": {
            **dict.fromkeys(COLUMNS, 41.5),
            "few": None,
        },
        "clip2fl, re-trained head, for tuning": dict.fromkeys(COLUMNS, 51.5),
        "teacher zero-shot": dict.fromkeys(COLUMNS, 61.5),
    }
    table = final_table(rows, ShotGroups("rank", (0,), (1,), (2,)), ["a", "b", "c"], 9)
    for share, hidden in ((0.2, True), (0.0, False)):
        folder = unfinished(tmp_path / str(share), 1, 3, evaluation__tuning_share=share)
        log = f"round 1/3: 100 clients\n{table}\nResults and model: /x\n"
        stamped = [f"2026-01-01T00:00:00.000+00:00 {line}" for line in log.splitlines()]
        (folder / "run.log").write_text("\n".join([*stamped, ""]))
        watch = RunWatch(folder)
        watch.look()
        tail = "\n".join(watch.log_tail())
        assert "51.5" in tail and "round 1/3: 100 clients" in tail
        assert "Results and model: /x" in tail and "mean of the last 5 rounds" in tail
        for number in ("31.5", "41.5", "61.5"):
            assert (number in tail) is not hidden


def test_replaced_metrics_are_read_again(tmp_path: Path) -> None:
    folder = unfinished(tmp_path / "run", 3, 4)
    watch = RunWatch(folder)
    watch.look()
    assert [n for n, _ in watch.curves()["fedavg"]["few"]] == [1, 2, 3]
    first = (folder / "metrics.jsonl").read_text().splitlines()[0]
    (folder / "new").write_text(f"{first}\n")
    os.replace(folder / "new", folder / "metrics.jsonl")
    watch.look()
    assert watch.curves()["fedavg"]["few"] == [(1, 10.0)]


def test_log_tail_is_short_whole_and_harmless(tmp_path: Path) -> None:
    folder = unfinished(tmp_path / "run", 1, 3)
    watch = RunWatch(folder)
    assert watch.log_tail() == []
    many = "".join(f"line {n} {'x' * 400}\n" for n in range(1000))
    (folder / "run.log").write_text(f"{many}\tred \x1b[31m\u202e\nhalf")
    tail = watch.log_tail()
    assert 100 < len(tail) <= 200
    assert all(line.startswith("line ") for line in tail[:-1])
    assert tail[-2].startswith("line 999 ")
    assert tail[-1] == r"        red \x1b[31m\u202e"


def test_looking_does_not_hinder_a_run(tmp_path: Path) -> None:
    assert not in_use(tmp_path)
    with used(tmp_path):
        assert in_use(tmp_path)
    assert not in_use(tmp_path)
    (tmp_path / "else").symlink_to("nowhere")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "else"]


EVENTS = st.fixed_dictionaries(
    {
        "time": st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat),
        "what": st.sampled_from(list(What)),
        "round": st.integers(0, 2**62),
    },
    optional={
        "site": st.sampled_from(["a", 1, "\u202e<b>", "x" * 400]),
        "phase": st.sampled_from(["clients", "evaluation"]),
        "images": st.integers(0, 2**62),
        "seconds": st.floats(0, 1e13),
        "bytes": st.integers(0, 2**62),
        "accuracy": st.floats(0, 100),
        "reason": st.text(max_size=30),
    },
)


@given(
    lines=st.lists(EVENTS.map(json.dumps) | st.text(max_size=20), max_size=30),
    cut=st.integers(0, 50),
)
def test_any_events_give_a_state_that_can_be_shown(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], cut: int
) -> None:
    """In any order, at any time, torn anywhere."""
    folder = unfinished(tmp_path_factory.mktemp("any") / "run", 1, 3)
    text = "\n".join(lines).encode("utf-8", "surrogatepass")
    (folder / "events.jsonl").write_bytes(text[: max(0, len(text) - cut)])
    with used(folder):
        status = RunWatch(folder).look()
    shown = json.dumps(status.fields(), allow_nan=False)
    assert "\u202e" not in shown.encode().decode("unicode_escape")
    assert (status.seconds_left or 0) >= 0
    assert all(phase.seconds >= 0 for phase in status.phases)
    header, rows = site_rows(status)
    assert all(len(row) == len(header) for row in rows)
    assert sentences(status)


def test_what_is_no_run_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command in ("status", "watch"):
        line = refused(monkeypatch, capsys, command, tmp_path / "nothing")
        assert "is no run's folder: it has no config.json" in line
        folder = unfinished(tmp_path / command, 1, 3)
        os.mkfifo(folder / "events.jsonl")
        line = refused(monkeypatch, capsys, command, folder)
        assert "events.jsonl is a FIFO, but it must be a file" in line
        (folder / "config.json").write_text("{}")
        line = refused(monkeypatch, capsys, command, folder)
        assert "config.json: config is missing" in line


def test_command_says_the_state(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = unfinished(tmp_path / "run", 2, 5)
    two_rounds_and_a_half(folder)
    with used(folder):
        assert run(monkeypatch, "status", folder) == 0
        text = capsys.readouterr().out
        assert run(monkeypatch, "status", folder, "--json") == 0
        found = json.loads(capsys.readouterr().out)
    assert "running, 2 of 5 rounds are over; round 3, clients; about " in text
    assert "model's own head: balanced 20.0 %, few-shot 20.0 %" in text
    for name in ("training", "dropped", "not finite", "node 7", "last seen"):
        assert name in text
    assert found["state"] == "running"
    assert (found["round"], found["done"], found["rounds"]) == (3, 2, 5)
    assert found["sites"][1] == {
        "name": "c",
        "state": "dropped",
        "round": 3,
        "last_seen": after(57).isoformat(),
        "images": None,
        "seconds": None,
        "bytes": None,
        "accuracy": None,
        "seconds_left": None,
        "versions": {},
        "other_versions": "",
        "reason": "not finite",
    }
    assert set(found) == set(Status.__dataclass_fields__)
