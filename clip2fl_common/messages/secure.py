"""The exchanges of a secure sum besides the work itself: keys, commit and reveal.

A request to train or to evaluate with a secure sum has one more record, with all
parties' keys. Its reply has the masked sums (`clip2fl_common.messages.vectors`) in
place of everything else.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from clip2fl_common.messages.arrays import ReplyError
from clip2fl_common.messages.names import (
    CONFIG,
    PARTITION,
    ROUND,
    SECURE,
    STREAM,
)
from clip2fl_common.secure.masks import SEED_BYTES
from clip2fl_common.secure.statements import (
    EVALUATION,
    TRAINING,
    SecureError,
    SignedKey,
    encoded,
)

# Names of the actions in Flower's message types: "train.keys" and so on.
KEYS, COMMIT, REVEAL = "keys", "commit", "reveal"

SESSION, PURPOSE = "session", "purpose"
NAMES, PUBLIC_KEYS, SIGNATURES = "names", "public-keys", "signatures"
NAME, PUBLIC_KEY, SIGNATURE = "name", "public-key", "signature"
SEED, SEEDS = "seed", "seeds"

Value = TypeVar("Value", int, str, bytes)


@dataclass(frozen=True)
class SecureRequest:
    """The record of a secure sum in a request of any kind.

    Attributes
    ----------
    server_round : int
        The round.
    session : bytes
        What the server drew for this attempt at the round.
    partition : int
        Which client is asked: a simulated partition, or a site's number.
    names : tuple of str
        With the work: all parties; commit and reveal: those that are summed.
    public_keys : tuple of bytes
        With the work: the parties' keys, in the order of the names.
    signatures : tuple of bytes
        In the order of the names. With the work: of the keys; reveal: of the set.
    purpose : {"train", "evaluate"}
        What is summed.
    """

    server_round: int
    session: bytes
    partition: int = 0
    names: tuple[str, ...] = ()
    public_keys: tuple[bytes, ...] = ()
    signatures: tuple[bytes, ...] = ()
    purpose: str = TRAINING

    @property
    def directory(self) -> list[SignedKey]:
        """Return all parties' keys."""
        try:
            entries = zip(self.names, self.public_keys, self.signatures, strict=True)
            return [SignedKey(*entry) for entry in entries]
        except ValueError:
            raise SecureError("names, keys and signatures differ in number") from None

    @property
    def signed(self) -> dict[str, bytes]:
        """Return the signatures of the set, by name."""
        return dict(zip(self.names, self.signatures, strict=False))

    def record(self) -> ConfigRecord:
        """Return the record of a request."""
        return ConfigRecord(
            {
                ROUND: self.server_round,
                SESSION: self.session,
                PARTITION: self.partition,
                PURPOSE: self.purpose,
                NAMES: list(self.names),
                PUBLIC_KEYS: list(self.public_keys),
                SIGNATURES: list(self.signatures),
            }
        )

    @classmethod
    def parse(cls, content: RecordDict) -> Self:
        """Return the record in a request.

        Raises
        ------
        SecureError
            If it is missing, or not of the types above.
        """
        record = content.config_records.get(SECURE)
        try:
            if record is None:
                raise ReplyError(f"it has no record {SECURE}")
            return cls(
                server_round=_value(record, ROUND, int),
                session=_value(record, SESSION, bytes),
                partition=_value(record, PARTITION, int),
                purpose=_value(record, PURPOSE, str),
                names=_values(record, NAMES, str),
                public_keys=_values(record, PUBLIC_KEYS, bytes),
                signatures=_values(record, SIGNATURES, bytes),
            )
        except ReplyError as error:
            raise SecureError(f"no request of a secure sum: {error}") from None


def is_of_evaluation(content: RecordDict) -> bool:
    """Return whether a request says that it belongs to a sum of evaluations."""
    record = content.config_records.get(SECURE, ConfigRecord())
    return record.get(PURPOSE) == EVALUATION


def request_digest(content: RecordDict, settings: Mapping[str, object]) -> bytes:
    """Return a digest of what a party works with, the same for all parties.

    Parameters
    ----------
    content : RecordDict
        The request to train or to evaluate. What differs between parties is left out:
        the client's number, its random stream, and the record of the secure sum itself.
    settings : mapping of str to object
        The run's configuration.

    Returns
    -------
    bytes
        32 bytes.
    """
    digest = hashlib.sha256(encoded("request"))
    for key, value in sorted(settings.items()):
        digest.update(encoded("setting", key.encode(), repr(value).encode()))
    for name, record in sorted(content.items()):
        if name == SECURE:
            continue
        digest.update(encoded("record", name.encode()))
        if isinstance(record, ArrayRecord):
            for array_name, array in record.items():  # their order counts, too
                facts = (array_name, array.stype, array.dtype, repr(array.shape))
                parts = (fact.encode() for fact in facts)
                digest.update(encoded("array", *parts, array.data))
            continue
        for key, value in sorted(record.items()):
            if name == CONFIG and key in (PARTITION, STREAM):
                continue
            digest.update(encoded("value", key.encode(), repr(value).encode()))
    return digest.digest()


def key_reply(partition: int, key: SignedKey) -> RecordDict:
    """Return the reply to a request for keys."""
    return _reply(
        partition,
        {NAME: key.name, PUBLIC_KEY: key.public, SIGNATURE: key.signature},
    )


def key_in(reply: RecordDict) -> SignedKey:
    """Return the key in a reply; raises `ReplyError` if there is none."""
    record = _record(reply)
    return SignedKey(
        _value(record, NAME, str),
        _value(record, PUBLIC_KEY, bytes),
        _value(record, SIGNATURE, bytes),
    )


def commit_reply(partition: int, signature: bytes) -> RecordDict:
    """Return the reply to a request to sign a set."""
    return _reply(partition, {SIGNATURE: signature})


def signature_in(reply: RecordDict) -> bytes:
    """Return the signature in a reply; raises `ReplyError` if there is none."""
    return _value(_record(reply), SIGNATURE, bytes)


@dataclass(frozen=True)
class Revealed:
    """What a party reveals at the end of a round.

    Attributes
    ----------
    own : bytes
        Seed of its own mask.
    pairs : mapping of str to bytes
        Seeds that it shares with parties whose vectors are not summed, by name.
    """

    own: bytes
    pairs: Mapping[str, bytes]


def reveal_reply(partition: int, revealed: Revealed) -> RecordDict:
    """Return the reply to a request to reveal."""
    names = sorted(revealed.pairs)
    seeds = [revealed.pairs[name] for name in names]
    return _reply(partition, {SEED: revealed.own, NAMES: names, SEEDS: seeds})


def revealed_in(reply: RecordDict, expected: set[str]) -> Revealed:
    """Return what a reply reveals.

    Parameters
    ----------
    reply : RecordDict
        The reply's content.
    expected : set of str
        Names of the parties whose vectors are not summed.

    Raises
    ------
    ReplyError
        If a seed is missing, has a wrong length, or is one too many.
    """
    record = _record(reply)
    names, seeds = _values(record, NAMES, str), _values(record, SEEDS, bytes)
    own = _value(record, SEED, bytes)
    if len(names) != len(seeds) or set(names) != expected:
        raise ReplyError(f"seeds of {sorted(names)}, expected {sorted(expected)}")
    if any(len(seed) != SEED_BYTES for seed in (own, *seeds)):
        raise ReplyError(f"a seed does not have {SEED_BYTES} bytes")
    return Revealed(own, dict(zip(names, seeds, strict=True)))


def partition_in(reply: RecordDict) -> int:
    """Return the client that a reply speaks of; raises `ReplyError` without one."""
    return _value(_record(reply), PARTITION, int)


def _reply(
    partition: int, values: Mapping[str, str | bytes | list[str] | list[bytes]]
) -> RecordDict:
    record = ConfigRecord({PARTITION: partition})
    record.update(values)
    return RecordDict({SECURE: record})


def _record(reply: RecordDict) -> ConfigRecord:
    if set(reply) != {SECURE} or SECURE not in reply.config_records:
        raise ReplyError(f"records are {sorted(reply)}, expected ['{SECURE}']")
    return reply.config_records[SECURE]


def _value(record: ConfigRecord, name: str, kind: type[Value]) -> Value:
    value = record.get(name)
    if type(value) is not kind:
        raise ReplyError(f"{name} must be of the type {kind.__name__}")
    return value


def _values(record: ConfigRecord, name: str, kind: type[Value]) -> tuple[Value, ...]:
    values = record.get(name)
    if not isinstance(values, list) or any(type(v) is not kind for v in values):
        raise ReplyError(f"{name} must be a list of the type {kind.__name__}")
    return tuple(v for v in values if isinstance(v, kind))
