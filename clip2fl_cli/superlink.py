"""A SuperLink for one run: it starts in an empty folder and ends with the run."""

import contextlib
import json
import os
import queue
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from clip2fl_cli.flower_command import (
    ANSI,
    WAITING_FLWR,
    SimulationError,
    environment,
    executable,
    listed_run,
    started_run,
    write_connection,
)
from clip2fl_cli.processes import POLL_SECONDS, STOP_SECONDS, stop_all
from clip2fl_cli.signals import Interrupted, NotedSignals

CONNECTION = "simulation"
"""Name of the SuperLink in the private Flower configuration."""

START_SECONDS = 120.0
"""Importing flwr for the first time from a slow disk takes tens of seconds."""
COMMAND_SECONDS = 60.0

RAY_SOCKET_SUFFIX = (
    "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
)
UNIX_SOCKET_PATH_MAX = 103
"""Ray refuses longer socket paths (the smallest limit of its platforms)."""


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink, with functions to use it.

    Attributes
    ----------
    process : Popen
        The SuperLink.
    directory : Path
        The run's own folder, from `private_directory`.
    environment : mapping of str to str
        Environment of the SuperLink and of all commands.
    signals : NotedSignals
        Recorded signals; they end long waits.
    waiting : Popen
        Flower's command, imported, which `start` tells what to do.
    """

    process: subprocess.Popen[bytes]
    directory: Path
    environment: Mapping[str, str]
    signals: NotedSignals
    waiting: subprocess.Popen[str]

    def start(self, app: Path, run_config: Path, federation_config: str) -> str | None:
        """Start a run.

        Parameters
        ----------
        app : Path
            Folder of the app.
        run_config : Path
            TOML file.
        federation_config : str
            Pairs for ``flwr run --federation-config``.

        Returns
        -------
        str or None
            The run's id; None if a signal came first.

        Raises
        ------
        SimulationError
            If Flower refuses the app or its configuration.
        """
        arguments = [
            *("run", str(app), CONNECTION, "--format", "json"),
            *("--federation-config", federation_config),
            *("--run-config", str(run_config)),
        ]
        assert self.waiting.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.waiting.stdin.write(f"{json.dumps(arguments)}\n")
            self.waiting.stdin.flush()
        answer = self._answer(self.waiting, START_SECONDS)
        return None if self.signals.first is not None else started_run(answer)

    def follow(self, run: str, output: TextIO | None, deadline: float | None) -> str:
        """Pass on a run's log until the run ends or must be stopped.

        Parameters
        ----------
        run : str
            The run's id.
        output : TextIO or None
            Stream for the log, without colours.
        deadline : float or None
            Monotonic seconds after which the run is stopped.

        Returns
        -------
        str
            The log without colours.
        """
        log: list[str] = []
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        with self._flwr("log", run, CONNECTION, "--stream") as client:
            threading.Thread(target=_read, args=(client, lines), daemon=True).start()
            try:
                while (line := _next_line(lines)) is not None:
                    if line:
                        plain = ANSI.sub("", line)
                        log.append(plain)
                        if output is not None:
                            output.write(plain)
                            output.flush()
                    expired = deadline is not None and time.monotonic() > deadline
                    if expired or self.signals.first or self.process.poll() is not None:
                        # Stopped through Flower, so that the run's status says so.
                        self._ask("stop", run, CONNECTION, seconds=STOP_SECONDS)
                        break
            finally:
                client.kill()
        return "".join(log)

    def outcome(self, run: str) -> tuple[str, str]:
        """Ask for a run's final status.

        Returns
        -------
        tuple of str
            Flower's status, and the details, which may be empty.
        """
        status, details = "unknown", "the SuperLink does not tell"
        end = time.monotonic() + STOP_SECONDS
        while self.process.poll() is None and not self.signals.first:
            answer = self._ask(
                *("ls", CONNECTION, "--run-id", run, "--format", "json"),
                seconds=COMMAND_SECONDS,
            )
            # Without an answer the SuperLink is about to end, or is too busy for the
            # moment.
            status, details = listed_run(answer) or (status, details)
            if status.startswith("finished") or time.monotonic() > end:
                break
        if self.process.poll() is not None:
            details = f"the SuperLink ended\n{_tail(self.directory / 'superlink.log')}"
        return status, details

    def _flwr(
        self, *arguments: str, stderr: int = subprocess.STDOUT
    ) -> subprocess.Popen[str]:
        """Start a ``flwr`` command."""
        return _client(
            [executable("flwr"), *arguments],
            self.directory,
            self.environment,
            stdin=subprocess.DEVNULL,
            stderr=stderr,
        )

    def _ask(self, *arguments: str, seconds: float) -> str:
        """Return the output of a ``flwr`` command; a second signal ends the wait."""
        return self._answer(self._flwr(*arguments, stderr=subprocess.PIPE), seconds)

    def _answer(self, client: subprocess.Popen[str], seconds: float) -> str:
        end = time.monotonic() + seconds
        with client:
            while time.monotonic() < end and not self.signals.hurry:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    out, errors = client.communicate(timeout=POLL_SECONDS)
                    return out or ANSI.sub("", errors)
            client.kill()
        return ""


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """Make a temporary directory for one run and remove it afterwards."""
    parent = tempfile.gettempdir()
    name_length = len("/clip2fl-") + 8
    if len(parent) + name_length + len(RAY_SOCKET_SUFFIX) > UNIX_SOCKET_PATH_MAX:
        parent = "/tmp"
    directory = Path(tempfile.mkdtemp(prefix="clip2fl-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def own_superlink(
    directory: Path, signals: NotedSignals, ray_address: str | None
) -> Iterator[SuperLink]:
    """Run a SuperLink from an empty folder.

    At the end, all processes that it started have ended.

    Parameters
    ----------
    directory : Path
        From `private_directory`.
    signals : NotedSignals
        Recorded signals; they end the start, and speed up the end.
    ray_address : str or None
        ``HOST:PORT`` of a running Ray cluster; None lets Ray start a private one.

    Raises
    ------
    SimulationError
        If the SuperLink does not start.
    Interrupted
        If a signal arrived before the SuperLink was ready.
    """
    home = directory / "home"
    for folder in (home, directory / "work", directory / "tmp"):
        folder.mkdir()
    variables = _variables(directory, ray_address)
    process: subprocess.Popen[bytes] | None = None
    # Imports Flower while the SuperLink does.
    waiting = _client(
        [sys.executable, "-c", WAITING_FLWR],
        directory,
        variables,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        # Another process may take the free port first; then another port is chosen.
        for _ in range(3):
            port = _free_port()
            write_connection(
                home, CONNECTION, address=f"127.0.0.1:{port}", insecure=True
            )
            process = _start(directory, port, variables)
            end = time.monotonic() + START_SECONDS
            while process.poll() is None and time.monotonic() < end:
                if signals.first is not None:
                    raise Interrupted(signals.first)
                if _is_up(directory):
                    yield SuperLink(process, directory, variables, signals, waiting)
                    return
                time.sleep(POLL_SECONDS)
        raise SimulationError(
            f"flower-superlink did not start:\n{_tail(directory / 'superlink.log')}"
        )
    finally:
        with waiting:
            waiting.kill()
        if process is not None:
            stop_all(process, home, signals)


def _variables(directory: Path, ray_address: str | None) -> dict[str, str]:
    """Return the caller's environment with settings that isolate this run."""
    variables = environment(directory / "home")
    # Ray would use the cluster at this address, even if the variable is a leftover.
    variables.pop("RAY_ADDRESS", None)
    if ray_address is not None:
        variables["RAY_ADDRESS"] = ray_address
    else:
        # Ray listens on the address of the network otherwise, and runs whatever code
        # it is sent. With this setting, meant for other systems, its own cluster has
        # the address 127.0.0.1. A token keeps other users of this machine out.
        variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        variables["RAY_AUTH_MODE"] = "token"
        variables["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray gives a worker a minute to import torch and Flower, and then ends the run. A
    # machine with other work may need longer.
    variables.setdefault("RAY_worker_register_timeout_seconds", "600")
    variables.update(
        # Files that torch and others leave there are removed with the run.
        TMPDIR=str(directory / "tmp"),
        RAY_TMPDIR=str(directory),
        RAY_USAGE_STATS_ENABLED="0",
        # Flower looks for a new run every second by default; each look costs CPU time.
        FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.25",
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        PYTHONUNBUFFERED="1",
        # Flower's log has characters that not every locale has.
        PYTHONIOENCODING="utf-8",
    )
    if cache := variables.get("CLIP2FL_CACHE_DIR"):
        # Flower's processes work in a folder that is removed with the run.
        variables["CLIP2FL_CACHE_DIR"] = os.path.abspath(cache)
    return variables


def _client(
    command: list[str],
    directory: Path,
    variables: Mapping[str, str],
    *,
    stdin: int,
    stderr: int,
) -> subprocess.Popen[str]:
    """Start a command that does not receive Ctrl-C from the terminal."""
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        encoding="utf-8",
        errors="replace",
        cwd=directory / "work",
        env=variables,
        start_new_session=True,
    )


def _start(
    directory: Path, port: int, variables: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    with (directory / "superlink.log").open("wb") as log:
        return subprocess.Popen(
            [
                *(executable("flower-superlink"), "--insecure", "--simulation"),
                *("--host", "127.0.0.1", "--port", str(port)),
                "--disable-runtime-dependency-installation",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=directory / "work",
            env=variables,
            start_new_session=True,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_up(directory: Path) -> bool:
    """Return whether the SuperLink listens.

    The SuperLink's log is read instead of probing its port: another program that took
    the port would answer a probe, too.
    """
    return "Uvicorn running on" in (directory / "superlink.log").read_text("utf-8")


def _read(client: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert client.stdout is not None
    with contextlib.suppress(ValueError):  # the main thread closed it after a stop
        for line in client.stdout:
            lines.put(line)
    lines.put(None)


def _next_line(lines: queue.SimpleQueue[str | None]) -> str | None:
    """Return the next line, an empty string if none came in time, None at the end."""
    try:
        return lines.get(timeout=POLL_SECONDS)
    except queue.Empty:
        return ""


def _tail(path: Path) -> str:
    return "\n".join(ANSI.sub("", path.read_text("utf-8")).splitlines()[-20:])
