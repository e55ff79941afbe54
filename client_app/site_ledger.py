"""What a site has answered so far: kept on its disk, and counted there.

In a deployment every message is a process of its own, so that budgets, the division of
the images and the choice of those that enter class gradients must outlive it. They are
in one SQLite file, safe between processes. It is never repaired or begun anew by
itself: who loses it has given all budgets back.
"""

import contextlib
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Literal

from filelock import FileLock

from client_app.site_policy import SitePolicy, SiteRefusal
from clip2fl_common.files import FILE_MODE, FOLDER_MODE, replacing

logger = getLogger(__name__)

LOCK_TIMEOUT_S = 60.0
FILE = "ledger.sqlite"
# Raise it when the tables change.
FORMAT = 1
TABLES = """
CREATE TABLE fact (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE answered (
    run TEXT, kind TEXT, times INTEGER NOT NULL, PRIMARY KEY (run, kind)
) WITHOUT ROWID;
CREATE TABLE gradient_image (
    digest BLOB PRIMARY KEY, class TEXT NOT NULL, cut INTEGER NOT NULL
) WITHOUT ROWID;
"""

Kind = Literal["query", "train", "evaluate"]


class LedgerError(SiteRefusal):
    """The record of what was answered cannot be read or written."""


@dataclass(frozen=True)
class HeldImages:
    """The images of one class at a site, by the content of their files.

    Attributes
    ----------
    readable : sequence of int
        Digest of each training image that could be read, in their order.
    there : set of int
        Digests of all training images.
    """

    readable: Sequence[int]
    there: frozenset[int]


class SiteLedger:
    """A site's record of runs, requests, its division of images and its choices.

    Parameters
    ----------
    folder : Path
        Where the file lies; made for this user alone if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def count(self, run: str, kind: Kind, policy: SitePolicy) -> None:
        """Count a request, unless the site has answered enough.

        Parameters
        ----------
        run : str
            Flower's id of the run.
        kind : {"query", "train", "evaluate"}
            Of the request. A query is not counted, but is refused as a request is.
        policy : SitePolicy
            Has the most runs, and the most requests of each kind in a run.

        Raises
        ------
        SiteRefusal
            If that would be one too many.
        LedgerError
            If it cannot be counted.
        """
        with self._open() as ledger:
            runs = {row[0] for row in ledger.execute("SELECT run FROM answered")}
            if (
                policy.max_runs is not None
                and run not in runs
                and len(runs) >= policy.max_runs
            ):
                raise SiteRefusal(
                    f"the site has answered {len(runs)} runs, and its max-runs is "
                    f"{policy.max_runs}"
                )
            counted = "train" if kind == "query" else kind
            row = ledger.execute(
                "SELECT times FROM answered WHERE run = ? AND kind = ?", (run, counted)
            ).fetchone()
            times: int = row[0] if row else 0
            if policy.max_rounds is not None and times >= policy.max_rounds:
                raise SiteRefusal(
                    f"the site has answered {times} requests to {counted} of this run, "
                    f"and its max-rounds is {policy.max_rounds}"
                )
            if kind != "query":
                ledger.execute(
                    "REPLACE INTO answered VALUES (?, ?, ?)", (run, kind, times + 1)
                )

    def runs(self) -> int:
        """Return the number of runs that were answered."""
        with self._open() as ledger:
            query = "SELECT COUNT(DISTINCT run) FROM answered"
            return int(ledger.execute(query).fetchone()[0])

    def validation_share(self, asked: float, keep: bool) -> float:
        """Return the share that evaluates: that of the first run.

        Parameters
        ----------
        asked : float
            The share that a run asks for.
        keep : bool
            Whether this is what the first run gets, if there was none.

        Raises
        ------
        LedgerError
            If it is not known.
        """
        name = "validation-share"
        with self._open() as ledger:
            row = ledger.execute(
                "SELECT value FROM fact WHERE name = ?", (name,)
            ).fetchone()
            if row is None:
                if keep:
                    ledger.execute("INSERT INTO fact VALUES (?, ?)", (name, asked))
                return asked
        if not isinstance(row[0], float) or not 0 < row[0] < 1:
            raise self._damaged(f"{name} is {row[0]!r}")
        return row[0]

    def gradient_images(
        self, held: Mapping[str, HeldImages], least: int, policy: SitePolicy
    ) -> dict[str, list[int]]:
        """Return which images of each class enter its gradient: always the same.

        A set is drawn once, by chance that no server knows. An image enters one set of
        one class, ever: sums over sets, however they are combined, are sums over whole
        sets, and none is smaller than the site's ``min-class-samples``.

        Parameters
        ----------
        held : mapping of str to HeldImages
            The site's training images by class.
        least : int
            Images that a class gradient needs, by the run and the site.
        policy : SitePolicy
            Has the size of a set, and how many sets of a class there may be.

        Returns
        -------
        dict of str to list of int
            Places in ``readable``, ascending; without the classes that send nothing.

        Raises
        ------
        LedgerError
            If the sets cannot be read or kept.
        """
        chosen = {}
        with self._open() as ledger:
            for name, images in held.items():
                place = {digest: i for i, digest in enumerate(images.readable)}
                found = _gradient_set(ledger, name, images, least, policy)
                if len(found) >= least:
                    chosen[name] = sorted(place[digest] for digest in found)
        return chosen

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection in a transaction that keeps other writers out."""
        try:
            if not self.path.exists():
                self._begin()
            # Never makes a file: a missing or empty one is no ledger.
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
            if row != (FORMAT,):
                raise self._damaged(f"its format is {row}, expected {FORMAT}")
            yield connection
            connection.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            raise self._damaged(str(error)) from error
        finally:
            connection.close()  # takes back what was not committed

    def _begin(self) -> None:
        """Write an empty ledger, whole or not at all."""
        folder = self.path.parent
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock", mode=FILE_MODE, timeout=LOCK_TIMEOUT_S):
            if self.path.exists():
                return
            with contextlib.closing(sqlite3.connect(":memory:")) as empty:
                empty.executescript(TABLES)
                empty.execute("INSERT INTO fact VALUES ('format', ?)", (FORMAT,))
                empty.commit()
                content = empty.serialize()
            with replacing(self.path, FILE_MODE, only_writer=True) as file:
                file.write(content)

    def _damaged(self, reason: str) -> LedgerError:
        return LedgerError(
            f"the record of what this site has answered, {self.path}, cannot be used "
            f"({reason}); restore it, or name another folder with site-state",
            "the site's record of what it has answered cannot be used; the site's own "
            "log says more",
        )


def _gradient_set(
    ledger: sqlite3.Connection,
    name: str,
    images: HeldImages,
    least: int,
    policy: SitePolicy,
) -> set[int]:
    """Return the set of a class that is answered now; empty: none."""
    readable = set(images.readable)
    sets: dict[int, set[int]] = {}
    rows = ledger.execute(
        "SELECT cut, digest FROM gradient_image WHERE class = ?", (name,)
    )
    for cut, digest in rows:
        sets.setdefault(cut, set()).add(int.from_bytes(digest, "big"))
    for _, known in sorted(sets.items()):
        if known <= images.there and len(known) >= policy.min_class_samples:
            if known <= readable:
                return known
            logger.warning("class %s: some of its fixed images cannot be read", name)
            return set()
    if len(sets) >= policy.gradient_cuts:
        logger.warning(
            "class %s sends no gradient any more: images of the set that was fixed are "
            "gone or changed, and gradient-cuts = %d sets were answered",
            name,
            policy.gradient_cuts,
        )
        return set()
    used = {
        int.from_bytes(row[0], "big")
        for row in ledger.execute("SELECT digest FROM gradient_image")
    }
    fresh = sorted(readable - used)
    if len(fresh) < least:
        return set()
    drawn = secrets.SystemRandom().sample(fresh, min(policy.set_size, len(fresh)))
    ledger.executemany(
        "INSERT INTO gradient_image VALUES (?, ?, ?)",
        [(digest.to_bytes(8, "big"), name, len(sets)) for digest in drawn],
    )
    return set(drawn)
