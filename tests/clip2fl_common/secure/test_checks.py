"""Test what a party refuses, and that the error names what and whom."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from clip2fl_common.secure.checks import (
    check_directory,
    check_members,
    check_signatures,
)
from clip2fl_common.secure.identities import (
    Identity,
    PinnedKeys,
    PrivateKey,
    SimulatedKeys,
    has_signed,
    read_private_key,
)
from clip2fl_common.secure.statements import (
    RoundName,
    SecureError,
    SignedKey,
    encoded,
    key_statement,
    member_statement,
)
from clip2fl_common.site_registry import Site, SiteRegistry

NAMES = ["east", "north", "west"]
IDENTITIES = {
    "east": Identity("east", ec.generate_private_key(ec.SECP384R1())),
    "north": Identity("north", Ed25519PrivateKey.generate()),
    "west": Identity("west", ec.generate_private_key(ec.SECP256R1())),
}
TRUST = PinnedKeys({n: i.private.public_key() for n, i in IDENTITIES.items()})
ROUND = RoundName("9", 4, b"session")


def entry(name: str, public: bytes = b"", round_name: RoundName = ROUND) -> SignedKey:
    """Return a party's signed key."""
    public = public or name.encode()
    statement = key_statement(round_name, name, public)
    return SignedKey(name, public, IDENTITIES[name].sign(statement))


GOOD = [entry(name) for name in NAMES]


def test_good_keys_pass() -> None:
    check_directory(ROUND, GOOD, TRUST, GOOD[1], 3)


@pytest.mark.parametrize(
    ("directory", "message"),
    [
        (GOOD[:2], "2 sites take part, and 3 are needed"),
        (GOOD[::2], r"lack that of north, this site"),
        ([*GOOD, GOOD[0]], "'east' is in the round's keys twice"),
        (
            [GOOD[0], entry("north", b"other"), GOOD[2]],
            "another key of north, this site",
        ),
        (
            [*GOOD, SignedKey("mallory", b"m", GOOD[0].signature)],
            "'mallory' takes part .* not in this site's list of trusted sites",
        ),
        (
            [SignedKey("east", b"swapped", GOOD[0].signature), *GOOD[1:]],
            "the key of 'east' is not signed by 'east' for this round",
        ),
        (
            [SignedKey("east", b"north", GOOD[1].signature), *GOOD[1:]],
            "the key of 'east' is not signed by 'east' for this round",
        ),
        (
            [entry("east", round_name=RoundName("9", 3, b"session")), *GOOD[1:]],
            "the key of 'east' is not signed by 'east' for this round",
        ),
        (
            [entry("east", round_name=RoundName("8", 4, b"session")), *GOOD[1:]],
            "the key of 'east' is not signed by 'east' for this round",
        ),
        (
            [entry("east", round_name=RoundName("9", 4, b"before")), *GOOD[1:]],
            "the key of 'east' is not signed by 'east' for this round",
        ),
        ([entry("east", b"west"), *GOOD[1:]], "two sites have the same key"),
        (
            [SignedKey("east", b"east", b"no signature"), *GOOD[1:]],
            "the key of 'east' is not signed",
        ),
    ],
)
def test_bad_keys_are_refused(directory: list[SignedKey], message: str) -> None:
    with pytest.raises(SecureError, match=message):
        check_directory(ROUND, directory, TRUST, GOOD[1], 3)


PARTIES = [*NAMES, "south", "center"]


@pytest.mark.parametrize(
    ("members", "least", "message"),
    [
        (
            ["north", "east"],
            3,
            "2 of 5 sites are to be summed, and at least 3 and more",
        ),
        (["north", "east", "west"], 4, "3 of 5 sites .* at least 4"),
        (["south", "east", "west"], 3, r"this site \(north\) is not in the set"),
        (["north", "east", "mallory"], 3, "'mallory' is to be summed, and is no party"),
        (["north", "east", "east", "west"], 3, "in the set to be summed twice"),
    ],
)
def test_bad_sets_are_refused(members: list[str], least: int, message: str) -> None:
    with pytest.raises(SecureError, match=message):
        check_members(members, PARTIES, "north", least)


def test_more_than_half_are_needed() -> None:
    many = [f"site-{i}" for i in range(8)]
    with pytest.raises(SecureError, match="4 of 8 sites .* more than half"):
        check_members(many[:4], many, "site-0", 3)
    check_members(many[:5], many, "site-0", 3)


def test_everybody_must_have_signed_the_same() -> None:
    statement = member_statement(b"agreed", NAMES)
    signed = {name: IDENTITIES[name].sign(statement) for name in NAMES}
    check_signatures(statement, NAMES, signed, TRUST)
    with pytest.raises(SecureError, match="'east' has not signed the set"):
        check_signatures(statement, NAMES, {"north": b"", "west": b""}, TRUST)
    for other in (
        member_statement(b"agreed", NAMES[1:]),
        member_statement(b"another model", NAMES),
    ):
        forged = {**signed, "west": IDENTITIES["west"].sign(other)}
        with pytest.raises(SecureError, match="'west' has not signed the same set"):
            check_signatures(statement, NAMES, forged, TRUST)
    stolen = {**signed, "west": signed["east"]}
    with pytest.raises(SecureError, match="'west' has not signed the same set"):
        check_signatures(statement, NAMES, stolen, TRUST)


def test_parts_of_a_statement_cannot_be_shifted() -> None:
    assert encoded("key", b"ab", b"c") != encoded("key", b"a", b"bc")
    assert encoded("key", b"a") != encoded("key", b"a", b"")
    assert encoded("members", b"a") != encoded("key", b"a")


def ssh_line(key: PrivateKey) -> str:
    """Return type and base64 of a key's public half, as a .pub file has them."""
    return (
        key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    )


def test_keys_of_a_site_come_from_its_files(tmp_path: Path) -> None:
    registry = SiteRegistry(
        tuple(
            Site(name, ssh_line(identity.private), node)
            for node, (name, identity) in enumerate(IDENTITIES.items(), 1)
        )
    )
    (tmp_path / "sites.json").write_text(registry.text(), "utf-8")
    trust = PinnedKeys.read(tmp_path / "sites.json")
    for form in (PrivateFormat.OpenSSH, PrivateFormat.PKCS8):
        for name, identity in IDENTITIES.items():
            pem = identity.private.private_bytes(Encoding.PEM, form, NoEncryption())
            (tmp_path / "key").write_bytes(pem)
            own = trust.identity(read_private_key(tmp_path / "key"))
            assert own.name == name
            key = trust.key_of(name)
            assert key is not None and has_signed(key, own.sign(b"text"), b"text")
            assert not has_signed(key, own.sign(b"text"), b"other text")
    with pytest.raises(SecureError, match="own identity-key is not in its file"):
        trust.identity(Ed25519PrivateKey.generate())


def test_unusable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SecureError, match="identity-key .*/none cannot be read"):
        read_private_key(tmp_path / "none")
    (tmp_path / "key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n", "utf-8")
    with pytest.raises(SecureError, match="must be an Ed25519 or ECDSA key"):
        read_private_key(tmp_path / "key")
    with pytest.raises(SecureError, match="the site registry .*/none cannot be read"):
        PinnedKeys.read(tmp_path / "none")
    bad = SiteRegistry((Site("east", "ssh-ed25519 AAAA", 1),))
    (tmp_path / "sites.json").write_text(bad.text(), "utf-8")
    with pytest.raises(SecureError, match="the key of east cannot be read"):
        PinnedKeys.read(tmp_path / "sites.json")


def test_simulated_keys_follow_the_seed() -> None:
    first, second = SimulatedKeys(7), SimulatedKeys(8)
    signed = first.identity(3).sign(b"text")
    assert first.identity(3).name == "client-3"
    assert has_signed(first.key_of("client-3"), signed, b"text")
    assert not has_signed(first.key_of("client-4"), signed, b"text")
    assert not has_signed(second.key_of("client-3"), signed, b"text")
