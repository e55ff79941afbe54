"""What the parties of a round sign.

Every byte string that is signed or hashed is a list of parts, each with its length
before it, after the name of the protocol and of the statement. So no two statements
have the same bytes.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PROTOCOL = b"clip2fl secure aggregation 1"
# What a sum is of. Sums of evaluations have keys, masks and records of their own.
TRAINING, EVALUATION = "train", "evaluate"
# Two parties could subtract their own vector from the sum.
LEAST_PARTIES = 3


class SecureError(ValueError):
    """A party refuses to go on with a round; says what is wrong, and with whom."""


def encoded(statement: str, *parts: bytes) -> bytes:
    """Return parts as one byte string, from which the parts can be read again."""
    return b"".join(
        len(part).to_bytes(8, "big") + part
        for part in (PROTOCOL, statement.encode(), *parts)
    )


@dataclass(frozen=True)
class RoundName:
    """Which round of which run.

    Attributes
    ----------
    run : str
        Id of the run; for sums of evaluations with their name (see `sums_of`).
    server_round : int
        The round.
    session : bytes
        What the server drew for this attempt at the round.
    """

    run: str
    server_round: int
    session: bytes

    @property
    def parts(self) -> tuple[bytes, bytes, bytes]:
        """Return the parts of a statement that name the round."""
        return self.run.encode(), str(self.server_round).encode(), self.session


def sums_of(run: str, purpose: str) -> str:
    """Return the name of a run's sums of one purpose, in statements and records.

    Parameters
    ----------
    run : str
        Flower's id of the run.
    purpose : {"train", "evaluate"}
        What is summed.

    Raises
    ------
    SecureError
        If there is no such purpose.
    """
    if purpose not in (TRAINING, EVALUATION):
        raise SecureError(f"sums of {purpose[:20]!r}: there are none")
    return run if purpose == TRAINING else f"{run}.{purpose}"


@dataclass(frozen=True)
class SignedKey:
    """A party's public key for one round, signed with its identity key.

    Attributes
    ----------
    name : str
        The party's name.
    public : bytes
        X25519 public key, 32 bytes.
    signature : bytes
        Signature of `key_statement`.
    """

    name: str
    public: bytes
    signature: bytes


def key_statement(round_name: RoundName, name: str, public: bytes) -> bytes:
    """Return what a party signs to make a key its key of this round."""
    return encoded("key", *round_name.parts, public, name.encode())


def transcript(
    round_name: RoundName, request: bytes, directory: Sequence[SignedKey]
) -> bytes:
    """Return the digest of all that a round's parties must agree on.

    Parameters
    ----------
    round_name : RoundName
        The round.
    request : bytes
        Digest of the model and of all settings that the party trains with.
    directory : sequence of SignedKey
        All parties' keys.

    Returns
    -------
    bytes
        32 bytes.
    """
    ordered = sorted(directory, key=lambda entry: entry.name)
    keys = [part for entry in ordered for part in (entry.name.encode(), entry.public)]
    return hashlib.sha256(
        encoded("transcript", *round_name.parts, request, *keys)
    ).digest()


def member_statement(agreed: bytes, members: Iterable[str]) -> bytes:
    """Return what a party signs to accept the set of those that are summed.

    Parameters
    ----------
    agreed : bytes
        The round's `transcript`.
    members : iterable of str
        Names of the parties in the sum.
    """
    return encoded("members", agreed, *(name.encode() for name in sorted(members)))
