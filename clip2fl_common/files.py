"""Files that are written completely or not at all, and the cache folder.

A file or folder is written under a temporary name in the same folder, synchronised and
renamed; the rename is synchronised too. A reader, or a run after a power failure, sees
either the old or the new content. If a link has the name, the link is replaced, and its
target does not change.

Decoded images, the teacher's features of private images and digests reveal information
about the images. Such files always get the mode 0600 and their folders 0700, regardless
of the umask, even if they existed before with another mode.
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
# O_EXCL does not follow links, and fails if the file exists.
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


@contextlib.contextmanager
def replacing(
    path: Path,
    mode: int | None = None,
    *,
    folder: int | None = None,
    only_writer: bool = False,
) -> Iterator[BinaryIO]:
    """Lend a file to write to; at the end it replaces ``path``.

    Parameters
    ----------
    path : Path
        Final name. An existing file or link of that name is replaced.
    mode : int or None
        Permissions, regardless of the umask; None: the default permissions (umask).
    folder : int or None
        Descriptor of the open folder to write into, for a path whose folder may be
        replaced meanwhile; None: the folder in ``path``.
    only_writer : bool
        The caller holds a lock, so that no other process writes the file. Temporary
        files that a killed program left behind are then removed.

    Yields
    ------
    file object
        Open for writing bytes. An exception leaves nothing behind.

    Raises
    ------
    OSError
        If the file cannot be written; the old content then stays.
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
    """Lend an empty folder to fill; at the end it replaces ``path``.

    Parameters
    ----------
    path : Path
        Final name. An existing folder, file or link of that name is replaced. No other
        process may write it meanwhile: files that a killed program left are removed.
    mode : int or None
        Permissions, regardless of the umask; None: the default permissions (umask).

    Yields
    ------
    Path
        The folder. Files directly in it are synchronised, files in subfolders are
        not. An exception leaves nothing behind.

    Raises
    ------
    OSError
        If the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}{INCOMPLETE}")
    remove(temporary)
    try:
        temporary.mkdir()
        if mode is not None:
            temporary.chmod(mode)
        yield temporary
        finish_folder(temporary, path)
    finally:
        remove(temporary)


def finish_folder(temporary: Path, path: Path) -> None:
    """Give a filled folder its final name, after its files are synchronised.

    Parameters
    ----------
    temporary : Path
        The folder, beside ``path``.
    path : Path
        Final name. An existing folder, file or link of that name is replaced.

    Raises
    ------
    OSError
        If the folder cannot be written.
    """
    for file in temporary.iterdir():
        _synchronise(file)
    _synchronise(temporary)
    remove(path)  # a rename replaces files, but no folder that is not empty
    os.replace(temporary, path)
    _synchronise(path.parent)


def remove(path: Path) -> None:
    """Remove a file, a folder with its content, or a link, if it is there.

    A link to a folder is removed, and the folder stays.
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
    """Return the folder of the cache.

    Returns
    -------
    Path
        ``$CLIP2FL_CACHE_DIR`` if set, else ``clip2fl`` in the user's cache folder.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("clip2fl"))


def make_cache_dir(path: Path) -> None:
    """Create a cache folder for its owner only; leave an existing one unchanged.

    Raises
    ------
    OSError
        If the folder cannot be created.
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
    """Create a folder of the cache, or remove other users' access to it.

    Raises
    ------
    OSError
        If it cannot be created, or another user owns it and others may enter it.
    """
    make_cache_dir(path.parent)
    path.mkdir(mode=FOLDER_MODE, exist_ok=True)
    mode = path.stat().st_mode
    if stat.S_IMODE(mode) & 0o777 != FOLDER_MODE:
        path.chmod(stat.S_IMODE(mode) & ~0o777 | FOLDER_MODE)


def private_file(path: Path) -> None:
    """Create an empty file, or remove other users' access to an existing one.

    A link is not followed: another user of a shared folder may have put it there.

    Raises
    ------
    OSError
        If it cannot be created, or another user owns it and others may read it.
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

    Only its owner may read it. Its folder is created: see `private_folder`.
    """
    private_folder(path.parent)
    with replacing(path, FILE_MODE) as file:
        yield file
