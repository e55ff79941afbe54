"""Decoded images on disk, memory-mapped: each file is decoded once, not every round.

A client's images may not fit into memory, and in a deployment every message starts a
new process. Their decoded pixels are kept in the cache folder, as one file for each
set of images; the operating system holds in memory what is used.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from logging import getLogger
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock

from clip2fl_common.feature_store import cache_dir

logger = getLogger(__name__)

# Bytes that are read at a time.
PIECE = 2**20
PIXELS = "pixels.bin"
POSITIONS = "positions.npy"

# Position in the list of files, and the decoded image.
DecodedImage = tuple[int, npt.NDArray[np.uint8]]


def decoded_images(
    paths: Sequence[Path], size: int, decode: Iterator[DecodedImage]
) -> tuple[torch.Tensor, npt.NDArray[np.int64]] | None:
    """Return decoded images from the cache; decode them into it the first time.

    Parameters
    ----------
    paths : sequence of Path
        The image files. Their paths, sizes and times of change are the key.
    size : int
        Side of the decoded images in pixels.
    decode : iterator of tuple of int and ndarray of uint8, shape [3, size, size]
        Decodes the files in their order, without the unreadable ones. Consumed only
        where the images are not in the cache.

    Returns
    -------
    tuple of Tensor of uint8, shape [N, 3, size, size], and ndarray of int64, shape [N]
        Memory-mapped pixels, and the positions in ``paths`` of what was readable.
        None where the cache cannot be used; a warning says why.
    """
    folder = cache_dir() / "images"
    try:
        place = folder / _key(paths, size)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            stored = _map(place, size)
            if stored is None:
                _store(place, decode)
                stored = _map(place, size)
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
    """Return a number for the content of each file, evenly spread over 64 bits.

    They are kept in the cache: each file is read once, as long as its path, size and
    time of change stay the same.

    Parameters
    ----------
    paths : sequence of Path
        N files.

    Returns
    -------
    ndarray of uint64, shape [N]
        The largest number for a file that cannot be read.
    """
    place = cache_dir() / "digests" / f"{_key(paths, 'digests')}.npy"
    try:
        kept: npt.NDArray[np.uint64] = np.load(place)
        if kept.shape == (len(paths),):
            return kept
    except (OSError, ValueError, EOFError):
        pass  # not there yet, or damaged
    digests = np.asarray([_file_digest(path) for path in paths], dtype=np.uint64)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=place.parent, prefix="incomplete-", delete=False
        ) as file:
            np.save(file, digests)
        os.replace(file.name, place)
    except OSError as error:
        logger.warning(
            "cannot keep the images' digests in %s (%s); the files are read in every "
            "round. Make room there or set CLIP2FL_CACHE_DIR to another folder.",
            place.parent,
            error,
        )
    return digests


def _file_digest(path: Path) -> int:
    digest = hashlib.blake2b(digest_size=8)
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
    except OSError:
        return 2**64 - 1
    return int.from_bytes(digest.digest(), "little")


def _key(paths: Sequence[Path], purpose: object) -> str:
    digest = hashlib.blake2b(str(purpose).encode(), digest_size=16)
    for path in paths:
        try:
            facts = path.stat()
            digest.update(f"\0{path}\0{facts.st_size}\0{facts.st_mtime_ns}".encode())
        except OSError:
            digest.update(f"\0{path}\0missing".encode())
    return digest.hexdigest()


def _map(place: Path, size: int) -> tuple[torch.Tensor, npt.NDArray[np.int64]] | None:
    """Return what a folder of the cache holds; None where it is absent or damaged."""
    try:
        positions = np.load(place / POSITIONS)
        shape = (len(positions), 3, size, size)
        if not len(positions):
            return torch.empty(shape, dtype=torch.uint8), positions
        # Copy on write: nobody can change the file through the tensor.
        pixels = np.memmap(place / PIXELS, dtype=np.uint8, mode="c", shape=shape)
    except FileNotFoundError:
        return None
    except (ValueError, EOFError) as error:
        logger.warning("decoded images in %s are damaged (%s); again", place, error)
        return None
    return torch.from_numpy(pixels), positions


def _store(place: Path, decode: Iterator[DecodedImage]) -> None:
    """Write a folder of the cache under another name, then rename it."""
    temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix="incomplete-"))
    try:
        positions = []
        # Written, not mapped: a full disk is then an error and not a signal.
        with open(temporary / PIXELS, "wb") as file:
            for position, pixels in decode:
                positions.append(position)
                file.write(np.ascontiguousarray(pixels).tobytes())
        np.save(temporary / POSITIONS, np.asarray(positions, dtype=np.int64))
        shutil.rmtree(place, ignore_errors=True)
        os.rename(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
