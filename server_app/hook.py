"""A command of the operator that hears when a site is lost or the run ends.

The environment variable `VARIABLE` of the ServerApp's process names it. It is no key of
the configuration: every node receives the configuration, and a run that is resumed
takes it from a folder that may come from a stranger.
"""

import os
import queue
import shlex
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from logging import getLogger
from pathlib import Path
from time import monotonic

from clip2fl_common.shown import shown
from strategy.events import Event, What

logger = getLogger(__name__)

VARIABLE = "CLIP2FL_HOOK"
# A site is lost; the run is complete, has failed or has been stopped.
CALLED = (What.AWAY, What.RUN_ENDED, What.RUN_FAILED, What.RUN_STOPPED)
# Most seconds that a command may take, and that the end of a run waits for commands.
COMMAND_S = 30.0
END_S = 10.0
# Most events that wait for the command; later ones are not told.
WAITING = 100


class Hook:
    """Run a command for some events, one after the other, beside the run.

    No failure of the command reaches the run: it is logged, and the run goes on.

    Parameters
    ----------
    command : sequence of str
        Program and arguments, without a shell. It gets the event as a line of JSON on
        standard input, with the run's folder in the field ``folder``.
    folder : Path
        The run's folder.
    """

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self._command = list(command)
        self._folder = folder
        self._events: queue.Queue[Event] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None

    @classmethod
    def of_environment(cls, folder: Path) -> "Hook | None":
        """Return the hook that the environment names, if it names one."""
        try:
            command = shlex.split(os.environ.get(VARIABLE, ""))
        except ValueError as error:
            logger.warning("%s cannot be read (%s), so nothing is run", VARIABLE, error)
            return None
        return cls(command, folder) if command else None

    def __call__(self, event: Event) -> None:
        """Have the command told of an event, if it is one of `CALLED`."""
        if event.what not in CALLED:
            return
        try:
            self._events.put_nowait(event)
        except queue.Full:
            logger.warning("%s is too slow: an event is not told", VARIABLE)
        if self._thread is None:
            # A daemon, so that a command that hangs does not keep the process alive.
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Wait until the command has been told of all events, at most `END_S`."""
        end = monotonic() + END_S
        with self._events.all_tasks_done:
            while self._events.unfinished_tasks and (left := end - monotonic()) > 0:
                self._events.all_tasks_done.wait(left)

    def _work(self) -> None:
        while True:
            event = self._events.get()
            try:
                self._run(event)
            except Exception as error:
                logger.warning("%s for %s: %s", VARIABLE, event.what, shown(error))
            finally:
                self._events.task_done()

    def _run(self, event: Event) -> None:
        told = event.model_dump(mode="json", exclude_none=True)
        line = Told(**told, folder=str(self._folder)).model_dump_json(exclude_none=True)
        # Its output is not read, since a program that it leaves behind would keep the
        # pipe open. Errors go to the log of Flower's process.
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        try:
            process.communicate(f"{line}\n", timeout=COMMAND_S)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            logger.warning(
                "%s for %s took more than %g s and was ended",
                VARIABLE,
                event.what,
                COMMAND_S,
            )
        else:
            if process.returncode:
                logger.warning(
                    "%s for %s ended with status %d",
                    VARIABLE,
                    event.what,
                    process.returncode,
                )


class Told(Event):
    """An event as the command gets it.

    Attributes
    ----------
    folder : str
        The run's folder.
    """

    folder: str
