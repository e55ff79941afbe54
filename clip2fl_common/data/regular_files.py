"""Files opened so that nothing but a regular file of bounded size is ever read.

A named pipe that is called ``x.png`` makes whoever opens it wait for ever, and reading
a device may do anything. Links are followed to where they end.
"""

import io
import os
import stat
from pathlib import Path

# The largest file that is read, also to hash it.
MAX_FILE_BYTES = 512 * 2**20
# Bytes that may be asked for beyond the end of a file.
_SMALL = 2**16

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotReadError(OSError):
    """A file is not read: it is no regular file, empty, too large or not as it says.

    It has no ``errno``, unlike an error of the operating system.
    """


class BoundedReader(io.BufferedReader):
    """A regular file that gives away only as many bytes as were allowed.

    Image formats hold lengths; a false one must not fill the memory.

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
        """Read as a file does.

        Raises
        ------
        NotReadError
            If that were more bytes than allowed.
        """
        wanted = -1 if size is None else size
        if not 0 <= wanted <= _SMALL:
            # Python makes room for what is asked for before it looks what is there.
            there = max(self.size - self.tell(), 0)
            wanted = there if wanted < 0 else min(wanted, there)
        if wanted > self._left:
            raise NotReadError("it holds too much besides its pixels")
        data = super().read(wanted)
        self._left -= len(data)
        return data


def kind_of_file(mode: int) -> str:
    """Return what a file's mode says it is; nothing for a regular file."""
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
        All of it may be read until `BoundedReader.allow` says otherwise.

    Raises
    ------
    NotReadError
        If it is anything else, empty or larger.
    OSError
        If it is not there or may not be read.
    """
    # Opening alone can act on a device, so it is looked at first. What is then opened
    # may be another file; hence the second look, and no waiting for a pipe's writer.
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
    if facts.st_size == 0:  # also what the kernel shows in /proc
        raise NotReadError("the file is empty")
    if facts.st_size > MAX_FILE_BYTES:
        raise NotReadError(
            f"it has {facts.st_size / 2**20:.0f} MiB; files of at most "
            f"{MAX_FILE_BYTES // 2**20} MiB are read"
        )
