"""The server's signing key: an Ed25519 key pair for the models that it delivers."""

import contextlib
import os
import secrets
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from clip2fl_common.files import FILE_MODE, replacing
from clip2fl_common.shown import shown
from server_app.foreign_files import ForeignFileError, opened

PUBLIC_SUFFIX = ".pub"
_MAX_KEY_BYTES = 4096


class SigningKeyError(ValueError):
    """The server's signing key cannot be used; says why and what to do."""


def signing_key(path: Path) -> Ed25519PrivateKey:
    """Return the server's signing key, which is made if it is missing.

    Parameters
    ----------
    path : Path
        PEM file of the private key, mode 0600. Two processes that make it at the same
        time get the same key.

    Returns
    -------
    Ed25519PrivateKey

    Raises
    ------
    SigningKeyError
        If the file is no such key, or other users can read it.
    OSError
        If the key cannot be made.
    """
    if not os.path.lexists(path):
        _make(path)
        public_key_file(path)
    try:
        with opened(path) as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_MAX_KEY_BYTES + 1)
    except ForeignFileError as error:
        raise SigningKeyError(f"the signing key: {error}") from None
    if mode & 0o077:
        raise SigningKeyError(
            f"other users may use the signing key {shown(path)}: chmod 600 it, or "
            "make another key if somebody may have read it"
        )
    try:
        key = load_pem_private_key(content, None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningKeyError(
            f"{shown(path)} is no Ed25519 private key: restore it from a copy, or name "
            "another file, in which a key is made; sites then need its public half"
        )
    return key


def public_key_file(path: Path) -> Path:
    """Return the file with the public half of the server's signing key, for sites.

    The key pair and the file are made if they are missing.

    Parameters
    ----------
    path : Path
        File of the private key.

    Returns
    -------
    Path
        PEM file with ``.pub`` added to the name, which everybody may read.

    Raises
    ------
    SigningKeyError, OSError
        As `signing_key`.
    """
    public = signing_key(path).public_key()
    content = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    file = path.with_name(path.name + PUBLIC_SUFFIX)
    if not file.is_file() or file.read_bytes() != content:
        with replacing(file, 0o644) as new:
            new.write(content)
    return file


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
        # Unlike a rename, a link never replaces the key that another process has made.
        with contextlib.suppress(FileExistsError):
            os.link(new, path)
    finally:
        new.unlink()
