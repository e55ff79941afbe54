"""A local page that shows a run while it runs.

The server listens on this machine only. Other users and pages of other sites can reach
it, too: so each request needs a random token, and the name by which the browser asks
must be this machine's. Otherwise a page could have its own name point here (DNS
rebinding) and read the answers.
"""

import re
import secrets
import socket
import stat
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from clip2fl_cli import colours
from clip2fl_cli.html import render
from clip2fl_cli.live import RunWatch, Status
from clip2fl_cli.newest import NewestRun
from clip2fl_cli.prometheus import CONTENT_TYPE, exposition
from clip2fl_common.shown import shown
from server_app.foreign_files import ForeignFileError

HOST = "127.0.0.1"
# A tunnel (ssh -L) may be asked by this name, too.
NAMES = [HOST, "localhost"]
# Several open pages do not read the files more often than this.
EVERY_S = 0.5
# The page shows the sites asked last; a simulation may have thousands of clients.
SHOWN_SITES = 200
CLOSED = (
    "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": CLOSED,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Views:
    """What the page shows, read again at most every `EVERY_S` seconds.

    Parameters
    ----------
    watch : RunWatch or NewestRun
        The run.
    """

    def __init__(self, watch: RunWatch | NewestRun) -> None:
        self._watch = watch
        # The server answers requests in several threads.
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._status: Status | None = None
        self._view: dict[str, Any] = {}

    def view(self) -> dict[str, Any]:
        """Return the run's state, curves and last lines of the log, for JSON.

        Raises
        ------
        ForeignFileError
            If the folder holds no run, or a file has not the form that a run writes.
        """
        with self._lock:
            self._look()
            return self._view

    def metrics(self) -> str:
        """Return the run's state in Prometheus' text format.

        Raises
        ------
        ForeignFileError
            As in `view`.
        """
        with self._lock:
            return exposition(self._look())

    def _look(self) -> Status:
        """Read the files again, unless that was done a moment ago."""
        if self._status is None or time.monotonic() - self._read_at > EVERY_S:
            status = self._status = self._watch.look()
            self._view = {
                **status.fields(),
                "sites": [s.fields() for s in status.sites[:SHOWN_SITES]],
                "more_sites": max(0, len(status.sites) - SHOWN_SITES),
                "curves": _drawn(self._watch.curves(), status),
                "log": self._watch.log_tail(),
                "now": datetime.now(UTC).isoformat(),
            }
            self._read_at = time.monotonic()
        return self._status


def _drawn(curves: dict[str, dict[str, Any]], status: Status) -> list[dict[str, Any]]:
    """Return the curves of all heads, the delivered one first, with their styles."""
    style = colours.styles({"run": status.method})["run"]
    names = {colour: name for name, colour in colours.VARIABLES.items()}
    # A line of metrics.jsonl begins with the head that is delivered.
    heads = dict.fromkeys([*status.accuracy, *curves])
    return [
        {
            **curves[head],
            "colour": names[style.of_head(place).colour],
            "dash": style.of_head(place).dash,
        }
        for place, head in enumerate(heads)
    ]


def watch_app(watch: RunWatch | NewestRun, token: str) -> FastAPI:
    """Return the web application.

    The page is at ``/``, its numbers are at ``/state``, and at ``/metrics`` in
    Prometheus' text format.

    Parameters
    ----------
    watch : RunWatch or NewestRun
        The run.
    token : str
        Each request must have it as the parameter ``token``, or as the bearer token in
        the header ``Authorization``.

    Returns
    -------
    FastAPI
    """
    # Without these pages, nothing tells what can be asked.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    views = Views(watch)

    @app.get("/")
    def page() -> Response:
        nonce = secrets.token_urlsafe(16)
        allowed = (
            f"{CLOSED}; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "connect-src 'self'; img-src data:"
        )
        return HTMLResponse(
            render("watch.html.j2", nonce=nonce),
            headers={"Content-Security-Policy": allowed},
        )

    @app.get("/state")
    def state() -> Response:
        try:
            return JSONResponse(views.view())
        except ForeignFileError as error:
            return JSONResponse({"problem": str(error)})

    @app.get("/metrics")
    def metrics() -> Response:
        try:
            return PlainTextResponse(views.metrics(), media_type=CONTENT_TYPE)
        except ForeignFileError as error:
            return PlainTextResponse(f"{error}\n", 500)

    @app.middleware("http")
    async def guard(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        given = request.query_params.get("token", bearer)
        if not secrets.compare_digest(given.encode(), token.encode()):
            return PlainTextResponse(
                "Open the whole address that clip2fl watch has printed.", 403
            )
        return await call_next(request)

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=NAMES, www_redirect=False)

    # Added last, so that refusals have the headers, too.
    @app.middleware("http")
    async def headers(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    return app


def read_token(file: Path) -> str:
    """Return the token in a file.

    Raises
    ------
    ValueError
        If it can be guessed: it is short, or other users may read the file.
    """
    token = file.read_text("ascii", errors="replace").strip()
    if not re.fullmatch(r"[\w-]{32,256}", token, re.ASCII):
        raise ValueError(
            f"{shown(file)} holds no token: it must have 32 to 256 letters, digits, _ "
            "or -, as 'openssl rand -hex 32' prints them"
        )
    if file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        raise ValueError(
            f"{shown(file)} can be read by other users: chmod 600 {shown(file)}"
        )
    return token


def serve(
    watch: RunWatch | NewestRun,
    ready: Callable[[str], None],
    port: int = 0,
    token: str | None = None,
    host: str = HOST,
) -> None:
    """Serve the page on this machine until a signal ends it.

    Parameters
    ----------
    watch : RunWatch or NewestRun
        The run.
    ready : callable
        Called with the page's address when it can be opened.
    port : int
        0: any free one.
    token : str or None
        None: a random one.
    host : str
        Address to listen on. Whatever it is, the browser must ask by a name of this
        machine.

    Raises
    ------
    OSError
        If the page cannot listen there, for example as the port is in use.
    KeyboardInterrupt
        After Ctrl-C, when the server has ended.
    """
    token = token or secrets.token_urlsafe(32)
    config = uvicorn.Config(
        watch_app(watch, token),
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=64,
        timeout_graceful_shutdown=1,
    )
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise OSError(
            f"cannot listen on --host {shown(host)}, --port {port} ({error.strerror})"
        ) from None
    with listening:
        port = listening.getsockname()[1]
        ready(f"http://{HOST}:{port}/?token={token}")
        uvicorn.Server(config).run(sockets=[listening])
