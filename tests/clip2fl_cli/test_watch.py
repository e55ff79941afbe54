"""The page of `clip2fl watch`, as a browser and as a stranger ask for it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from clip2fl_cli import colours, watch
from clip2fl_cli.live import RunWatch
from clip2fl_cli.newest import NewestRun
from clip2fl_cli.watch import EVERY_S, SHOWN_SITES, read_token, serve, watch_app
from server_app.file_names import CONFIG
from strategy.events import What
from tests.clip2fl_cli.made_up_live import tell, two_rounds_and_a_half, unfinished, used
from tests.defaults import ROOT

TOKEN = "the-token"


def client(folder: Path, host: str = "127.0.0.1:4321") -> TestClient:
    """Return what asks the page of a run by a name."""
    return TestClient(watch_app(RunWatch(folder), TOKEN), base_url=f"http://{host}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a run with five rounds, of which two are over."""
    made = unfinished(tmp_path / "run", 2, 5, method="creff")
    two_rounds_and_a_half(made)
    return made


@pytest.mark.parametrize(
    "path", ["/", "/state", "/metrics", "/docs", "/openapi.json", "/else"]
)
@pytest.mark.parametrize(
    "query", ["", "?token=", "?token=the-toke", "?token=the-token2", "?token=%ff\u00e9"]
)
def test_no_request_without_the_token(folder: Path, path: str, query: str) -> None:
    answer = client(folder).get(path + query)
    assert answer.status_code == 403
    assert "round" not in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:4321", 200),
        ("localhost:8080", 200),
        ("evil.example:4321", 400),
        ("127.0.0.1.evil.example", 400),
        ("0.0.0.0:4321", 400),
    ],
)
def test_only_names_of_this_machine(folder: Path, host: str, status: int) -> None:
    """So a page whose own name points to this machine reads nothing."""
    for path in ("/", "/state"):
        answer = client(folder, host).get(f"{path}?token={TOKEN}")
        assert answer.status_code == status
        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["cache-control"] == "no-store"
        assert ("creff" in answer.text) == (status == 200 and path == "/state")


def test_page_needs_nothing_else_and_allows_only_its_own_script(folder: Path) -> None:
    answers = [client(folder).get(f"/?token={TOKEN}") for _ in range(2)]
    nonces = []
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        (nonce,) = set(re.findall(r"'nonce-([\w-]+)'", policy))
        nonces.append(nonce)
        assert "unsafe" not in policy
        parts = dict(part.split(" ", 1) for part in policy.split("; "))
        assert parts["default-src"] == "'none'"
        assert parts["connect-src"] == "'self'"
        assert parts["frame-ancestors"] == "'none'"
        assert answer.text.count("<script") == 1
        assert f'<script nonce="{nonce}">' in answer.text
        assert f'<style nonce="{nonce}">' in answer.text
        addresses = re.findall(r"""(?:src|href)=["']([^"']*)""", answer.text)
        assert addresses == ["data:,"]
        assert re.findall(r"https?://[\w./]+", answer.text) == [
            "http://www.w3.org/2000/svg"
        ]
        # Neither would run: the policy forbids both.
        assert not re.search(r"""\son\w+=["']|\sstyle=["']""", answer.text)
        assert TOKEN not in answer.text
        assert colours.css(dark=False) in answer.text
        assert colours.css(dark=True) in answer.text
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert nonces[0] != nonces[1]


def test_state_has_curves_sites_and_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "EVERY_S", 0.0)
    (folder / "run.log").write_text("first\nsecond\n")
    asked = client(folder)
    with used(folder):
        found = asked.get(f"/state?token={TOKEN}").json()
        assert (found["state"], found["round"], found["done"]) == ("running", 3, 2)
        assert found["log"] == ["first", "second"]
        (curve,) = found["curves"]
        assert curve["balanced"] == curve["few"] == [[1, 10.0], [2, 20.0]]
        assert f"--{curve['colour']}:" in colours.css(dark=False)
        assert [site["name"] for site in found["sites"]] == ["b", "c", "a", "node 7"]
        for number in range(SHOWN_SITES):
            tell(folder, 60, What.ASKED, 3, site=number)
        found = asked.get(f"/state?token={TOKEN}").json()
        assert len(found["sites"]) == SHOWN_SITES
        assert found["more_sites"] == 4
    tell(folder, 61, What.RUN_FAILED, 3, reason="OSError: no\x1b space\u202e")
    found = asked.get(f"/state?token={TOKEN}").json()
    assert (found["state"], found["reason"]) == (
        "failed",
        r"OSError: no\x1b space\u202e",
    )


def test_delivered_head_comes_first_in_the_colours_of_reports(folder: Path) -> None:
    """Although it is missing in the first round."""
    with (folder / "metrics.jsonl").open("a") as file:
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        own = last["accuracy"]["fedavg"]
        last |= {"round": 3, "accuracy": {"retrained": own, "fedavg": own}}
        file.write(json.dumps(last) + "\n")
    found = client(folder).get(f"/state?token={TOKEN}").json()
    assert [curve["title"] for curve in found["curves"]] == [
        "re-trained head",
        "model's own head",
    ]
    assert [len(curve["few"]) for curve in found["curves"]] == [1, 3]
    style = colours.styles({"run": "creff"})["run"]
    for number, curve in enumerate(found["curves"]):
        assert colours.VARIABLES[curve["colour"]] == style.of_head(number).colour
        assert tuple(curve["dash"]) == style.of_head(number).dash


def test_folder_that_goes_bad_is_a_message(folder: Path) -> None:
    (folder / "events.jsonl").unlink()
    (folder / "events.jsonl").mkdir()
    answer = client(folder).get(f"/state?token={TOKEN}")
    assert "events.jsonl is a folder" in answer.json()["problem"]
    assert answer.headers["content-type"] == "application/json"
    assert client(folder).post(f"/state?token={TOKEN}").status_code == 405


def test_newest_run_of_a_folder_is_followed(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    asked = TestClient(
        watch_app(NewestRun(runs), TOKEN), base_url="http://127.0.0.1:4321"
    )

    def state() -> dict[str, Any]:
        time.sleep(EVERY_S + 0.1)
        answer: dict[str, Any] = asked.get(f"/state?token={TOKEN}").json()
        return answer

    assert state() == {"problem": f"{runs} has no run yet"}
    first = unfinished(runs / "first", 2, 5, method="creff")
    two_rounds_and_a_half(first)
    (runs / "no run").mkdir()
    # A link could lead to a run that another user must not see.
    (runs / "link").symlink_to(unfinished(tmp_path / "else", 1, 9))
    found = state()
    assert (found["name"], found["method"], found["rounds"]) == ("first", "creff", 5)
    assert found["curves"]
    unfinished(runs / "second", 1, 3, method="fedavg")
    os.utime(runs / "first" / CONFIG, (1, 1))
    found = state()
    assert (found["name"], found["done"], found["rounds"]) == ("second", 1, 3)
    # A resumed run writes its configuration again.
    os.utime(runs / "first" / CONFIG)
    assert state()["name"] == "first"


def test_token_that_is_no_text_is_refused_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xe9" * 40)
    with pytest.raises(ValueError, match=f"{tmp_path / 'token'} holds no token"):
        read_token(tmp_path / "token")


def test_address_that_cannot_be_listened_on_is_named(folder: Path) -> None:
    with pytest.raises(OSError, match=r"--host no\.such\.host\.invalid, --port 0 \("):
        serve(RunWatch(folder), print, host="no.such.host.invalid")


def test_prometheus_reads_the_numbers_with_the_token(folder: Path) -> None:
    asked = client(folder)
    for query, headers, status in (
        (f"?token={TOKEN}", {}, 200),
        ("", {"Authorization": f"Bearer {TOKEN}"}, 200),
        ("", {"Authorization": "Bearer other"}, 403),
        ("?token=other", {"Authorization": f"Bearer {TOKEN}"}, 403),
    ):
        answer = asked.get(f"/metrics{query}", headers=headers)
        assert answer.status_code == status
        if status == 200:
            assert answer.headers["content-type"].startswith("text/plain; version=0.0")
            assert 'clip2fl_rounds_over{run="run"} 2\n' in answer.text
    (folder / "events.jsonl").unlink()
    (folder / "events.jsonl").mkdir()
    answer = client(folder).get(f"/metrics?token={TOKEN}")
    # A scrape that fails, not one without numbers.
    assert answer.status_code == 500
    assert "events.jsonl is a folder" in answer.text


def test_token_file_must_be_long_and_private(tmp_path: Path) -> None:
    file = tmp_path / "token"
    for text, mode, problem in (
        ("short", 0o600, "holds no token"),
        ("x" * 31 + "?", 0o600, "holds no token"),
        ("x" * 40, 0o640, "can be read by other users"),
    ):
        file.write_text(text)
        file.chmod(mode)
        with pytest.raises(ValueError, match=problem):
            watch.read_token(file)
    file.chmod(0o600)
    file.write_text("x" * 40 + "\n")
    assert watch.read_token(file) == "x" * 40


def test_command_serves_until_ctrl_c(folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "clip2fl_cli.app", "watch", str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            address = line.removeprefix("Open ").strip()
            parts = urlsplit(address)
            assert parts.hostname == "127.0.0.1"
            assert len(parts.query) > 40
            state = address.replace("/?", "/state?")
            with urllib.request.urlopen(state, timeout=20) as answer:
                assert json.load(answer)["state"] == "stopped"
                assert "server" not in {name.lower() for name in answer.headers}
            # Reachable by no other address of this machine.
            with (
                pytest.raises(OSError),
                socket.create_connection(("127.0.0.2", parts.port or 0), timeout=5),
            ):
                pass
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0
    assert out == ""
    assert err == "clip2fl: the page has ended; a run that is running goes on\n"
