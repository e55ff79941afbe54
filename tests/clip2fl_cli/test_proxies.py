"""Connections to this machine never use the environment's proxy."""

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest

from clip2fl_cli.flower_command import environment
from clip2fl_cli.proxies import direct_here
from tests.defaults import ROOT

PROXIES = {
    "HTTP_PROXY": "http://proxy.invalid:3128",
    "http_proxy": "http://proxy.invalid:3128",
    "HTTPS_PROXY": "http://proxy.invalid:3128",
}


class Healthy(BaseHTTPRequestHandler):
    """Answer every request."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Be silent."""


@pytest.fixture
def url() -> Iterator[str]:
    """Return the address of a server on this machine."""
    server = HTTPServer(("127.0.0.1", 0), Healthy)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/health"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("named", ["", "127.0.0.0/8", "example.org, 10.0.0.1"])
def test_flowers_processes_reach_this_machine_past_a_proxy(
    url: str, named: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the HTTP client that Flower has, which obeys the variables."""
    for name in {*PROXIES, "NO_PROXY", "no_proxy", "https_proxy", "ALL_PROXY"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in PROXIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("no_proxy", named)
    with pytest.raises(httpx.TransportError):
        httpx.get(url)
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    assert httpx.get(url).status_code == 200
    assert urllib.request.proxy_bypass("example.org") == ("example.org" in named)


def test_named_hosts_stay_and_are_named_once() -> None:
    made = direct_here({"NO_PROXY": "a.org,localhost", "no_proxy": " a.org , b.org"})
    assert made == dict.fromkeys(
        ("NO_PROXY", "no_proxy"), "a.org,localhost,b.org,127.0.0.1"
    )
    assert direct_here({"NO_PROXY": "*"})["no_proxy"] == "*"


def test_health_check_does_not_ask_a_proxy(url: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "deploy" / "healthy.py"],
        env={**os.environ, **PROXIES, "NO_PROXY": "", "CLIP2FL_HEALTH_URL": url},
    )
    assert done.returncode == 0
