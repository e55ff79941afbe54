"""The cache folder, and files in it that only their owner may read.

Decoded images, the teacher's features of private images and digests tell of the images
themselves. Whatever the umask says, such files get the mode 0600 and their folders
0700, also where they were there before with another mode.
"""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import platformdirs

CACHE_VARIABLE = "CLIP2FL_CACHE_DIR"
FOLDER_MODE, FILE_MODE = 0o700, 0o600


def cache_dir() -> Path:
    """Return the folder of everything that is computed once and kept.

    Returns
    -------
    Path
        ``$CLIP2FL_CACHE_DIR`` where set, else ``clip2fl`` in the user's cache folder.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("clip2fl"))


def make_cache_dir(path: Path) -> None:
    """Make a cache folder that only its owner may enter; leave one that is there.

    Raises
    ------
    OSError
        If it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=FOLDER_MODE)
    except FileExistsError:
        if not path.is_dir():
            raise
    else:
        path.chmod(FOLDER_MODE)  # mkdir takes the umask away


def private_folder(path: Path) -> None:
    """Make a folder of the cache, or take everybody else's rights from it.

    Raises
    ------
    OSError
        If it cannot be made, or others may enter it and it belongs to another user.
    """
    make_cache_dir(path.parent)
    path.mkdir(mode=FOLDER_MODE, exist_ok=True)
    mode = path.stat().st_mode
    if stat.S_IMODE(mode) & 0o777 != FOLDER_MODE:
        path.chmod(stat.S_IMODE(mode) & ~0o777 | FOLDER_MODE)


def private_file(path: Path) -> None:
    """Make an empty file, or take everybody else's rights from one that is there.

    A link is not followed: another user of a shared folder may have put it there.

    Raises
    ------
    OSError
        If it cannot be made, or others may read it and it belongs to another user.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(path, flags, FILE_MODE)
    try:
        if stat.S_IMODE(os.fstat(handle).st_mode) != FILE_MODE:
            os.fchmod(handle, FILE_MODE)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(place: Path) -> Iterator[BinaryIO]:
    """Open a private file that takes its place once it is complete.

    Parameters
    ----------
    place : Path
        Its name; the folder is made, see `private_folder`.

    Yields
    ------
    file object
        Open for writing bytes. An exception leaves nothing behind.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    private_folder(place.parent)
    handle, temporary = tempfile.mkstemp(dir=place.parent, prefix="incomplete-")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, FILE_MODE)  # mkstemp takes the umask away
            yield file
        os.replace(temporary, place)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
