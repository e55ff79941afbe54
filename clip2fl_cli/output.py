"""Files that the command writes: whole or not at all, and never through a link.

`clip2fl_common.files.replacing` writes each of them into the very folder that was
opened. Two commands that write the same file at once both succeed; the later one's
stays.
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
    """A file could not be written; says which, why, and that the old one stays."""


@dataclass(frozen=True)
class OutputFolder:
    """A folder that is held open, so that nothing can take its place meanwhile.

    Attributes
    ----------
    path : Path
        As it was given.
    descriptor : int
        Of the open folder.
    """

    path: Path
    descriptor: int

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator["OutputFolder"]:
        """Lend a folder that the user named; make it where it is missing.

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
            If it is no folder and cannot be made one.
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
        """Lend a folder in this one; make it where it is missing.

        Parameters
        ----------
        name : str
            One part of a path.

        Yields
        ------
        OutputFolder

        Raises
        ------
        OutputError
            If it is a link or no folder: files must not go elsewhere.
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
        """Write a file, as `replacing` does."""
        with self.replacing(name) as file:
            file.write(content)

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[BinaryIO]:
        """Lend a file to write to, which takes the place of ``name`` at the end.

        Parameters
        ----------
        name : str
            One part of a path. A file or link of that name is replaced.

        Yields
        ------
        binary file

        Raises
        ------
        OutputError
            If it cannot be written; then what was there stays.
        """
        path = self.path / name
        try:
            with replacing(path, folder=self.descriptor) as file:
                yield file
        except OSError as error:
            raise _error(path, error) from None


def write_file(path: Path, content: bytes) -> None:
    """Write a file that the user named, as `OutputFolder.replacing` does."""
    with OutputFolder.open(path.parent) as folder:
        folder.write(path.name, content)


def _error(
    path: Path, error: OSError, what: str = "not written, and what was there stays"
) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"{shown(path)}: {reason}; {what}")
