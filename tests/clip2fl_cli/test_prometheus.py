"""The state of a run for Prometheus, read by a small parser of its text format."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_cli.live import RunWatch
from clip2fl_cli.prometheus import Gauge, exposition
from tests.clip2fl_cli.commands import refused, run
from tests.clip2fl_cli.made_up_live import (
    after,
    two_rounds_and_a_half,
    unfinished,
    used,
)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
CODES = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}
LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\\n]|\\[\\"n])*)"(,?)')


def parsed(text: str) -> Samples:
    """Return all samples, read by the rules of the format's documentation."""
    found: Samples = {}
    declared: list[str] = []
    assert text.endswith("\n")
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# HELP "):
            assert re.fullmatch(rf"# HELP {NAME} \S.*", line)
            continue
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert kind == "gauge" and name not in declared
            declared.append(name)
            continue
        sample = re.fullmatch(rf"({NAME})\{{(.*)\}} (\S+)", line)
        assert sample is not None, line
        # The samples of a metric follow its declaration.
        assert sample[1] == declared[-1]
        labels, rest = {}, sample[2]
        while rest:
            pair = LABEL.match(rest)
            assert pair is not None, rest
            labels[pair[1]] = re.sub(r'\\[\\"n]', lambda m: CODES[m[0]], pair[2])
            rest = rest[pair.end() :]
        key = sample[1], frozenset(labels.items())
        assert key not in found
        found[key] = float(sample[3])
    return found


@given(
    labels=st.dictionaries(st.sampled_from(["a", "b_c", "d1"]), st.text()),
    value=st.floats(allow_nan=False) | st.integers(-(2**53), 2**53),
)
def test_any_label_and_number_comes_through(
    labels: dict[str, str], value: float
) -> None:
    text = str(Gauge("x", "About x.", [(labels, value), ({}, None)]))
    assert parsed(text) == {("clip2fl_x", frozenset(labels.items())): value}


def test_numbers_are_those_of_the_state(tmp_path: Path) -> None:
    folder = unfinished(tmp_path / 'r"\\un', 2, 5, method="creff", seed=3)
    two_rounds_and_a_half(folder)
    with used(folder):
        status = RunWatch(folder).look(after(61))
    found = parsed(exposition(status))

    def value(name: str, **labels: str) -> float | None:
        labels["run"] = 'r"\\un'
        return found.get((f"clip2fl_{name}", frozenset(labels.items())))

    assert value("run_info", method="creff", dataset="demo", seed="3") == 1
    states = ("running", "completed", "failed", "stopped")
    assert [value("run_state", state=s) for s in states] == [1, 0, 0, 0]
    names = ("rounds", "rounds_over", "round", "elapsed_seconds", "left_seconds")
    assert [value(name) for name in names] == [5, 2, 3, 61, 50]
    assert value("phase_seconds", phase="clients") == 10
    assert value("accuracy_percent", head="fedavg", classes="all") == 20
    assert value("site_state", site="a", state="away") == 1
    assert value("site_state", site="a", state="accepted") is None
    assert value("site_state", site="b", state="training") == 1
    assert value("site_images", site="b") == 20
    assert value("site_work_seconds", site="b") == 2.5
    assert value("site_reply_bytes", site="b") == 1000
    seen = value("site_last_seen_timestamp_seconds", site="c")
    assert seen == after(57).timestamp()
    # It was asked at 52 s, and took 28 and 18 s before.
    assert value("site_left_seconds", site="b") == 9
    assert value("site_images", site="c") is None


def test_command_prints_the_format_or_json_not_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unfinished(tmp_path / "run", 2, 5)
    two_rounds_and_a_half(folder)
    assert run(monkeypatch, "status", folder, "--prometheus") == 0
    found = parsed(capsys.readouterr().out)
    stopped = frozenset({"run": "run", "state": "stopped"}.items())
    assert found["clip2fl_run_state", stopped] == 1
    assert run(monkeypatch, "status", folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["state"] == "stopped"
    line = refused(monkeypatch, capsys, "status", folder, "--json", "--prometheus")
    assert "--json and --prometheus" in line
