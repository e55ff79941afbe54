"""A run's processes are found by inherited properties, and only they are ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from clip2fl_cli import processes
from clip2fl_cli.processes import run_processes, stop_all
from clip2fl_cli.signals import NotedSignals, interrupting

# A child that forgets its environment, as some of Ray's do, and outlives its parent.
PARENT = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={"PATH": ""})
time.sleep(0 if sys.argv[2] == "leaves" else 600)
"""
QUIET = "import time; print('ready', flush=True); time.sleep(600)"
STUBBORN = f"import signal; signal.signal(15, signal.SIG_IGN); {QUIET}"


@pytest.fixture
def bystander(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Return a process of another run, in its own session."""
    environment = {**os.environ, "FLWR_HOME": str(tmp_path / "other" / "home")}
    process = subprocess.Popen(
        [sys.executable, "-c", QUIET],
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    yield process
    process.kill()
    process.wait()


def start(home: Path, child: str, parent: str) -> subprocess.Popen[bytes]:
    """Start a substitute for the SuperLink, and wait until its child is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, child, parent],
        env={**os.environ, "FLWR_HOME": str(home)},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def commands(found: list[psutil.Process]) -> set[str]:
    """Return the command of each process."""
    return {process.cmdline()[2] for process in found}


@pytest.mark.parametrize("child", [QUIET, STUBBORN])
def test_all_of_a_run_is_found_and_ended(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bystander: subprocess.Popen[bytes],
    child: str,
) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", 1.0)
    home = tmp_path / "home"
    superlink = start(home, child, "stays")
    assert commands(run_processes(home, set())) == {PARENT, child}
    stop_all(superlink, home, NotedSignals())
    assert superlink.wait() == -signal.SIGTERM
    assert run_processes(home, {superlink.pid}) == []
    assert bystander.poll() is None


def test_orphan_without_the_mark_is_found_by_its_session(tmp_path: Path) -> None:
    superlink = start(tmp_path / "home", QUIET, "leaves")
    superlink.wait()
    # No process has the mark any more, so the session must be known.
    assert run_processes(tmp_path / "home", set()) == []
    assert commands(run_processes(tmp_path / "home", {superlink.pid})) == {QUIET}
    stop_all(superlink, tmp_path / "home", NotedSignals())
    assert run_processes(tmp_path / "home", {superlink.pid}) == []


def test_second_signal_waits_for_nobody(tmp_path: Path) -> None:
    superlink = start(tmp_path / "home", STUBBORN, "stays")
    signals = NotedSignals()
    signals.hurry = True
    begun = time.monotonic()
    stop_all(superlink, tmp_path / "home", signals)
    assert time.monotonic() - begun < processes.STOP_SECONDS
    assert run_processes(tmp_path / "home", {superlink.pid}) == []


@pytest.mark.parametrize("nohup", [True, False])
def test_hang_up_that_nohup_has_switched_off_stops_nothing(nohup: bool) -> None:
    with ExitStack() as later:
        wanted = signal.SIG_IGN if nohup else signal.SIG_DFL
        later.callback(signal.signal, signal.SIGHUP, signal.getsignal(signal.SIGHUP))
        signal.signal(signal.SIGHUP, wanted)
        with NotedSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.first == (None if nohup else signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is wanted
        with interrupting():
            assert (signal.getsignal(signal.SIGHUP) is wanted) == nohup


def test_processes_that_may_not_be_read_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of other users and ended processes may not be readable."""
    superlink = start(tmp_path / "home", QUIET, "stays")
    environ = psutil.Process.environ

    def refuse(process: psutil.Process) -> dict[str, str]:
        if process.pid == superlink.pid:
            return environ(process)
        raise [psutil.AccessDenied, psutil.ZombieProcess][process.pid % 2](process.pid)

    monkeypatch.setattr(psutil.Process, "environ", refuse)
    found = run_processes(tmp_path / "home", set())
    assert commands(found) == {PARENT, QUIET}
    stop_all(superlink, tmp_path / "home", NotedSignals())
