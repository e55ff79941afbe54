"""Find the processes of one run by inherited properties, and end them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from clip2fl_cli.signals import NotedSignals

POLL_SECONDS = 0.1
STOP_SECONDS = 15.0
"""Seconds that processes get to end by themselves before they are killed."""


def run_processes(home: Path, sessions: set[int]) -> list[psutil.Process]:
    """Find the living processes of one run by inherited properties.

    The SuperLink starts its child in a new session, which Ray's processes share. Some
    of those overwrite their environment and outlive their parents. So neither process
    group, nor parent, nor environment alone identifies all of them.

    Parameters
    ----------
    home : Path
        The run's own ``FLWR_HOME``, which identifies its processes.
    sessions : set[int]
        Known sessions of the run; sessions found by ``FLWR_HOME`` are added.

    Returns
    -------
    list[psutil.Process]
    """
    session_of: dict[psutil.Process, int] = {}
    for process in psutil.process_iter():
        # It has ended, or belongs to another user, whose environment is not readable.
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            session_of[process] = os.getsid(process.pid)
            if process.environ().get("FLWR_HOME") == str(home):
                sessions.add(session_of[process])
    return [process for process, session in session_of.items() if session in sessions]


def stop_all(
    superlink: subprocess.Popen[bytes], home: Path, signals: NotedSignals
) -> None:
    """End the SuperLink and all its processes, first with SIGTERM.

    Parameters
    ----------
    superlink : Popen
        The SuperLink, the first process of its session.
    home : Path
        As in `run_processes`.
    signals : NotedSignals
        A second signal means that the user does not want to wait.
    """
    sessions = {superlink.pid}
    others = [
        process
        for process in run_processes(home, sessions)
        if process.pid != superlink.pid
    ]
    superlink.terminate()
    _send(others, signal.SIGTERM)
    end = time.monotonic() + STOP_SECONDS
    while superlink.poll() is None or run_processes(home, sessions):
        if signals.hurry or time.monotonic() > end:
            superlink.kill()
            left = run_processes(home, sessions)
            _send(left, signal.SIGKILL)
            # A process that waits for a device or a network disk ends only then.
            if time.monotonic() > end + STOP_SECONDS:
                pids = ", ".join(str(process.pid) for process in left)
                print(f"clip2fl: cannot end the processes {pids}", file=sys.stderr)
                return
        time.sleep(POLL_SECONDS)


def _send(processes: Iterable[psutil.Process], signum: int) -> None:
    for process in processes:
        # psutil does not signal another process that has received the same number.
        with contextlib.suppress(psutil.Error):
            process.send_signal(signum)
