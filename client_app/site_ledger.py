"""A site's record of what it has answered, kept and counted on its own disk.

In a deployment every message starts a new process, so these must be stored: the
budgets, the division of the images, and the images chosen for class gradients. They are
in one SQLite file, which is safe between processes. The code never repairs the file or
starts a new one in its place, since losing it would reset all budgets.
"""

import hashlib
import math
import secrets
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Literal

from client_app.site_database import LedgerError as LedgerError
from client_app.site_database import SiteDatabase
from client_app.site_policy import SitePolicy, SiteRefusal
from clip2fl_common.epsilon import epsilon

logger = getLogger(__name__)

FILE = "ledger.sqlite"
# Raise it when the tables change.
FORMAT = 1
# Facts beside the format.
VALIDATION_SHARE, PRIVACY_COST = "validation-share", "privacy-cost"
TABLES = """
CREATE TABLE answered (
    run TEXT, kind TEXT, times INTEGER NOT NULL, PRIMARY KEY (run, kind)
) WITHOUT ROWID;
CREATE TABLE gradient_image (
    digest BLOB PRIMARY KEY, class TEXT NOT NULL, cut INTEGER NOT NULL
) WITHOUT ROWID;
"""

# Kind of the rows that have the digest of a list of classes in place of a run.
CLASSES = "classes"
RUNS = "SELECT DISTINCT run FROM answered WHERE kind <> ?"

Kind = Literal["query", "train", "evaluate", "finish"]


@dataclass(frozen=True)
class HeldImages:
    """The images of one class at a site, identified by the content of their files.

    Attributes
    ----------
    readable : sequence of int
        Digest of each readable training image, in order of the images.
    there : set of int
        Digests of all training images.
    """

    readable: Sequence[int]
    there: frozenset[int]


class SiteLedger(SiteDatabase):
    """A site's record of runs, requests, its division of images and chosen images."""

    file = FILE
    tables = TABLES
    format = FORMAT

    def count(self, run: str, kind: Kind, policy: SitePolicy, classes: str) -> None:
        """Count a request, or refuse it if a budget is used up.

        Parameters
        ----------
        run : str
            Flower's id of the run.
        kind : {"query", "train", "evaluate", "finish"}
            Kind of the request. A query is not counted, but it can be refused. To
            finish a round that was counted is neither.
        policy : SitePolicy
            Gives the most runs, and the most requests of each kind in a run.
        classes : str
            The classes that the request names. Any answer tells whether the site holds
            others, so there may be no more different lists than runs.

        Raises
        ------
        SiteRefusal
            If the request exceeds a budget.
        LedgerError
            If the request cannot be counted.
        """
        if kind == "finish":
            return
        with self._open() as ledger:
            self._count_classes(ledger, classes, policy)
            runs = {row[0] for row in ledger.execute(RUNS, (CLASSES,))}
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

    def _count_classes(
        self, ledger: sqlite3.Connection, classes: str, policy: SitePolicy
    ) -> None:
        digest = hashlib.blake2b(classes.encode(), digest_size=16).hexdigest()
        query = "SELECT run FROM answered WHERE kind = ?"
        known = {row[0] for row in ledger.execute(query, (CLASSES,))}
        if digest in known:
            return
        if policy.max_runs is not None and len(known) >= policy.max_runs:
            raise SiteRefusal(
                f"the site has answered {len(known)} different lists of classes, and "
                f"its max-runs is {policy.max_runs}"
            )
        ledger.execute("INSERT INTO answered VALUES (?, ?, 0)", (digest, CLASSES))

    def runs(self) -> int:
        """Return the number of answered runs."""
        with self._open() as ledger:
            return len(ledger.execute(RUNS, (CLASSES,)).fetchall())

    def validation_share(self, asked: float, keep: bool) -> float:
        """Return the share of validation images: the first run's share, for all runs.

        Parameters
        ----------
        asked : float
            The share that a run asks for.
        keep : bool
            Whether to store the asked share for later runs if none is stored.

        Raises
        ------
        LedgerError
            If the stored share cannot be read.
        """
        with self._open() as ledger:
            share = self._number(ledger, VALIDATION_SHARE)
            if share is None:
                if keep:
                    _set(ledger, VALIDATION_SHARE, asked)
                return asked
        if not 0 < share < 1:
            raise self._damaged(f"{VALIDATION_SHARE} is {share!r}")
        return share

    def spend(self, cost: float, policy: SitePolicy, *, keep: bool) -> float:
        """Return the epsilon of all answers with one more, or refuse that one.

        Parameters
        ----------
        cost : float
            The answer's cost, as `clip2fl_common.epsilon.cost` returns it.
        policy : SitePolicy
            Has a ``max-epsilon``.
        keep : bool
            Whether to count the answer. It is counted before it is computed: an answer
            that is lost on its way counts.

        Raises
        ------
        SiteRefusal
            If the answer exceeds ``max-epsilon``.
        LedgerError
            If the answer cannot be counted.
        """
        assert policy.max_epsilon is not None
        with self._open() as ledger:
            spent = self._number(ledger, PRIVACY_COST) or 0.0
            if spent < 0:
                raise self._damaged(f"{PRIVACY_COST} is {spent!r}")
            total = _epsilon(spent + cost, policy)
            if total > policy.max_epsilon:
                raise SiteRefusal(
                    f"the site's answers have spent epsilon = "
                    f"{_epsilon(spent, policy):.4g}, this one would make it "
                    f"{total:.4g}, and its max-epsilon is {policy.max_epsilon:g}"
                )
            if keep:
                _set(ledger, PRIVACY_COST, spent + cost)
        return total

    def spent(self, policy: SitePolicy) -> float:
        """Return the epsilon that all answers under a ``max-epsilon`` have spent."""
        with self._open() as ledger:
            return _epsilon(self._number(ledger, PRIVACY_COST) or 0.0, policy)

    def _number(self, ledger: sqlite3.Connection, name: str) -> float | None:
        """Return a fact that is a finite number; None if it was never stored."""
        query = "SELECT value FROM fact WHERE name = ?"
        row = ledger.execute(query, (name,)).fetchone()
        if row is None:
            return None
        value = row[0]
        if not isinstance(value, float) or not math.isfinite(value):
            raise self._damaged(f"{name} is {value!r}")
        return value

    def gradient_images(
        self, held: Mapping[str, HeldImages], least: int, policy: SitePolicy
    ) -> dict[str, list[int]]:
        """Return which images of each class enter its gradient, the same every time.

        A set is drawn once, from random numbers that no server knows. An image is part
        of at most one set of one class. So any combination of answers is a sum over
        whole sets, and no set is smaller than the site's ``min-class-samples``.

        Parameters
        ----------
        held : mapping of str to HeldImages
            The site's training images by class.
        least : int
            Fewest images that a class gradient needs, for both the run and the site.
        policy : SitePolicy
            Gives the size of a set and the number of sets per class.

        Returns
        -------
        dict of str to list of int
            Positions in ``readable``, ascending; without the classes that send nothing.

        Raises
        ------
        LedgerError
            If the sets cannot be read or stored.
        """
        chosen = {}
        with self._open() as ledger:
            for name, images in held.items():
                place = {digest: i for i, digest in enumerate(images.readable)}
                found = _gradient_set(ledger, name, images, least, policy)
                if len(found) >= least:
                    chosen[name] = sorted(place[digest] for digest in found)
        return chosen

    def _damaged(self, reason: str) -> LedgerError:
        return LedgerError(
            f"the record of what this site has answered, {self.path}, cannot be used "
            f"({reason}); restore it, or name another folder with site-state",
            "the site's record of what it has answered cannot be used; the site's own "
            "log says more",
        )


def _set(ledger: sqlite3.Connection, name: str, value: float) -> None:
    ledger.execute("REPLACE INTO fact VALUES (?, ?)", (name, value))


def _epsilon(cost: float, policy: SitePolicy) -> float:
    return epsilon(cost**-0.5, 1, policy.epsilon_delta) if cost > 0 else 0.0


def _gradient_set(
    ledger: sqlite3.Connection,
    name: str,
    images: HeldImages,
    least: int,
    policy: SitePolicy,
) -> set[int]:
    """Return the set that a class is answered with now; empty if there is none."""
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
