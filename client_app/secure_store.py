"""What a party of secure sums remembers from one exchange of a round to the next.

In a deployment every exchange is a process of its own, and several may run at once. So
the secrets, and what the site has signed, are in a SQLite file. Each step reads and
writes in one transaction: of two equal requests one is refused, whichever process
answers it. Only the last round of each run is kept, and rounds only go up. So no round
is begun twice, and a round's secrets are gone when it is over or the next one begins.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from client_app.site_database import LedgerError, SiteDatabase
from clip2fl_common.secure.statements import RoundName, SecureError

Stage = Literal["keys", "masked", "signed", "revealed"]
DONE: dict[str, str] = {
    "keys": "sent its key",
    "masked": "sent its masked sums",
    "signed": "signed the set to be summed",
    "revealed": "revealed its seeds",
}


@dataclass
class RoundSecrets:
    """A party's part of one round.

    Attributes
    ----------
    private : bytes
        X25519 private key; empty as soon as the seeds are known.
    own : bytes
        Seed of its own mask.
    pairs : dict of str to bytes
        Seeds that it shares with the other parties, by name.
    agreed : bytes
        The round's transcript.
    members : list of str
        The set that it has signed; empty before.
    """

    private: bytes = b""
    own: bytes = b""
    pairs: dict[str, bytes] = field(default_factory=dict)
    agreed: bytes = b""
    members: list[str] = field(default_factory=list)

    def dump(self) -> str:
        """Return the secrets as text."""
        return json.dumps(
            {
                "private": self.private.hex(),
                "own": self.own.hex(),
                "pairs": {name: seed.hex() for name, seed in self.pairs.items()},
                "agreed": self.agreed.hex(),
                "members": self.members,
            }
        )

    @classmethod
    def load(cls, text: str) -> "RoundSecrets":
        """Return the secrets in a text that `dump` has made."""
        read: dict[str, Any] = json.loads(text)
        return cls(
            private=bytes.fromhex(read["private"]),
            own=bytes.fromhex(read["own"]),
            pairs={name: bytes.fromhex(seed) for name, seed in read["pairs"].items()},
            agreed=bytes.fromhex(read["agreed"]),
            members=read["members"],
        )


class SecureStore(SiteDatabase):
    """The last round of each run and party."""

    file = "secure-sums.sqlite"
    tables = """
CREATE TABLE round (
    run TEXT, party TEXT, number INTEGER NOT NULL, session BLOB NOT NULL,
    stage TEXT NOT NULL, secrets TEXT NOT NULL, PRIMARY KEY (run, party)
) WITHOUT ROWID;
"""
    format = 1

    def begin(self, party: str, name: RoundName, private: bytes) -> None:
        """Begin a round, and forget the secrets of the round before it.

        Parameters
        ----------
        party : str
            This party's name.
        name : RoundName
            The round.
        private : bytes
            X25519 private key of the round.

        Raises
        ------
        SecureError
            If this round of the run, or a later one, was begun before.
        """
        with self._open() as store:
            row = store.execute(
                "SELECT number FROM round WHERE run = ? AND party = ?",
                (name.run, party),
            ).fetchone()
            if row is not None and name.server_round <= row[0]:
                raise SecureError(
                    f"{party} has begun round {row[0]} of this run, and takes part in "
                    f"no round twice: not in round {name.server_round}"
                )
            self._write(store, party, name, "keys", RoundSecrets(private))

    @contextlib.contextmanager
    def step(
        self, party: str, name: RoundName, before: tuple[Stage, ...], after: Stage
    ) -> Iterator[RoundSecrets]:
        """Lend a round's secrets for one step; what is changed in them is kept.

        An exception leaves the round as it was.

        Parameters
        ----------
        party : str
            This party's name.
        name : RoundName
            The round.
        before : tuple of str
            Stages in which the round may be.
        after : str
            Stage in which it is after the step. After ``"revealed"`` no secret is
            kept.

        Raises
        ------
        SecureError
            If it is another round, another attempt at it, or in another stage.
        """
        with self._open() as store:
            row = store.execute(
                "SELECT number, session, stage, secrets FROM round "
                "WHERE run = ? AND party = ?",
                (name.run, party),
            ).fetchone()
            if row is None or row[:2] != (name.server_round, name.session):
                found = "no round" if row is None else f"round {row[0]}"
                raise SecureError(
                    f"{party} is in {found} of this run, and is asked about round "
                    f"{name.server_round} or another attempt at it"
                )
            if row[2] not in before:
                raise SecureError(
                    f"{party} has {DONE[row[2]]} in round {name.server_round}, and "
                    f"must have {DONE[before[0]]} for this request"
                )
            secrets = RoundSecrets.load(row[3])
            yield secrets
            kept = RoundSecrets() if after == "revealed" else secrets
            self._write(store, party, name, after, kept)

    def _write(
        self,
        store: sqlite3.Connection,
        party: str,
        name: RoundName,
        stage: Stage,
        secrets: RoundSecrets,
    ) -> None:
        # Overwrites what it deletes with zeros.
        store.execute("PRAGMA secure_delete = ON")
        store.execute(
            "REPLACE INTO round VALUES (?, ?, ?, ?, ?, ?)",
            (
                *(name.run, party, name.server_round, name.session),
                *(stage, secrets.dump()),
            ),
        )

    def _damaged(self, reason: str) -> LedgerError:
        return LedgerError(
            f"what this site remembers of secure sums, {self.path}, cannot be used "
            f"({reason}). Delete the file, and never restore it from a copy: a copy "
            "has secrets of rounds that are over",
            "what the site remembers of secure sums cannot be used; the site's own log "
            "says more",
        )
