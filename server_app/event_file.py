"""``events.jsonl``: what happens in a run, a line an event, written as it happens."""

import errno
import os
import stat
from collections.abc import Callable
from logging import getLogger
from pathlib import Path

from clip2fl_common.shown import shown
from server_app.foreign_files import MEGABYTE, ForeignFileError, parse_json
from server_app.growing_file import GrowingFile
from strategy.events import Event

logger = getLogger(__name__)

# A run of 1,000 rounds with 100 clients each has 40 megabytes.
MAX_EVENTS_BYTES = 256 * MEGABYTE
MAX_LINE_BYTES = 16 * 1024


class EventWriter:
    """Append events to a file, each line in one write.

    Events inform people; the run does not need them. So an error, such as a full disk,
    does not end the run: it is logged once, and the next event tries again. (Without
    space, saving the round's results ends the run soon after, with its own message.)

    Parameters
    ----------
    path : Path
        The file; a resumed run appends to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._torn = False
        self._failed = False

    def __call__(self, event: Event) -> None:
        """Append an event; readers can see it when this returns."""
        line = event.model_dump_json(exclude_none=True) + "\n"
        try:
            self._append(line.encode())
        except OSError as error:
            if not self._failed:
                logger.warning(
                    "%s cannot be written (%s): clip2fl status and clip2fl watch miss "
                    "events, and the run goes on",
                    shown(self._path),
                    error.strerror or error,
                )
            self._failed = True
        else:
            self._failed = False

    def close(self) -> None:
        """Close the file; the next event opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, line: bytes) -> None:
        if self._file is None:
            self._open()
        assert self._file is not None
        # A piece of a line, left by a crash or a full disk, becomes a line of its own.
        whole = b"\n" + line if self._torn else line
        self._torn = True
        if os.write(self._file, whole) < len(whole):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._torn = False

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(self._path, flags | os.O_NONBLOCK, 0o666)
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            os.close(file)
            raise OSError(errno.EINVAL, "it is no regular file")
        self._file = file
        size = status.st_size
        self._torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"


class EventReader:
    """Read a file's new events, again and again while a run writes it.

    Parameters
    ----------
    path : Path
        The file, which may come from a stranger; it need not exist yet.

    Attributes
    ----------
    unreadable : int
        Number of lines that are no event: pieces that a crash has left, or damage.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = GrowingFile(path, MAX_LINE_BYTES, MAX_EVENTS_BYTES)
        self.unreadable = 0

    def read(self, take: Callable[[Event], None], restart: Callable[[], None]) -> None:
        """Hand on the events of all lines that have been completed since the last call.

        Parameters
        ----------
        take : callable
            Called with each event.
        restart : callable
            Called before the first event of a file that has been replaced.

        Raises
        ------
        ForeignFileError
            If the file is no regular file, or too large.
        """

        def forget() -> None:
            self.unreadable = 0
            restart()

        def parse(line: bytes | None) -> None:
            if line == b"":
                return
            try:
                if line is None:
                    raise ForeignFileError("too long")
                event = Event.model_validate(
                    parse_json(line.decode("utf-8"), Event, shown(self._path))
                )
            except (ForeignFileError, UnicodeDecodeError):
                self.unreadable += 1
            else:
                take(event)

        self._file.read(parse, forget)
