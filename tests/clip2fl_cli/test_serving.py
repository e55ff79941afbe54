"""A server as one command; tests/deployment/test_own_images.py starts a real one."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from clip2fl_cli import serving as module
from clip2fl_cli.serving import ServerError, Serving
from clip2fl_cli.signals import interrupting
from tests.clip2fl_cli.commands import run
from tests.defaults import ROOT
from tests.tools import needed_tool

UNITS = ROOT / "deploy" / "systemd"


def options(text: str) -> dict[str, str]:
    """Return the options of a command with their values."""
    words = [*re.sub(r"\\\n", " ", text).split(), "--"]
    return {
        word: "" if following.startswith("--") else following
        for word, following in zip(words, words[1:], strict=False)
        if word.startswith("--")
    }


@pytest.mark.parametrize("part", ["superlink", "superexec"])
def test_parts_are_as_closed_as_the_services(tmp_path: Path, part: str) -> None:
    """The same options; only folders differ."""
    unit = (UNITS / f"clip2fl-{part}.service").read_text("utf-8")
    (command,) = re.findall(r"^ExecStart=((?:.*\\\n)*.*)$", unit, flags=re.M)
    serving = Serving(tmp_path, [], 9092, 8000)
    made = options(" ".join(getattr(module, f"{part}_command")(serving)))
    expected = options(command)
    assert made.keys() == expected.keys()
    for name, value in made.items():
        if value.startswith("/"):
            assert Path(value).name == Path(expected[name]).name
            assert Path(value).is_relative_to(tmp_path)
        else:
            assert value == expected[name]


def test_proxy_is_the_deployments_with_this_servers_places(tmp_path: Path) -> None:
    text = module.nginx_configuration(Serving(tmp_path, [], 9443, 8123))
    assert "listen 9443 ssl;" in text and "server 127.0.0.1:8123;" in text
    assert f"ssl_certificate {tmp_path}/proxy/proxy.crt;" in text
    assert " /keys/" not in text and "/tmp/nginx" not in text.replace(str(tmp_path), "")
    places = re.findall(r"location ([^{]*?) \{", text)
    original = (ROOT / "deploy" / "nginx.conf").read_text("utf-8")
    assert places == re.findall(r"location ([^{]*?) \{", original)


def says(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: str | int | Path,
) -> str:
    """Return the one line that the command says when it cannot serve."""
    assert run(monkeypatch, "serve", *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_hinders_a_server_is_said_before_anything_is_made(
    short_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = short_folder / "server"
    monkeypatch.setattr(module.shutil, "which", lambda *_, **__: None)  # type: ignore[attr-defined]
    line = says(monkeypatch, capsys, folder)
    assert "nginx is not installed: apt-get install nginx-light" in line
    monkeypatch.setattr(module.shutil, "which", lambda *_, **__: "/bin/false")  # type: ignore[attr-defined]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = says(monkeypatch, capsys, folder, "--port", port)
        assert f"port {port} cannot be used" in line and "--superlink-port" in line
    line = says(monkeypatch, capsys, tmp_path / "a b", "--port", port)
    assert "characters that nginx would misread" in line
    monkeypatch.setattr(module, "DEPLOY", tmp_path / "none")
    assert "needs the whole checkout" in says(monkeypatch, capsys, folder)
    assert not folder.exists()


def test_names_are_those_of_the_certificate(tmp_path: Path) -> None:
    """Keys that were made for localhost serve no other name, whatever is asked for."""
    needed_tool("openssl")
    script = str(ROOT / "deploy" / "make-keys.sh")
    folder = tmp_path / "server"
    subprocess.run([script, "server", folder, "10.0.0.7"], check=True)
    names = ["localhost", "127.0.0.1", "10.0.0.7"]
    assert sorted(module._names(Serving(folder, [], 9092, 8000))) == sorted(names)
    module._names(Serving(folder, ["10.0.0.7"], 9092, 8000))
    asked = Serving(folder, ["fl.example.org"], 9092, 8000)
    with pytest.raises(
        ServerError, match=f"renew {folder} .*10.0.0.7.* fl.example.org"
    ):
        module._names(asked)


def test_second_signal_kills_the_parts(tmp_path: Path) -> None:
    """None is left behind, although it does not end on SIGTERM."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "trust").mkdir()
    deaf = "import signal, time; signal.signal(15, print); print('on', flush=True)"
    with interrupting():
        with module._Parts(Serving(tmp_path, [], 9092, 8000)) as parts:
            parts.start("proxy", [sys.executable, "-c", f"{deaf}; time.sleep(600)"])
            log = tmp_path / "logs" / "proxy.log"
            (process,) = parts._processes.values()
            end = time.monotonic() + 60
            while "on" not in log.read_text("utf-8"):
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.05)
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            began = time.monotonic()
    assert process.poll() == -signal.SIGKILL
    assert time.monotonic() - began < module.STOP_SECONDS
