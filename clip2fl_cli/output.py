"""Files that the command writes: completely or not at all, and never through a link.

`clip2fl_common.files.replacing` writes each file into the folder that was opened, even
if another folder takes its name meanwhile. Two commands may write the same file at
once: both succeed, and the later file stays.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from clip2fl_common.files import OPEN_FOLDER, replacing
from clip2fl_common.shown import shown


class OutputError(OSError):
    """A file could not be written; names it and the reason. The old file stays."""


@dataclass(frozen=True)
class OutputFolder:
    """A folder that is held open, so that no other folder can replace it meanwhile.

    Attributes
    ----------
    path : Path
        The path as given.
    descriptor : int
        Descriptor of the open folder.
    """

    path: Path
    descriptor: int

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator["OutputFolder"]:
        """Lend a folder that the user named; create it if it is missing.

        Parameters
        ----------
        path : Path
            A folder, or a link to one.

        Yields
        ------
        OutputFolder

        Raises
        ------
        OutputError
            If the path is no folder and no folder can be created there.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, OPEN_FOLDER)
        except OSError as error:
            raise _error(path, error, "no folder to write into") from None
        try:
            yield cls(path, descriptor)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def subfolder(self, name: str) -> Iterator["OutputFolder"]:
        """Lend a subfolder of this folder; create it if it is missing.

        Parameters
        ----------
        name : str
            One component of a path.

        Yields
        ------
        OutputFolder

        Raises
        ------
        OutputError
            If it is a link or no folder: a link could lead files elsewhere.
        """
        path = self.path / name
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=self.descriptor)
            descriptor = os.open(
                name, OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=self.descriptor
            )
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise OutputError(
                    f"{shown(path)} is a link or no folder, so nothing is written "
                    "there: remove it, and the command makes a folder of that name"
                ) from None
            raise _error(path, error, "no folder to write into") from None
        try:
            yield OutputFolder(path, descriptor)
        finally:
            os.close(descriptor)

    def write(self, name: str, content: bytes) -> None:
        """Write a file, using `replacing`."""
        with self.replacing(name) as file:
            file.write(content)

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[BinaryIO]:
        """Lend a file to write to; at the end it replaces ``name``.

        Parameters
        ----------
        name : str
            One component of a path. An existing file or link of that name is replaced.

        Yields
        ------
        binary file

        Raises
        ------
        OutputError
            If the file cannot be written; the old content then stays.
        """
        path = self.path / name
        try:
            with replacing(path, folder=self.descriptor) as file:
                yield file
        except OSError as error:
            raise _error(path, error) from None


def write_file(path: Path, content: bytes) -> None:
    """Write a file that the user named, using `OutputFolder.replacing`."""
    with OutputFolder.open(path.parent) as folder:
        folder.write(path.name, content)


def _error(
    path: Path, error: OSError, what: str = "not written, and what was there stays"
) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"{shown(path)}: {reason}; {what}")
