"""Ctrl-C and termination signals, which must not interrupt a clean-up."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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

    Attributes
    ----------
    first : int or None
        The first signal that arrived.
    hurry : bool
        Whether a second signal followed.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self.hurry = False
        self._previous: list[tuple[int, signal._HANDLER]] = []

    def __enter__(self) -> "NotedSignals":
        """Install the signal handlers."""
        for signum in SIGNALS:
            self._previous.append((signum, signal.signal(signum, self._note)))
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous signal handlers."""
        for signum, handler in self._previous:
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if self.first is None:
            self.first = signum
        else:
            self.hurry = True


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """Make every signal raise `Interrupted`, so that ``with`` and ``finally`` run."""

    def interrupt(signum: int, _frame: FrameType | None) -> NoReturn:
        raise Interrupted(signum)

    previous = [(signum, signal.signal(signum, interrupt)) for signum in SIGNALS]
    try:
        yield
    finally:
        for signum, handler in previous:
            signal.signal(signum, handler)
