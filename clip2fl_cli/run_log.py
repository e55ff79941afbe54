"""A run's log file: every line of Flower's log, with the time at which it came.

A log of a run on a SuperLink begins with a line such as ``run 5``. If the same run is
followed again, its lines come again from the first one on; those that its folder's file
has already are left out.
"""

import contextlib
import os
import re
import tempfile
from collections import deque
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TextIO

import platformdirs

from server_app.file_names import LOG

RUN = re.compile(r"run \d+")


class RunLog:
    """Write a log line by line, first in the user's folder for logs, then in the run's.

    The run's folder is known, and exists, only after the server has begun. If nothing
    can be written there, the file stays where it is. A disk that is full ends the log,
    but not the run.

    Attributes
    ----------
    path : Path or None
        The file; None before the first line, and if there is no place for it.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self._file: TextIO | None = None
        self._begun = False
        self._there: deque[str] = deque()

    def write(self, line: str) -> None:
        """Append one line, without its line end."""
        if not self._begun:
            self._begun = True
            self._begin()
        stamp = datetime.now().astimezone().isoformat(timespec="milliseconds")
        self._append(f"{stamp} {line}")

    def move_to(self, folder: Path) -> None:
        """Go on in a run's folder, in the file `LOG`, after what it holds already."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        try:
            moved = _lines(os.open(folder / LOG, flags, 0o666))
            own = [] if self.path is None else _read(self.path)
            self._there = _of_the_same_run(_read(folder / LOG), own)
        except OSError:
            return
        self.close()
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.path, self._file, self._begun = folder / LOG, moved, True
        for line in own:
            self._append(line)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _append(self, stamped: str) -> None:
        if self._there:
            if self._there.popleft() == _text(stamped):
                return
            self._there.clear()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write(f"{stamped}\n")

    def _begin(self) -> None:
        name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_"
        folder = partial(platformdirs.user_log_dir, "clip2fl")
        for place_of in (folder, tempfile.gettempdir):
            # A user without a home has no folder for logs.
            with contextlib.suppress(OSError, RuntimeError):
                place = place_of()
                Path(place).mkdir(parents=True, exist_ok=True)
                descriptor, path = tempfile.mkstemp(".log", name, place)
                self.path, self._file = Path(path), _lines(descriptor)
                return


def _lines(descriptor: int) -> TextIO:
    """Return a text file whose lines are on their way to the disk once written."""
    return open(descriptor, "w", 1, encoding="utf-8", errors="backslashreplace")


def _read(path: Path) -> list[str]:
    return path.read_text("utf-8", "replace").split("\n")[:-1]


def _text(stamped: str) -> str:
    return stamped.partition(" ")[2]


def _of_the_same_run(there: list[str], own: list[str]) -> deque[str]:
    """Return the texts that a file has of the run with which a log begins."""
    texts = [_text(line) for line in there]
    first = _text(own[0]) if own else ""
    if not RUN.fullmatch(first) or first not in texts:
        return deque()
    return deque(texts[texts.index(first) :])
