"""Open regular files of bounded size, and refuse everything else.

A program that opens a named pipe called ``x.png`` waits for ever, and reading a device
may have any effect. Links are followed to their targets.
"""

import io
import os
import stat
from pathlib import Path

# Largest file that is read, also for hashing.
MAX_FILE_BYTES = 512 * 2**20
# Number of bytes beyond the end of a file that a caller may request.
_SMALL = 2**16

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotReadError(OSError):
    """A file is not read: it is not regular, empty, too large, or contradicts itself.

    It has no ``errno``, unlike an error of the operating system.
    """


class BoundedReader(io.BufferedReader):
    """A regular file from which only an allowed number of bytes can be read.

    Image formats contain lengths; a false length must not fill the memory.

    Attributes
    ----------
    size : int
        Bytes of the file.
    """

    def __init__(self, raw: io.FileIO, size: int) -> None:
        super().__init__(raw)
        self.size = size
        self._left = size

    def allow(self, count: int) -> None:
        """Allow this many bytes to be read from now on."""
        self._left = count

    def read(self, size: int | None = -1, /) -> bytes:
        """Read like a file.

        Raises
        ------
        NotReadError
            If this would read more bytes than allowed.
        """
        wanted = -1 if size is None else size
        if not 0 <= wanted <= _SMALL:
            # Python allocates the requested size before it looks at the file.
            there = max(self.size - self.tell(), 0)
            wanted = there if wanted < 0 else min(wanted, there)
        if wanted > self._left:
            raise NotReadError("it holds too much besides its pixels")
        data = super().read(wanted)
        self._left -= len(data)
        return data


def kind_of_file(mode: int) -> str:
    """Return the kind of file that a mode describes; empty for a regular file."""
    if stat.S_ISREG(mode):
        return ""
    return _KINDS.get(stat.S_IFMT(mode), "no regular file")


def open_regular(path: Path) -> BoundedReader:
    """Open a regular file of at most 512 MiB for reading, without waiting.

    Parameters
    ----------
    path : Path
        The file, or a link to one.

    Returns
    -------
    BoundedReader
        A file of which everything may be read, until `BoundedReader.allow` limits it.

    Raises
    ------
    NotReadError
        If the path is no regular file, or the file is empty or larger.
    OSError
        If the file is missing or may not be read.
    """
    # Opening a device can already have an effect, so the path is checked first. Another
    # file may then be in its place, so the open file is checked, too, without blocking.
    _check(path.stat())
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    raw = io.FileIO(handle)  # owns the handle
    try:
        facts = os.fstat(handle)
        _check(facts)
    except BaseException:
        raw.close()
        raise
    return BoundedReader(raw, facts.st_size)


def _check(facts: os.stat_result) -> None:
    if kind := kind_of_file(facts.st_mode):
        raise NotReadError(f"it is {kind}, no regular file")
    if facts.st_size == 0:  # also files that the kernel provides in /proc
        raise NotReadError("the file is empty")
    if facts.st_size > MAX_FILE_BYTES:
        raise NotReadError(
            f"it has {facts.st_size / 2**20:.0f} MiB; files of at most "
            f"{MAX_FILE_BYTES // 2**20} MiB are read"
        )
