"""Who signs: a party's identity key, and the list of those that it trusts."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from clip2fl_common.secure.statements import SecureError, encoded
from clip2fl_common.site_registry import RegistryError, SiteRegistry

PrivateKey = Ed25519PrivateKey | EllipticCurvePrivateKey
PublicKey = Ed25519PublicKey | EllipticCurvePublicKey

_KINDS = "an Ed25519 or ECDSA key without a passphrase (ssh-keygen -t ecdsa -b 384)"


class Trust(Protocol):
    """The identity keys that a party trusts, by name."""

    def key_of(self, name: str) -> PublicKey | None:
        """Return the key of a name; None if the name is not trusted."""


@dataclass(frozen=True)
class Identity:
    """A party's name and identity key.

    Attributes
    ----------
    name : str
        The party's name in the other parties' lists.
    private : PrivateKey
        The key.
    """

    name: str
    private: PrivateKey

    def sign(self, statement: bytes) -> bytes:
        """Return the signature of a statement."""
        if isinstance(self.private, Ed25519PrivateKey):
            return self.private.sign(statement)
        return self.private.sign(statement, ECDSA(SHA384()))


def has_signed(key: PublicKey, signature: bytes, statement: bytes) -> bool:
    """Return whether a signature of a statement is that of a key."""
    try:
        if isinstance(key, Ed25519PublicKey):
            key.verify(signature, statement)
        else:
            key.verify(signature, statement, ECDSA(SHA384()))
    except InvalidSignature:
        return False
    return True


@dataclass(frozen=True)
class PinnedKeys:
    """The identity keys that a site has in a file of its own.

    Attributes
    ----------
    keys : mapping of str to PublicKey
        By name; all keys differ.
    """

    keys: Mapping[str, PublicKey]

    @classmethod
    def read(cls, path: Path) -> "PinnedKeys":
        """Return the keys in a file.

        Parameters
        ----------
        path : Path
            A site registry (`clip2fl_common.site_registry`), which binds names to keys
            and lets no two sites share one.

        Raises
        ------
        SecureError
            If the file or one of its keys cannot be used.
        """
        try:
            sites = SiteRegistry.read(path).sites
        except RegistryError as error:
            raise SecureError(str(error)) from error
        keys: dict[str, PublicKey] = {}
        for site in sites:
            try:
                key = load_ssh_public_key(site.key.encode())
            except (ValueError, UnsupportedAlgorithm) as error:
                raise SecureError(
                    f"{path}: the key of {site.name} cannot be read ({error})"
                ) from error
            if not isinstance(key, PublicKey):
                raise SecureError(f"{path}: the key of {site.name} must be {_KINDS}")
            keys[site.name] = key
        return cls(keys)

    def key_of(self, name: str) -> PublicKey | None:
        """Return the key of a name; None if the name is not in the file."""
        return self.keys.get(name)

    def identity(self, private: PrivateKey) -> Identity:
        """Return the identity of a private key, whose public key must be listed.

        Raises
        ------
        SecureError
            If it is not listed.
        """
        own = _raw(private.public_key())
        for name, key in self.keys.items():
            if _raw(key) == own:
                return Identity(name, private)
        raise SecureError(
            "the site's own identity-key is not in its file trusted-sites, so that the "
            "site has no name there"
        )


def read_private_key(path: Path) -> PrivateKey:
    """Return the private key in a file of OpenSSH or PEM.

    Raises
    ------
    SecureError
        If the file cannot be read, or has another kind of key.
    """
    try:
        text = path.read_bytes()
        is_ssh = b"OPENSSH PRIVATE KEY" in text
        load = load_ssh_private_key if is_ssh else load_pem_private_key
        key = load(text, None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SecureError(
            f"identity-key {path} cannot be read ({error}): it must be {_KINDS}"
        ) from error
    if not isinstance(key, PrivateKey):
        raise SecureError(f"identity-key {path} must be {_KINDS}")
    return key


@dataclass(frozen=True)
class SimulatedKeys:
    """Identities of simulated clients, which everybody can compute from the seed.

    They let a simulation run the whole protocol, and they protect nothing.

    Attributes
    ----------
    seed : int
        The run's seed.
    """

    seed: int

    @staticmethod
    def name_of(client: int) -> str:
        """Return the name of a simulated client."""
        return f"client-{client}"

    def identity(self, client: int) -> Identity:
        """Return the identity of a simulated client."""
        return self._named(self.name_of(client))

    def key_of(self, name: str) -> PublicKey:
        """Return the key of any name."""
        return self._named(name).private.public_key()

    def _named(self, name: str) -> Identity:
        text = encoded("simulated identity", str(self.seed).encode(), name.encode())
        seed = hashlib.sha256(text).digest()
        return Identity(name, Ed25519PrivateKey.from_private_bytes(seed))


def _raw(key: PublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
