"""Masks that cancel in a sum: X25519, HKDF-SHA256 and ChaCha20.

Two parties agree on a secret by X25519 (RFC 7748). HKDF-SHA256 (RFC 5869) makes a key
of it that belongs to one round and one pair. The key stream of ChaCha20 (RFC 8439) with
this key is the pair's mask. One of the two adds it, the other subtracts it.

Each key makes one key stream for one vector, so the nonce is always zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.x25519 import (
    X25519PrivateKey,
    X25519PublicKey,
)
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from clip2fl_common.secure.statements import SecureError, encoded
from clip2fl_common.shown import quoted

SEED_BYTES = 32
# ChaCha20's counter (4 bytes) and nonce (12 bytes).
_NO_NONCE = bytes(16)
_CHUNK = bytes(2**20)

Words = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Vector:
    """A vector of integers, part of it modulo 2^64 and part modulo 2^32.

    Attributes
    ----------
    wide : ndarray of uint64, shape [a]
        Integers modulo 2^64.
    narrow : ndarray of uint32, shape [b]
        Integers modulo 2^32.
    """

    wide: Words
    narrow: Words

    @property
    def parts(self) -> tuple[Words, Words]:
        """Return both parts, in the order in which a mask covers them."""
        return self.wide, self.narrow

    def add(self, other: "Vector") -> None:
        """Add another vector in place."""
        for own, others in zip(self.parts, other.parts, strict=True):
            own += others

    def mask(self, seed: bytes, *, subtract: bool = False) -> None:
        """Add the mask of a seed in place, or take it away.

        Parameters
        ----------
        seed : bytes
            `SEED_BYTES` bytes that are used for no other vector.
        subtract : bool
            Whether to subtract the mask.
        """
        for words, stream in _mask_words(seed, self.parts):
            if subtract:
                words -= stream
            else:
                words += stream


def _mask_words(seed: bytes, parts: tuple[Words, ...]) -> Iterator[tuple[Words, Words]]:
    """Yield pieces of the parts, each with its piece of the key stream."""
    stream = Cipher(ChaCha20(seed, _NO_NONCE), mode=None).encryptor()
    for part in parts:
        count = len(_CHUNK) // part.itemsize
        for start in range(0, len(part), count):
            piece = part[start : start + count]
            zeros = memoryview(_CHUNK)[: piece.nbytes]
            yield piece, np.frombuffer(stream.update(zeros), part.dtype)


def pair_seed(
    private: X25519PrivateKey, public: bytes, transcript: bytes, own: str, other: str
) -> bytes:
    """Return the seed that two parties share in one round.

    Parameters
    ----------
    private : X25519PrivateKey
        One's own key, made for this round.
    public : bytes
        The other party's public key, 32 bytes.
    transcript : bytes
        What both believe the round to be (`statements.transcript`). If they believe
        different things, their masks do not cancel.
    own, other : str
        Names of both parties, in any order.

    Returns
    -------
    bytes
        `SEED_BYTES` bytes.

    Raises
    ------
    SecureError
        If the public key is none, or one with which the secret is no secret.
    """
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise SecureError(f"the key of {quoted(other)} cannot be used") from None
    names = (name.encode() for name in sorted((own, other)))
    info = encoded("pair", transcript, *names)
    return HKDF(SHA256(), SEED_BYTES, salt=None, info=info).derive(shared)


def can_be_used(public: bytes) -> bool:
    """Return whether parties can agree on secrets with the owner of a public key.

    Parameters
    ----------
    public : bytes
        What a party sent as its public key.
    """
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def subtracts(own: str, other: str) -> bool:
    """Return whether a party subtracts the mask that it shares with another."""
    return own > other
