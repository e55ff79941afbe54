"""Teacher features on disk: each is computed once and then reused.

A teacher is frozen. It sees an image without augmentation, or one of the image's views,
which are a fixed set of pictures. So its features are a fixed function of teacher and
sample. One SQLite file per teacher holds them, with the hash of the sample's content as
key. SQLite makes writes atomic and safe between processes.
"""

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from logging import getLogger
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from clip2fl_common.files import (
    FILE_MODE,
    cache_dir,
    make_cache_dir,
    private_file,
)

logger = getLogger(__name__)

# Clients that start together wait for each other's writes, which take milliseconds.
LOCK_TIMEOUT_S = 120.0
# Each row has a checksum, because SQLite has none.
TABLE = "checked_feature"
# SQLite's limit on the variables of one statement, in its oldest builds.
QUERY_SIZE = 900


def content_keys(images: torch.Tensor) -> list[bytes]:
    """Return a key of each image's pixels and size.

    Parameters
    ----------
    images : Tensor of uint8, shape [N, 3, H, W]
        Images, or views of them.

    Returns
    -------
    list of bytes
        N keys of 16 bytes.
    """
    size = f"{tuple(images.shape[1:])}".encode()
    return [
        hashlib.blake2b(image.tobytes(), digest_size=16, key=size[:64]).digest()
        for image in images.contiguous().cpu().numpy()
    ]


def text_keys(texts: Sequence[str]) -> list[bytes]:
    """Return a key for each text.

    Parameters
    ----------
    texts : sequence of str
        N texts, as the teacher receives them.

    Returns
    -------
    list of bytes
        N keys of 16 bytes, which differ from the keys of all images.
    """
    return [
        hashlib.blake2b(text.encode(), digest_size=16, person=b"text").digest()
        for text in texts
    ]


class FeatureCache:
    """The features of one teacher, by content key.

    A cache that cannot be read or written costs time but does not stop a run: the
    features are computed again, and a warning names the file. Damaged rows, or a
    damaged file, are removed so that they are filled again.

    Parameters
    ----------
    fingerprint : str
        The teacher's fingerprint; each teacher has its own file.
    folder : Path or None
        Folder of the file; None: `cache_dir`.
    """

    def __init__(self, fingerprint: str, folder: Path | None = None) -> None:
        self.path = (folder or cache_dir()) / f"features-{fingerprint[:32]}.sqlite"

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        make_cache_dir(self.path.parent)
        # SQLite gives its journal the mode of the file.
        private_file(self.path)
        connection = sqlite3.connect(self.path, timeout=LOCK_TIMEOUT_S)
        try:
            # Waiting for the disk after each batch held up the processes that write at
            # the same time. A killed process loses nothing by this, and what a power
            # failure damages is found and computed again.
            connection.execute("PRAGMA synchronous = OFF")
            with connection:
                connection.execute(
                    f"CREATE TABLE IF NOT EXISTS {TABLE} (key BLOB PRIMARY KEY, "
                    "value BLOB NOT NULL, digest BLOB NOT NULL) WITHOUT ROWID"
                )
                yield connection
        finally:
            connection.close()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, torch.Tensor]:
        """Return the features that are in the cache.

        Parameters
        ----------
        keys : sequence of bytes
            Content keys.

        Returns
        -------
        dict of bytes to Tensor of float32, shape [d]
            Keys that are not in the cache are missing here, too.
        """
        found: dict[bytes, torch.Tensor] = {}
        damaged: list[bytes] = []
        try:
            with self._open() as connection:
                for start in range(0, len(keys), QUERY_SIZE):
                    chunk = list(keys[start : start + QUERY_SIZE])
                    marks = ",".join("?" * len(chunk))
                    rows = connection.execute(
                        f"SELECT key, value, digest FROM {TABLE} "
                        f"WHERE key IN ({marks})",
                        chunk,
                    )
                    for key, value, digest in rows:
                        if digest != _digest(key, value):
                            damaged.append(key)
                            continue
                        array = np.frombuffer(value, dtype="<f4")
                        found[key] = torch.from_numpy(array.copy())
                connection.executemany(
                    f"DELETE FROM {TABLE} WHERE key = ?", [(key,) for key in damaged]
                )
        except (OSError, sqlite3.Error) as error:
            self._handle("read", error)
        if damaged:
            logger.warning(
                "%d of the teacher's cached features in %s were damaged; they are "
                "computed again. If this repeats, check the disk.",
                len(damaged),
                self.path,
            )
        return found

    def put(self, keys: Sequence[bytes], features: torch.Tensor) -> None:
        """Add features; existing rows stay unchanged.

        Parameters
        ----------
        keys : sequence of bytes
            N content keys.
        features : Tensor, shape [N, d]
            Their features.
        """
        values = features.cpu().numpy().astype("<f4")
        rows = [
            (key, value.tobytes(), _digest(key, value.tobytes()))
            for key, value in zip(keys, values, strict=True)
        ]
        try:
            with self._open() as connection:
                connection.executemany(
                    f"INSERT OR IGNORE INTO {TABLE} VALUES (?, ?, ?)", rows
                )
        except (OSError, sqlite3.Error) as error:
            self._handle("write", error)

    def _handle(self, action: str, error: Exception) -> None:
        """Remove a damaged file; warn of any other error."""
        # SQLite's subclasses of this error report locks, disks and permissions.
        if type(error) is sqlite3.DatabaseError:
            with contextlib.suppress(OSError):
                self._remove_damaged(error)
                return
        logger.warning(
            "cannot %s the teacher's cached features in %s (%s); they are computed "
            "again. Check the disk and the file's permissions.",
            action,
            self.path,
            error,
        )

    def _remove_damaged(self, error: Exception) -> None:
        """Remove the file, unless another process has already replaced it."""
        with FileLock(f"{self.path}.lock", mode=FILE_MODE):
            if _is_sound(self.path):
                return
            self.path.unlink(missing_ok=True)
            self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)
        logger.warning(
            "the teacher's cached features in %s were damaged (%s); the file is "
            "removed, and they are computed again. If this repeats, check the disk.",
            self.path,
            error,
        )


def _digest(key: bytes, value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=8, key=key).digest()


def _is_sound(path: Path) -> bool:
    connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S)
    try:
        verdict: tuple[str] = connection.execute("PRAGMA quick_check").fetchone()
        return verdict == ("ok",)
    except sqlite3.Error:
        return False
    finally:
        connection.close()
