"""Decoded images on disk, memory-mapped: each file is decoded once, not every round.

A client's images may not fit into memory, and in a deployment every message starts a
new process. So the cache folder keeps the decoded pixels in one file for each set of
images. The operating system keeps the parts in memory that are in use.
"""

import contextlib
import errno
import hashlib
import json
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import PIL
import torch
from filelock import FileLock

from clip2fl_common.data.image_formats import pillow_formats
from clip2fl_common.data.regular_files import open_regular
from clip2fl_common.files import (
    FILE_MODE,
    FOLDER_MODE,
    cache_dir,
    private_folder,
    remove,
    replacing_folder,
    replacing_private,
)
from clip2fl_common.shown import shown

logger = getLogger(__name__)

# Bytes to read at a time.
PIECE = 2**20
PIXELS = "pixels.bin"
REFUSED = "refused.json"
# Seconds without use after which what is made from images is removed.
UNUSED_S = 30 * 24 * 3600
# Version of the decoding; raise the number if the decoding changes.
DECODER = 2
# Digest of a file that cannot be read.
NO_DIGEST = 2**64 - 1


@dataclass(frozen=True)
class Refusal:
    """An image file that is not decoded.

    Attributes
    ----------
    reason : str
        Why.
    lasting : bool
        Whether the reason remains while the file stays the same.
    """

    reason: str
    lasting: bool


DecodedImage: TypeAlias = npt.NDArray[np.uint8] | Refusal


class _PassingError(Exception):
    """A file could not be read for the moment, so nothing of the set is kept.

    The message names it, and says why.
    """


def _decoder(size: int) -> str:
    """Return what decoded pixels depend on besides the files.

    Another version of Pillow may decode differently. Another package, such as
    pillow-heif, may read a file that was refused without it.
    """
    return f"{DECODER}, Pillow {PIL.__version__}, {pillow_formats(heif=True)}, {size}"


def decoded_images(
    paths: Sequence[Path], size: int, decode: Iterator[DecodedImage]
) -> tuple[torch.Tensor, dict[int, str]] | None:
    """Return decoded images from the cache; the first time, decode and store them.

    Parameters
    ----------
    paths : sequence of Path
        The image files. The cache key is made of their paths, sizes and times.
    size : int
        Side of the decoded images in pixels.
    decode : iterator of ndarray of uint8, shape [3, size, size], or Refusal
        Decodes the files in their order. It is used only if the images are not in the
        cache.

    Returns
    -------
    tuple of Tensor of uint8, shape [N, 3, size, size], and dict of int to str
        Memory-mapped pixels of the readable images, and the reasons by position in
        ``paths`` for the others. None if the cache cannot be used; a warning says
        why.
    """
    folder = cache_dir() / "images"
    try:
        key = cache_key(paths, _decoder(size))
        place = folder / key
        private_folder(folder)
        remove_unused(folder, REFUSED)
        with FileLock(f"{place}.lock", mode=FILE_MODE):
            stored = _map(place, len(paths), size)
            if stored is None:
                _store(place, _lasting(decode, paths, size, key))
                stored = _map(place, len(paths), size)
    except _PassingError as error:
        logger.warning(
            "decoded images are not kept, so that they are decoded in every round: %s",
            error,
        )
        return None  # decoding the images again reports the unreadable files
    except OSError as error:
        logger.warning(
            "cannot keep decoded images in %s (%s); they are decoded in every round. "
            "Make room there or set CLIP2FL_CACHE_DIR to another folder.",
            folder,
            error,
        )
        return None
    assert stored is not None
    return stored


def file_digests(paths: Sequence[Path]) -> npt.NDArray[np.uint64]:
    """Return a number for each file's content, evenly distributed over 64 bits.

    The numbers are kept in the cache. Each file is read once, as long as its path, size
    and change time stay the same.

    Parameters
    ----------
    paths : sequence of Path
        N files.

    Returns
    -------
    ndarray of uint64, shape [N]
        The largest number for a file that cannot be read: see `open_regular`.
    """
    key = cache_key(paths, "digests")
    place = cache_dir() / "digests" / f"{key}.npy"
    try:
        kept: npt.NDArray[np.uint64] = np.load(place)
        if kept.shape == (len(paths),):
            note_use(place)
            return kept
    except (OSError, ValueError, EOFError):
        pass  # absent or damaged
    passing = False
    found: list[int] = []
    for path in paths:
        try:
            found.append(_file_digest(path))
        except OSError as error:
            found.append(NO_DIGEST)
            # Readable tomorrow, say; a file that is missing, or that the system does
            # not let us read, has another key then.
            passing |= error.errno is not None and os.access(path, os.R_OK)
    digests = np.asarray(found, dtype=np.uint64)
    # A file that changed or vanished meanwhile may not have this digest tomorrow.
    if passing or cache_key(paths, "digests") != key:
        return digests
    try:
        with replacing_private(place) as file:
            np.save(file, digests)
        remove_unused(place.parent)
    except OSError as error:
        logger.warning(
            "cannot keep the images' digests in %s (%s); the files are read in every "
            "round. Make room there or set CLIP2FL_CACHE_DIR to another folder.",
            place.parent,
            error,
        )
    return digests


def identical_files(
    paths: Sequence[Path], others: Sequence[Path]
) -> list[tuple[Path, Path]]:
    """Return the files with the same content as a file of another list, in pairs.

    Only files with a size that occurs in both lists are read. Digests are cached.

    Parameters
    ----------
    paths, others : sequence of Path
        Files.

    Returns
    -------
    list of tuple of Path and Path
        Pairs of a file of ``paths``, in their order, and its first equal of ``others``.
    """
    by_size: defaultdict[int, list[Path]] = defaultdict(list)
    for other in others:
        by_size[_size(other)].append(other)
    sizes = {path: _size(path) for path in paths}
    candidates = [path for path in paths if sizes[path] > 0 and sizes[path] in by_size]
    same_size = {sizes[path] for path in candidates}
    compared = [other for size in sorted(same_size) for other in by_size[size]]
    first: dict[int, Path] = {}
    for other, digest in zip(compared, file_digests(compared).tolist(), strict=True):
        if digest != NO_DIGEST:
            first.setdefault(digest, other)
    digests = file_digests(candidates).tolist()
    return [
        (path, first[digest])
        for path, digest in zip(candidates, digests, strict=True)
        if digest in first
    ]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _file_digest(path: Path) -> int:
    digest = hashlib.blake2b(digest_size=8)
    with open_regular(path) as file:
        # If the file grows meanwhile, only its size at opening is read.
        left = file.size
        while left > 0 and (piece := file.read(min(PIECE, left))):
            digest.update(piece)
            left -= len(piece)
    return int.from_bytes(digest.digest(), "little")


def cache_key(paths: Sequence[Path], purpose: str) -> str:
    """Return a name for what is made from files: other sizes or times, another name.

    The inode's change time tells of new content that kept the time of the old one, as
    after ``cp -p`` or ``mv``. It does not tell of a user that joins a group, so that a
    file has another name once it may be read.
    """
    digest = hashlib.blake2b(purpose.encode(), digest_size=16)
    for path in paths:
        digest.update(b"\0" + os.fsencode(path))
        try:
            facts = path.stat()
            times = f"{facts.st_mtime_ns}\0{facts.st_ctime_ns}"
            digest.update(f"\0{facts.st_size}\0{times}".encode())
            if not os.access(path, os.R_OK):
                digest.update(b"\0denied")
        except OSError:
            digest.update(b"\0missing")
    return digest.hexdigest()


def _lasting(
    decode: Iterator[DecodedImage], paths: Sequence[Path], size: int, key: str
) -> Iterator[DecodedImage]:
    """Yield decoded images; raise if one cannot be read for the moment.

    Raise at the end if a file changed or vanished meanwhile: its pixels would otherwise
    be kept as those of the file as it was before.
    """
    for path, decoded in zip(paths, decode, strict=True):
        if isinstance(decoded, Refusal) and not decoded.lasting:
            raise _PassingError(f"{shown(path)}: {decoded.reason}")
        yield decoded
    if cache_key(paths, _decoder(size)) != key:
        raise _PassingError("files changed while they were read")


def _map(
    place: Path, count: int, size: int
) -> tuple[torch.Tensor, dict[int, str]] | None:
    """Return the content of a cache folder; None if it is absent or damaged."""
    try:
        kept = json.loads((place / REFUSED).read_text("utf-8"))
        refused = {int(position): str(reason) for position, reason in kept.items()}
        shape = (count - len(refused), 3, size, size)
        if shape[0] <= 0:
            return torch.empty((0, *shape[1:]), dtype=torch.uint8), refused
        pixels = _mapped(place / PIXELS, shape)
    except FileNotFoundError:
        return None
    except (ValueError, EOFError, AttributeError) as error:
        logger.warning("decoded images in %s are damaged (%s); again", place, error)
        return None
    note_use(place / REFUSED)
    return pixels, refused


def _mapped(file: Path, shape: tuple[int, ...]) -> torch.Tensor:
    try:
        # Copy on write: writing to the tensor does not change the file.
        pixels = np.memmap(file, dtype=np.uint8, mode="c", shape=shape)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        # Linux refuses it for more than memory and swap together, because all could be
        # written to. Read-only pages need no memory; nothing here writes to images.
        pixels = np.memmap(file, dtype=np.uint8, mode="r", shape=shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a tensor that cannot be written to
            return torch.from_numpy(pixels)
    return torch.from_numpy(pixels)


def remove_unused(folder: Path, marker: str = "") -> None:
    """Remove what no run has used for a month, and what is half-written.

    Each set of images is stored as a whole: one new image, another partition or another
    version of Pillow makes a copy.

    Parameters
    ----------
    folder : Path
        A folder of the cache. Locks in it stay.
    marker : str
        For sets that are folders: the file in each that `note_use` is called with.
    """
    for place in folder.iterdir():
        if place.suffix == ".lock":  # another process may hold it
            continue
        with contextlib.suppress(OSError):  # another process may remove it, too
            used = place.stat().st_mtime
            if marker and (place / marker).exists():  # not if it is half-written
                used = max(used, (place / marker).stat().st_mtime)
            if used < time.time() - UNUSED_S:
                remove(place)


def note_use(file: Path) -> None:
    """Note that a file of the cache, or the folder that it is in, is in use."""
    with contextlib.suppress(OSError):  # a folder without the right to write
        os.utime(file)


def _store(place: Path, decode: Iterator[DecodedImage]) -> None:
    """Write a folder of the cache, completely or not at all."""
    with replacing_folder(place, FOLDER_MODE) as folder:
        refused: dict[int, str] = {}
        # Written, not mapped: a full disk then raises an error instead of a signal.
        with replacing_private(folder / PIXELS) as file:
            for position, decoded in enumerate(decode):
                if not isinstance(decoded, Refusal):
                    file.write(np.ascontiguousarray(decoded).tobytes())
                    continue
                refused[position] = decoded.reason
        with replacing_private(folder / REFUSED) as file:
            file.write(json.dumps(refused).encode())
