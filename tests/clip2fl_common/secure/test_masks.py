"""Test masks: against plain Python, in sums, and by simple statistics."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from clip2fl_common.secure.fixed_point import Ring
from clip2fl_common.secure.masks import Vector, Words, pair_seed, subtracts
from clip2fl_common.secure.statements import (
    RoundName,
    SecureError,
    SignedKey,
    transcript,
)
from tests.clip2fl_common.secure import slow_crypto as slow
from tests.defaults import ROOT

WIDE, NARROW = Ring(64, 2.0**40), Ring(32, 2.0**7)


def rfc_keys() -> tuple[bytes, bytes, bytes]:
    """Return Alice's and Bob's private keys of RFC 7748, 6.1, and their secret."""
    return (
        bytes.fromhex(
            "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
        ),
        bytes.fromhex(
            "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"
        ),
        bytes.fromhex(
            "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
        ),
    )


def test_slow_versions_are_those_of_the_rfcs() -> None:
    """RFC 7748 6.1; RFC 5869 A.3 (no salt); RFC 8439 A.1, vectors 1 and 3's key."""
    alice, bob, secret = rfc_keys()
    assert slow.x25519(alice, slow.public_of(bob)) == secret
    assert slow.hkdf(b"\x0b" * 22, b"", 42).hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
        "9d201395faa4b61a96c8"
    )
    assert slow.chacha20(bytes(32), 64).hex() == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )


def vector_of_the_page() -> tuple[bytes, bytes, bytes, bytes]:
    """Return transcript, seed, first wide and first narrow words of the test vector."""
    alice, bob, _ = (X25519PrivateKey.from_private_bytes(k) for k in rfc_keys())
    keys = [
        SignedKey(name, own.public_key().public_bytes_raw(), b"")
        for name, own in (("alice", alice), ("bob", bob))
    ]
    agreed = transcript(RoundName("7", 1, bytes(range(16))), bytes(32), keys)
    seed = pair_seed(alice, keys[1].public, agreed, "alice", "bob")
    assert seed == pair_seed(bob, keys[0].public, agreed, "bob", "alice")
    vector = Vector(np.zeros(4, "<u8"), np.zeros(2, "<u4"))
    vector.mask(seed)
    return agreed, seed, vector.wide.tobytes(), vector.narrow.tobytes()


def test_vectors_of_the_page() -> None:
    """All of it again in plain Python; docs/secure-aggregation.md has the digits."""
    alice, bob, _ = rfc_keys()
    session = bytes(range(16))
    agreed = hashlib.sha256(
        slow.encoded(
            "transcript",
            *(b"7", b"1", session, bytes(32)),
            *(b"alice", slow.public_of(alice), b"bob", slow.public_of(bob)),
        )
    ).digest()
    shared = slow.x25519(alice, slow.public_of(bob))
    seed = slow.hkdf(shared, slow.encoded("pair", agreed, b"alice", b"bob"))
    stream = slow.chacha20(seed, 40)
    assert vector_of_the_page() == (agreed, seed, stream[:32], stream[32:])


@pytest.mark.parametrize("sizes", [(5, 3), (131072, 7), (131075, 262147), (0, 9)])
def test_mask_of_any_length_is_one_key_stream(sizes: tuple[int, int]) -> None:
    """The parts are masked in pieces of a mebibyte."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    wide, narrow = sizes
    vector = Vector(np.zeros(wide, "<u8"), np.zeros(narrow, "<u4"))
    vector.mask(b"s" * 32)
    size = 8 * wide + 4 * narrow
    stream = (
        Cipher(ChaCha20(b"s" * 32, bytes(16)), None).encryptor().update(bytes(size))
    )
    assert vector.wide.tobytes() + vector.narrow.tobytes() == stream
    vector.mask(b"s" * 32, subtract=True)
    assert not vector.wide.any() and not vector.narrow.any()


def masked(
    values: npt.NDArray[np.float64], seeds: Sequence[tuple[bytes, bool]], parties: int
) -> Vector:
    """Return a vector of values in both rings, with masks."""
    vector = Vector(WIDE.encode(values, parties), NARROW.encode(values, parties))
    for seed, negative in seeds:
        vector.mask(seed, subtract=negative)
    return vector


@settings(max_examples=1000)
@given(
    parties=st.integers(3, 20),
    lost=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-6, 1.0, 100.0]),
)
def test_sum_is_the_plain_sum_within_the_bound(
    parties: int, lost: int, seed: int, scale: float
) -> None:
    """Some vectors never arrive; their pairs' masks are taken away from the sum."""
    rng = np.random.default_rng(seed)
    names = [f"site-{i}" for i in rng.permutation(parties)]
    values = {name: rng.uniform(-scale, scale, 5) for name in names}
    pairs = {frozenset((a, b)): rng.bytes(32) for a in names for b in names if a < b}
    own = {name: rng.bytes(32) for name in names}
    members = names[: max(2, parties - lost)]
    total = Vector(np.zeros(5, "<u8"), np.zeros(5, "<u4"))
    for name in members:
        with_others = [
            (pairs[frozenset((name, other))], subtracts(name, other))
            for other in names
            if other != name
        ]
        seeds = [(own[name], False), *with_others]
        total.add(masked(values[name], seeds, parties))
    for name in members:
        total.mask(own[name], subtract=True)
        for other in set(names) - set(members):
            pair = pairs[frozenset((name, other))]
            total.mask(pair, subtract=not subtracts(name, other))
    plain = sum(values[name] for name in members)
    for ring, part in ((WIDE, total.wide), (NARROW, total.narrow)):
        error = np.abs(ring.decode(part, parties) - plain).max()
        # float64 adds up the plain sum with errors of its own.
        assert error <= len(members) * ring.step(parties) / 2 + 1e-13


def uniformity(words: Words) -> list[float]:
    """Return how many standard deviations words are from uniform, by three measures.

    Each bit is set half the time, bytes are equally frequent, and neighbours are
    independent.
    """
    count, raw = len(words), words.view(np.uint8)
    bits = np.unpackbits(raw).reshape(count, -1).mean(0)
    frequent = np.bincount(raw, minlength=256)
    chi_squared = (
        float(np.square(frequent / (raw.size / 256) - 1).sum()) * raw.size / 256
    )
    ordered = words.astype(float)
    related = float(np.corrcoef(ordered[:-1], ordered[1:])[0, 1])
    return [
        float(np.abs(bits - 0.5).max()) * 2 * np.sqrt(count),
        abs(chi_squared - 255) / np.sqrt(2 * 255),
        abs(related) * np.sqrt(count),
    ]


def test_single_masked_vector_looks_uniform() -> None:
    values = np.linspace(-1, 100, 20000)
    seeds = [(b"x" * 32, False), (b"y" * 32, True), (b"z" * 32, False)]
    for plain, words in zip(
        masked(values, [], 3).parts, masked(values, seeds, 3).parts, strict=True
    ):
        assert max(uniformity(words)) < 5
        assert min(uniformity(plain)) > 20  # the same measures notice a plain vector


FACTS = ("7", 1, b"s" * 16, bytes(32), "bob")


@pytest.mark.parametrize(
    "facts",
    [
        ("8", *FACTS[1:]),
        (FACTS[0], 2, *FACTS[2:]),
        (*FACTS[:2], bytes(16), *FACTS[3:]),
        (*FACTS[:3], b"1" * 32, FACTS[4]),
        (*FACTS[:4], "carol"),
    ],
    ids=["run", "round", "session", "request", "name"],
)
def test_all_that_must_be_agreed_on_changes_the_mask(
    facts: tuple[str, int, bytes, bytes, str],
) -> None:
    """So the masks of sites that were told different things do not cancel."""
    first, second = X25519PrivateKey.generate(), X25519PrivateKey.generate()

    def seed(run: str, number: int, session: bytes, request: bytes, name: str) -> bytes:
        keys = [
            SignedKey(who, key.public_key().public_bytes_raw(), b"")
            for who, key in (("alice", first), (name, second))
        ]
        agreed = transcript(RoundName(run, number, session), request, keys)
        return pair_seed(first, keys[1].public, agreed, "alice", name)

    assert seed(*FACTS) == seed(*FACTS)
    assert seed(*facts) != seed(*FACTS)


@pytest.mark.parametrize("public", [bytes(32), (1).to_bytes(32, "little"), b"short"])
def test_key_without_a_secret_is_refused(public: bytes) -> None:
    with pytest.raises(SecureError, match="the key of 'mallory' cannot be used"):
        pair_seed(X25519PrivateKey.generate(), public, b"", "alice", "mallory")


def test_page_has_these_test_vectors() -> None:
    page = (ROOT / "docs" / "secure-aggregation.md").read_text("utf-8")
    for value in vector_of_the_page():
        assert f"`{value.hex()}`" in page
