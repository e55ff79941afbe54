"""Keys of sites: make a pair, read a public half, show its fingerprint.

Flower accepts keys of the NIST elliptic curves and no others.
"""

import base64
import hashlib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    SECP384R1,
    SECP521R1,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

# Larger files are refused; a public key has a few hundred bytes.
LARGEST_KEY = 16 * 1024
KEY_TYPE = "ecdsa-sha2-"
"""Beginning of the public half of each key that Flower accepts."""


class KeyFileError(ValueError):
    """A key that cannot be used; says why and what to do."""


def new_key() -> bytes:
    """Return a new private key, as ``ssh-keygen -t ecdsa -b 384`` writes it."""
    key = generate_private_key(SECP384R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def public_half(private: bytes) -> str:
    """Return type and base64 of a private key's public half.

    Raises
    ------
    KeyFileError
        If it is no private key that Flower accepts.
    """
    try:
        key = load_ssh_private_key(private, password=None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"it is no private key ({error})") from None
    return _text(key, "it")


def public_key(given: str | Path) -> str:
    """Return a public key in the format of the registry.

    Parameters
    ----------
    given : str or Path
        A public key itself, a file with one line, as ssh-keygen writes it, or ``-``
        for the standard input.

    Returns
    -------
    str
        Type and base64 of the key.

    Raises
    ------
    KeyFileError
        If it is not a public key that Flower accepts.
    """
    if str(given).startswith(KEY_TYPE):
        name, content = "the given key", str(given).encode()
    else:
        name, content = str(given), _content(Path(given))
    if b"PRIVATE KEY" in content:
        raise KeyFileError(
            f"{name} is a private key, which must never leave its site. Delete it "
            "here, have the site make another one, and take its public half"
        )
    lines = content.strip().splitlines()
    try:
        if len(content) > LARGEST_KEY or len(lines) != 1:
            raise ValueError(f"{len(lines)} lines, expected one")
        key = load_ssh_public_key(lines[0])
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyFileError(
            f"{name} is no public key ({error}): take the line that 'clip2fl site "
            "join' has printed at the site"
        ) from None
    return _text(key, name)


def _content(path: Path) -> bytes:
    try:
        with open(0 if path == Path("-") else path, "rb") as file:
            return file.read(LARGEST_KEY + 1)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None


def _text(key: object, name: str) -> str:
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(
        key.curve, SECP256R1 | SECP384R1 | SECP521R1
    ):
        raise KeyFileError(
            f"{name} is no key of a NIST elliptic curve, and Flower takes no other: "
            "have one made by 'clip2fl site join'"
        )
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def fingerprint(key: str) -> str:
    """Return the fingerprint that ``ssh-keygen -l`` shows, to compare by telephone."""
    digest = hashlib.sha256(base64.b64decode(key.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")
