"""A run's log file: every line of Flower's log, with the time at which it came."""

import contextlib
import os
import tempfile
from datetime import datetime
from pathlib import Path
from typing import TextIO

import platformdirs

from server_app.file_names import LOG


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

    def write(self, line: str) -> None:
        """Append one line, without its line end."""
        if not self._begun:
            self._begun = True
            self._begin()
        stamp = datetime.now().astimezone().isoformat(timespec="milliseconds")
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write(f"{stamp} {line}\n")

    def move_to(self, folder: Path) -> None:
        """Go on in a run's folder, in the file `LOG`, after what it holds already."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        try:
            moved = _lines(os.open(folder / LOG, flags, 0o666))
            if self.path is not None:
                moved.write(self.path.read_text("utf-8"))
        except OSError:
            return
        self.close()
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.path, self._file, self._begun = folder / LOG, moved, True

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _begin(self) -> None:
        name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_"
        for place in (platformdirs.user_log_dir("clip2fl"), tempfile.gettempdir()):
            with contextlib.suppress(OSError):
                Path(place).mkdir(parents=True, exist_ok=True)
                descriptor, path = tempfile.mkstemp(".log", name, place)
                self.path, self._file = Path(path), _lines(descriptor)
                return


def _lines(descriptor: int) -> TextIO:
    """Return a text file whose lines are on their way to the disk once written."""
    return open(descriptor, "w", 1, encoding="utf-8", errors="backslashreplace")
