"""Ctrl-C and termination signals, which must not interrupt a clean-up."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

STOPPING = (
    "clip2fl: {} received: stopping the run and ending its processes, which takes some "
    "seconds. Checkpoints stay. Press Ctrl-C again to kill the processes at once"
)
HURRYING = "clip2fl: {} received again: killing the processes"


class Interrupted(KeyboardInterrupt):
    """A signal ended a command, after its clean-up.

    Parameters
    ----------
    signum : int
        The first signal that arrived.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class NotedSignals:
    """Record signals without acting on them, so that they never interrupt a clean-up.

    The first one and the second one are answered with a line on standard error.

    Parameters
    ----------
    answer : str
        The line after the first one; ``{}`` stands for the signal's name.

    Attributes
    ----------
    first : int or None
        The first signal that arrived.
    hurry : bool
        Whether a second signal followed.
    """

    def __init__(self, answer: str = STOPPING) -> None:
        self._answer = answer
        self.first: int | None = None
        self.hurry = False
        self._previous: list[tuple[int, signal._HANDLER]] = []

    def __enter__(self) -> "NotedSignals":
        """Install the signal handlers."""
        for signum in _heard():
            self._previous.append((signum, signal.signal(signum, self._note)))
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous signal handlers."""
        for signum, handler in self._previous:
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if self.first is None:
            self.first = signum
            _say(self._answer.format(signal.Signals(signum).name))
        elif not self.hurry:
            self.hurry = True
            _say(HURRYING.format(signal.Signals(signum).name))


def _heard() -> list[signal.Signals]:
    """Return the signals to handle: not a hang-up that ``nohup`` has switched off."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [s for s in SIGNALS if not (ignored and s is signal.SIGHUP)]


def _say(text: str) -> None:
    try:
        # A progress bar takes the place of sys.stderr, and shows the line above itself.
        print(text, file=sys.stderr, flush=True)
    except (RuntimeError, OSError):
        # The signal came while the same stream was being written, or nobody reads it.
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """Make every signal raise `Interrupted`, so that ``with`` and ``finally`` run."""

    def interrupt(signum: int, _frame: FrameType | None) -> NoReturn:
        raise Interrupted(signum)

    previous = [(signum, signal.signal(signum, interrupt)) for signum in _heard()]
    try:
        yield
    finally:
        for signum, handler in previous:
            signal.signal(signum, handler)
