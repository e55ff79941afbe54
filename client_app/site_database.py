"""A SQLite file of a site, which is safe between the processes of its messages."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from filelock import FileLock

from client_app.site_policy import SiteRefusal
from clip2fl_common.files import FILE_MODE, FOLDER_MODE, replacing

LOCK_TIMEOUT_S = 60.0
FACTS = "CREATE TABLE fact (name TEXT PRIMARY KEY, value) WITHOUT ROWID;\n"


class LedgerError(SiteRefusal):
    """A file in which a site remembers something cannot be read or written."""


class SiteDatabase:
    """Tables in one file. The code never repairs a file or replaces it by a new one.

    Parameters
    ----------
    folder : Path
        Folder of the file; created for this user only if it is missing.

    Attributes
    ----------
    file : str
        Name of the file.
    tables : str
        Statements that create its tables.
    format : int
        Raise it when the tables change.
    """

    file: ClassVar[str]
    tables: ClassVar[str]
    format: ClassVar[int]

    def __init__(self, folder: Path) -> None:
        self.path = folder / self.file

    def _damaged(self, reason: str) -> LedgerError:
        """Return the error that tells what to do about an unusable file."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection in a transaction that locks out other writers."""
        try:
            if not self.path.exists():
                self._begin()
            # Never creates a file: a missing or empty one is no valid record.
            connection = sqlite3.connect(
                f"{self.path.resolve().as_uri()}?mode=rw",
                timeout=LOCK_TIMEOUT_S,
                isolation_level=None,
                uri=True,
            )
        except (OSError, sqlite3.Error) as error:
            raise self._damaged(str(error)) from error
        try:
            connection.execute("BEGIN IMMEDIATE")
            row = connection.execute(
                "SELECT value FROM fact WHERE name = 'format'"
            ).fetchone()
            if row != (self.format,):
                raise self._damaged(f"its format is {row}, expected {self.format}")
            yield connection
            connection.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            raise self._damaged(str(error)) from error
        finally:
            connection.close()  # rolls back what was not committed

    def _begin(self) -> None:
        """Write an empty record, whole or not at all."""
        folder = self.path.parent
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock", mode=FILE_MODE, timeout=LOCK_TIMEOUT_S):
            if self.path.exists():
                return
            with contextlib.closing(sqlite3.connect(":memory:")) as empty:
                empty.executescript(FACTS + self.tables)
                empty.execute("INSERT INTO fact VALUES ('format', ?)", (self.format,))
                empty.commit()
                content = empty.serialize()
            with replacing(self.path, FILE_MODE, only_writer=True) as file:
                file.write(content)
