"""Files that are written whole or not at all, and the cache folder.

A file or folder is written under another name beside its place, synchronised and
renamed; the rename is synchronised too. A reader, or a run after a power failure, sees
the old content or the new one. Where a link lies in the place, the link is replaced,
and what it leads to stays as it is.

Decoded images, the teacher's features of private images and digests tell of the images
themselves. Whatever the umask says, such files get the mode 0600 and their folders
0700, also where they were there before with another mode.
"""

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import platformdirs

CACHE_VARIABLE = "CLIP2FL_CACHE_DIR"
FOLDER_MODE, FILE_MODE = 0o700, 0o600
INCOMPLETE = ".incomplete"

OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_EXCL follows no link, and never opens what is there.
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


@contextlib.contextmanager
def replacing(
    path: Path,
    mode: int | None = None,
    *,
    folder: int | None = None,
    only_writer: bool = False,
) -> Iterator[BinaryIO]:
    """Lend a file to write to; it takes the place of ``path`` at the end.

    Parameters
    ----------
    path : Path
        Its name. A file or link of that name is replaced.
    mode : int or None
        Permissions, whatever the umask is; None: the default permissions (umask).
    folder : int or None
        Descriptor of the open folder that it is written into, where another folder may
        take that one's name meanwhile; None: the folder that ``path`` names.
    only_writer : bool
        The caller holds a lock, so that nobody else writes the file: what a program
        that was killed has left of it is then removed.

    Yields
    ------
    file object
        Open for writing bytes. An exception leaves nothing behind.

    Raises
    ------
    OSError
        If it cannot be written; then what was there stays.
    """
    with contextlib.ExitStack() as opened:
        if folder is None:
            folder = os.open(path.parent, OPEN_FOLDER)
            opened.callback(os.close, folder)
        unique = path.name if only_writer else secrets.token_hex(8)
        temporary = f".{unique}{INCOMPLETE}"
        if only_writer:
            _unlink(temporary, folder)
        new = os.open(
            temporary, _NEW_FILE, 0o666 if mode is None else mode, dir_fd=folder
        )
        opened.callback(_unlink, temporary, folder)
        with os.fdopen(new, "wb") as file:
            if mode is not None:
                os.fchmod(new, mode)  # open takes the umask away
            yield file
            file.flush()
            os.fsync(new)
        os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)


@contextlib.contextmanager
def replacing_folder(path: Path, mode: int | None = None) -> Iterator[Path]:
    """Lend an empty folder to fill; it takes the place of ``path`` at the end.

    Parameters
    ----------
    path : Path
        Its name. A folder, file or link of that name is replaced. Nobody else may
        write it meanwhile: what a program that was killed has left of it is removed.
    mode : int or None
        Permissions, whatever the umask is; None: the default permissions (umask).

    Yields
    ------
    Path
        The folder. Files directly in it are synchronised, deeper ones are not. An
        exception leaves nothing behind.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    temporary = path.with_name(f".{path.name}{INCOMPLETE}")
    remove(temporary)
    try:
        temporary.mkdir()
        if mode is not None:
            temporary.chmod(mode)
        yield temporary
        for file in temporary.iterdir():
            _synchronise(file)
        _synchronise(temporary)
        remove(path)  # a rename replaces files, but no folder that holds some
        os.replace(temporary, path)
        _synchronise(path.parent)
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file, a folder with its content, or a link, if it is there.

    Of a link to a folder, the link is removed and the folder stays.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _unlink(name: str, folder: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
def replacing_private(path: Path) -> Iterator[BinaryIO]:
    """Lend a file of the cache to write to, as `replacing` does.

    Only its owner may read it. Its folder is made: see `private_folder`.
    """
    private_folder(path.parent)
    with replacing(path, FILE_MODE) as file:
        yield file
