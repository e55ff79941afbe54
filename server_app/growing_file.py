"""Read a file of lines while another process appends to it."""

import os
from collections.abc import Callable
from pathlib import Path

from clip2fl_common.shown import shown
from server_app.foreign_files import MEGABYTE, ForeignFileError, opened


class GrowingFile:
    """Hand on each line of a file once, as soon as its line end is there.

    The file may come from a stranger: memory is bounded by ``max_line``.

    Parameters
    ----------
    path : Path
        The file; it need not exist yet.
    max_line : int
        Longest line in bytes; of a longer one only its existence is reported.
    max_bytes : int
        Largest file.
    """

    def __init__(self, path: Path, max_line: int, max_bytes: int) -> None:
        self._path = path
        self._max_line = max_line
        self._max_bytes = max_bytes
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._too_long = False

    def read(
        self, take: Callable[[bytes | None], None], restart: Callable[[], None]
    ) -> None:
        """Hand on the lines that have been completed since the last call.

        Parameters
        ----------
        take : callable
            Called with each line without its line end; None stands for a line that is
            too long.
        restart : callable
            Called if another file has taken the place of the one that was read before,
            or the file has become shorter: all lines are read again.

        Raises
        ------
        ForeignFileError
            If the path is no regular file, or the file is too large.
        """
        if not os.path.lexists(self._path):
            self._begin(None, restart)
            return
        with opened(self._path) as file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if identity != self._identity or status.st_size < self._offset:
                self._begin(identity, restart)
            if status.st_size > self._max_bytes:
                raise ForeignFileError(
                    f"{shown(self._path)} has more than {self._max_bytes:,} bytes, "
                    "which is too large"
                )
            file.seek(self._offset)
            rest = b""
            # No further than the size seen: a writer may be faster than this reader.
            left = status.st_size - self._offset
            while left > 0 and (chunk := file.read(min(left, MEGABYTE))):
                left -= len(chunk)
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._offset += len(line) + 1
                    whole = not self._too_long and len(line) <= self._max_line
                    self._too_long = False
                    take(line if whole else None)
                if len(rest) > self._max_line:
                    self._offset += len(rest)
                    self._too_long, rest = True, b""

    def _begin(
        self, identity: tuple[int, int] | None, restart: Callable[[], None]
    ) -> None:
        if self._identity is not None:
            restart()
        self._identity, self._offset, self._too_long = identity, 0, False
