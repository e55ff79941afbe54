"""Files and folders that are on disk whole or not at all, whatever stops the program.

They are written under another name, synchronised and renamed; the rename itself is
synchronised too. A reader, or a run after a power failure, sees the old content or
the new one.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_SUFFIX = ".incomplete"


@contextlib.contextmanager
def replaced_whole(path: Path) -> Iterator[Path]:
    """Lend a path to write to; its content takes the place of ``path`` at the end.

    Parameters
    ----------
    path : Path
        File or folder to write; one that is there is replaced. Files directly in a
        folder are synchronised, deeper ones are not.

    Yields
    ------
    Path
        Where to write a file, or create a folder.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    remove(temporary)  # of an earlier program that was killed
    try:
        yield temporary
        if temporary.is_dir():
            for file in temporary.iterdir():
                _synchronise(file)
        _synchronise(temporary)
        if temporary.is_dir():
            remove(path)  # a rename replaces files, but no folder that holds some
        temporary.replace(path)
        _synchronise(path.parent)
    finally:
        remove(temporary)


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all.

    Parameters
    ----------
    path : Path
        File to write; one that is there is replaced.
    text : str
        Its content.
    """
    with replaced_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
