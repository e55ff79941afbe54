"""Run the Flower app in a simulation of its own and tell whether it completed.

``flwr run`` alone leaves two traps. Its local SuperLink stays alive, and the
simulated clients import code from the directory in which that SuperLink was first
started, so a second checkout may silently run the first one's clients. And it exits 0
even when the ServerApp failed. This script starts a SuperLink for one run, from an
empty directory, asks it for the run's final status and stops everything again::

    python clip2fl_cli/simulation.py --run-config conf/demo.toml --set 'seed=8'

A run that was interrupted goes on with the settings in its folder::

    python clip2fl_cli/simulation.py --resume runs/demo

Exit status: 0 the run completed; 1 it did not; 2 wrong usage; 130 or 143 it was
interrupted by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TextIO

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clip2fl_common.config.files import complete_config
from clip2fl_common.config.files import merge_run_config as merge_run_config
from clip2fl_common.config.files import parse_overrides as parse_overrides

ROOT = Path(__file__).resolve().parent.parent

PROFILE = "simulation"
"""Name of the SuperLink connection in the private Flower configuration."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

POLL_SECONDS = 0.1
START_SECONDS = 120.0
"""A cold import of flwr on a slow disk takes tens of seconds."""
COMMAND_SECONDS = 60.0
STOP_SECONDS = 15.0
"""How long processes may take to end by themselves before they are killed."""

CLIENTS_PER_GPU = 4
"""More training at the same time on one GPU wait for each other and fill its memory."""

MOST_NODES = 100_000
"""A simulated node is an entry in a database; clients, not nodes, decide the result."""

BUNDLED = (".py", ".toml", ".md", ".yaml", ".yml", ".json", ".jsonl")
"""Kinds of files that Flower lets into an app's bundle."""

RAY_SOCKET_SUFFIX = (
    "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
)
UNIX_SOCKET_PATH_MAX = 103
"""Ray refuses longer socket paths (the smallest limit of its platforms)."""

ANSI = re.compile(r"\x1b\[[0-9;]*m")
NOISE = re.compile(
    r"Using SuperLink: "
    r"|Successfully (started run|installed \S+ to) "
    r"|INFO :\s+(Starting (logstream|Flower Simulation)|Federation `)"
    r"|WARNING :\s+Since flwr 1\.32, default simulated SuperNodes"
    r"|INFO :\s+(To change federation size|flwr federation simulation-config)"
    r"|.*FutureWarning: Tip: In future versions of Ray, Ray will no longer override"
    r"|  warnings\.warn\($"
    r"|\(ClientAppActor pid=\d+\) .*Manually terminating ClientAppActor"
)
"""Lines about Flower's and Ray's own housekeeping; they stay in `RunResult.log`."""


class SimulationError(RuntimeError):
    """The simulation could not be started."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the simulation; everything it started is gone.

    Parameters
    ----------
    signum : int
        The first signal that arrived.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes
    ----------
    status : str
        Flower's words: "finished:completed", "finished:failed", "finished:stopped";
        or "not-started" when Flower refused the app or its configuration.
    details : str
        The reason when the run did not complete, else empty.
    log : str
        Everything the run printed, without colours.
    """

    status: str
    details: str
    log: str

    @property
    def completed(self) -> bool:
        """Whether the run came to its end without an error."""
        return self.status == "finished:completed"


class _Signals:
    """Note signals instead of acting on them, so that clean-up is never cut short."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.hurry = False
        self._previous: list[tuple[int, signal._HANDLER]] = []

    def __enter__(self) -> _Signals:
        for signum in SIGNALS:
            self._previous.append((signum, signal.signal(signum, self._note)))
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous:
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if self.first is None:
            self.first = signum
        else:
            self.hurry = True


def refuse_bad_config(app: Path, merged: str) -> None:
    """Refuse a configuration of this program that its run would refuse.

    Parameters
    ----------
    app : Path
        Directory of the app; another app's configuration is its own affair.
    merged : str
        What `merge_run_config` returned.

    Raises
    ------
    ConfigError
        Names each offending key, what was found and what is allowed.
    """
    if app.resolve() == ROOT:
        config = complete_config(merged)
        # torch and flwr take two seconds, for which a wrong key need not wait.
        from strategy.registry import method_named

        method_named(config.method)


def simulate(
    app: Path = ROOT,
    *,
    run_config: Path | None = None,
    overrides: Sequence[str] = (),
    resume: Path | None = None,
    supernodes: int | None = None,
    cpus_per_client: int = 1,
    gpus_per_client: float | None = None,
    ray_address: str | None = None,
    timeout: float | None = None,
    output: TextIO | None = None,
) -> RunResult:
    """Run a Flower app in a simulation of its own.

    Call it from the main thread: it handles signals while it runs.

    Parameters
    ----------
    app : Path
        Directory of the app, with its ``pyproject.toml``.
    run_config : Path | None
        A TOML file of run configuration keys.
    overrides : Sequence[str]
        ``key=value`` pairs that win over the file.
    resume : Path | None
        Folder of an interrupted run to go on with; None begins a new one.
    supernodes : int | None
        Number of simulated nodes; None takes one per CPU core, at least 2.
    cpus_per_client : int
        CPU cores a client occupies, and threads it computes with; decides how many
        train at the same time.
    gpus_per_client : float | None
        GPUs, or the share of one, a client occupies; with 0 Ray hides them from it.
        None shares this machine's GPUs among the clients that train at the same
        time, but each one among `CLIENTS_PER_GPU` at most.
    ray_address : str | None
        ``HOST:PORT`` of a running Ray cluster to use; None starts a private one.
    timeout : float | None
        Seconds after which the run is stopped.
    output : TextIO | None
        Where the log goes as it appears, without Flower's housekeeping.

    Returns
    -------
    RunResult
        The status Flower recorded, the reason and the log.

    Raises
    ------
    ConfigError
        If the run configuration cannot be read or has an unknown key; this program's
        own, whatever is wrong with it.
    SimulationError
        If the SuperLink does not start.
    Interrupted
        If SIGINT, SIGTERM or SIGHUP arrived, after all was stopped.
    """
    config_text = merge_run_config(app, run_config, overrides, resume)
    refuse_bad_config(app, config_text)
    if gpus_per_client is None:
        gpus_per_client = shared_gpus(cpus_per_client)
    federation_config = (
        f"num-supernodes={supernodes or max(2, os.cpu_count() or 1)}"
        f" client-resources-num-cpus={cpus_per_client}"
        f" client-resources-num-gpus={gpus_per_client:g}"
    )
    deadline = None if timeout is None else time.monotonic() + timeout
    with _Signals() as signals, _private_directory() as directory:
        config_file = directory / "run-config.toml"
        config_file.write_text(config_text, "utf-8")
        copy_app(app, directory / "app")
        with _superlink(directory, signals, ray_address) as link:
            command = [
                *("run", str(directory / "app"), PROFILE, "--stream"),
                *("--federation-config", federation_config),
                *("--run-config", str(config_file)),
            ]
            log = link.stream(command, output, deadline)
            result = link.result(log)
    if signals.first is not None:
        raise Interrupted(signals.first)
    if result.status == "finished:stopped" and timeout is not None:
        return replace(result, details=f"stopped after {timeout:g} s")
    return result


def shared_gpus(cpus_per_client: int) -> float:
    """Return the share of a GPU for each of the clients that train at the same time.

    Parameters
    ----------
    cpus_per_client : int
        CPU cores a client occupies.

    Returns
    -------
    float
        0 where there is no GPU.
    """
    import torch  # takes a second or two, and only this asks it

    gpus = torch.cuda.device_count()
    together = max(1, (os.cpu_count() or 1) // cpus_per_client)
    return min(1.0, max(gpus / together, 1 / CLIENTS_PER_GPU)) if gpus else 0.0


@dataclass(frozen=True)
class _SuperLink:
    """A running SuperLink and the means to talk to it."""

    process: subprocess.Popen[bytes]
    directory: Path
    environment: Mapping[str, str]
    signals: _Signals

    def flwr(self, arguments: Sequence[str]) -> subprocess.Popen[str]:
        """Start a ``flwr`` command that Ctrl-C in the terminal does not reach."""
        return subprocess.Popen(
            [_executable("flwr"), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            cwd=self.directory / "work",
            env=self.environment,
            start_new_session=True,
        )

    def stream(
        self, command: Sequence[str], output: TextIO | None, deadline: float | None
    ) -> str:
        """Start the run and pass its log on until it ends or must be stopped.

        Returns
        -------
        str
            The log without colours.
        """
        log: list[str] = []
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        with self.flwr(command) as client:
            threading.Thread(target=_read, args=(client, lines), daemon=True).start()
            try:
                while (line := _next_line(lines)) is not None:
                    if line:
                        plain = ANSI.sub("", line)
                        log.append(plain)
                        if output is not None and not NOISE.match(plain):
                            output.write(line if output.isatty() else plain)
                            output.flush()
                    expired = deadline is not None and time.monotonic() > deadline
                    if expired or self.signals.first or self.process.poll() is not None:
                        self.stop_run("".join(log))
                        break
            finally:
                client.kill()
        return "".join(log)

    def stop_run(self, log: str) -> None:
        """Ask Flower to stop the run, if it started, so that its status says so."""
        if started := re.search(r"Successfully started run (\d+)", log):
            self.ask(["stop", started[1], PROFILE], STOP_SECONDS)

    def ask(self, arguments: Sequence[str], seconds: float) -> str:
        """Return the output of a ``flwr`` command; a second signal cuts it short."""
        end = time.monotonic() + seconds
        with self.flwr(arguments) as client:
            while time.monotonic() < end and not self.signals.hurry:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return client.communicate(timeout=POLL_SECONDS)[0]
            client.kill()
        return ""

    def result(self, log: str) -> RunResult:
        """Ask for the run's final status."""
        status, details = "not-started", log.strip()
        end = time.monotonic() + STOP_SECONDS
        while self.process.poll() is None and not self.signals.first:
            answer = self.ask(["ls", PROFILE, "--format", "json"], COMMAND_SECONDS)
            # Without an answer the SuperLink is about to end, or too busy just now.
            with contextlib.suppress(json.JSONDecodeError, KeyError):
                runs: list[dict[str, str]] = json.loads(answer)["runs"]
                if not runs:
                    break
                status, details = runs[0]["status"], runs[0]["status-details"]
            if status.startswith("finished") or time.monotonic() > end:
                break
        if self.process.poll() is not None:
            details = f"the SuperLink ended\n{_tail(self.directory / 'superlink.log')}"
        return RunResult(status, "" if details == "N/A" else details, log)


@contextlib.contextmanager
def _private_directory() -> Iterator[Path]:
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


def copy_app(app: Path, copy: Path) -> None:
    """Copy what a bundle may contain, for Flower to find.

    Flower walks through every file of the directory it is given; in a checkout that
    means some ten thousand files of the virtual environment, and seconds.
    """

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [
            name
            for name in names
            if name not in (".gitignore", "LICENSE")
            and (
                name.startswith(".")
                or name == "__pycache__"
                or (
                    Path(name).suffix not in BUNDLED and not Path(folder, name).is_dir()
                )
            )
        ]

    shutil.copytree(app, copy, ignore=left_out)


@contextlib.contextmanager
def _superlink(
    directory: Path, signals: _Signals, ray_address: str | None
) -> Iterator[_SuperLink]:
    """Run a SuperLink from an empty directory.

    At the end no process that it started is left.
    """
    (directory / "work").mkdir()
    (directory / "home").mkdir()
    environment = _environment(directory, ray_address)
    process: subprocess.Popen[bytes] | None = None
    try:
        # Another process may take the free port first: then choose again.
        for _ in range(3):
            port = _free_port()
            (directory / "home" / "config.toml").write_text(
                f"[superlink.{PROFILE}]\n"
                f'address = "127.0.0.1:{port}"\n'
                "insecure = true\n",
                "utf-8",
            )
            process = _start_superlink(directory, port, environment)
            end = time.monotonic() + START_SECONDS
            while process.poll() is None and time.monotonic() < end:
                if signals.first is not None:
                    raise Interrupted(signals.first)
                if _is_up(directory):
                    yield _SuperLink(process, directory, environment, signals)
                    return
                time.sleep(POLL_SECONDS)
        raise SimulationError(
            f"flower-superlink did not start:\n{_tail(directory / 'superlink.log')}"
        )
    finally:
        if process is not None:
            _stop_all(process, directory, signals)


def _environment(directory: Path, ray_address: str | None) -> dict[str, str]:
    """Return the caller's environment with what keeps this run to itself."""
    environment = dict(os.environ)
    # Ray would use the cluster at this address, meant or left over.
    environment.pop("RAY_ADDRESS", None)
    if ray_address is not None:
        environment["RAY_ADDRESS"] = ray_address
    environment.update(
        FLWR_HOME=str(directory / "home"),
        FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_UPDATE_CHECK="1",
        FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.1",
        RAY_TMPDIR=str(directory),
        RAY_USAGE_STATS_ENABLED="0",
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        PYTHONUNBUFFERED="1",
    )
    return environment


def _start_superlink(
    directory: Path, port: int, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    with (directory / "superlink.log").open("wb") as log:
        return subprocess.Popen(
            [
                *(_executable("flower-superlink"), "--insecure", "--simulation"),
                *("--host", "127.0.0.1", "--port", str(port)),
                "--disable-runtime-dependency-installation",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=directory / "work",
            env=environment,
            start_new_session=True,
        )


def _executable(name: str) -> str:
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise SimulationError(
            f"{path} does not exist: {sys.executable} has no Flower. Run "
            "'make install' and use .venv/bin/python."
        )
    return str(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_up(directory: Path) -> bool:
    """Tell whether the SuperLink listens.

    Its own log is read rather than its port probed: another program that took the
    port would answer a probe too.
    """
    return "Uvicorn running on" in (directory / "superlink.log").read_text("utf-8")


def _read(client: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert client.stdout is not None
    with contextlib.suppress(ValueError):  # closed by the main thread after a stop
        for line in client.stdout:
            lines.put(line)
    lines.put(None)


def _next_line(lines: queue.SimpleQueue[str | None]) -> str | None:
    """Return the next line, an empty string if none came in time, None at the end."""
    try:
        return lines.get(timeout=POLL_SECONDS)
    except queue.Empty:
        return ""


def _stop_all(
    process: subprocess.Popen[bytes], directory: Path, signals: _Signals
) -> None:
    """End the SuperLink and all that it started, gently first."""
    sessions = {process.pid}
    others = set(own_processes(directory, sessions)) - {process.pid}
    process.terminate()
    _signal(others, signal.SIGTERM)
    end = time.monotonic() + STOP_SECONDS
    while process.poll() is None or own_processes(directory, sessions):
        if signals.hurry or time.monotonic() > end:
            process.kill()
            _signal(own_processes(directory, sessions), signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _signal(pids: Iterable[int], signum: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def own_processes(directory: Path, sessions: set[int]) -> list[int]:
    """Find the living processes of one run by what they inherited.

    The SuperLink starts its child in a session of its own, which Ray's processes
    share; some of those overwrite their environment and outlive their parents, so
    neither process group, nor parent, nor environment alone names them all.

    Parameters
    ----------
    directory : Path
        The run's private directory: ``FLWR_HOME`` of its processes lies there.
    sessions : set[int]
        Sessions known to be the run's; those found by ``FLWR_HOME`` are added.

    Returns
    -------
    list[int]
        Process ids; empty where there is no ``/proc``.
    """
    mark = b"FLWR_HOME=" + os.fsencode(directory / "home")
    session_of: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            # After the name in parentheses: state, parent, process group, session.
            state, _, _, session = (
                (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            )
            if state == "Z":
                continue
            session_of[int(folder.name)] = int(session)
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                sessions.add(int(session))
    return [pid for pid, session in session_of.items() if session in sessions]


def _tail(path: Path) -> str:
    return "\n".join(ANSI.sub("", path.read_text("utf-8")).splitlines()[-20:])


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def not_negative(text: str) -> float:
    """Return the number that an option of a command line gives, if it can be used."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


def _at_least_one(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MOST_NODES:
        raise argparse.ArgumentTypeError(f"must be 1 to {MOST_NODES:,}, got {text}")
    return value


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="simulate.py",
        description="Run the Flower app in a simulation of its own.",
        epilog="Exit status: 0 only if the run completed.",
    )
    parser.add_argument(
        "--run-config", type=Path, metavar="TOML", help="file of run configuration keys"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="'KEY=VALUE ...'",
        help="run configuration keys that win over the file; may be repeated",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="go on with the interrupted run in this folder, with its settings",
    )
    parser.add_argument(
        "--supernodes",
        type=_at_least_one,
        metavar="N",
        help="number of simulated nodes (default: one per CPU core, at least 2)",
    )
    parser.add_argument(
        "--cpus-per-client",
        type=_at_least_one,
        default=1,
        metavar="N",
        help="CPU cores a client occupies and computes with (default: 1)",
    )
    parser.add_argument(
        "--gpus-per-client",
        type=not_negative,
        metavar="F",
        help="GPUs, or the share of one, a client occupies (default: what there is, "
        f"but at most {CLIENTS_PER_GPU} clients a GPU; 0: it sees none)",
    )
    parser.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="use this running Ray cluster (see docs/simulation.md)",
    )
    parser.add_argument(
        "--app", type=Path, default=ROOT, metavar="DIR", help="directory of the app"
    )
    parser.add_argument(
        "--timeout", type=_positive, metavar="S", help="stop the run after S seconds"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parse_arguments(arguments)
    try:
        result = simulate(
            options.app,
            run_config=options.run_config,
            overrides=options.set,
            resume=options.resume,
            supernodes=options.supernodes,
            cpus_per_client=options.cpus_per_client,
            gpus_per_client=options.gpus_per_client,
            ray_address=options.ray_address,
            timeout=options.timeout,
            output=sys.stdout,
        )
    except Interrupted as interruption:
        print(f"simulate.py: {interruption}", file=sys.stderr)
        return 128 + interruption.signum
    except (ValueError, OSError) as error:
        print(f"simulate.py: {error}", file=sys.stderr)
        return 2
    except SimulationError as error:
        print(f"simulate.py: {error}", file=sys.stderr)
        return 1
    if not result.completed:
        print(
            f"simulate.py: the run did not complete ({result.status}): "
            f"{result.details}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
