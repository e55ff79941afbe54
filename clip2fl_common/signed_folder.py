"""A folder with a signed manifest: the server signs a model, sites check it.

``manifest.json`` has the name, the size and the SHA-256 digest of every other file of
the folder. ``manifest.sig`` is the Ed25519 signature (RFC 8032) of the manifest's
bytes. The signature is checked before the manifest is parsed, so only what the owner
of the key wrote is ever parsed. A public key is written as the 64 hexadecimal digits of
its 32 bytes, or as a PEM file::

    openssl pkeyutl -verify -pubin -inkey signing.key.pub -rawin -in manifest.json \
        -sigfile manifest.sig
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from clip2fl_common.files import replacing
from clip2fl_common.shown import quoted, shown
from clip2fl_common.site_names import NAME_RULE, is_site_name

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
SIGNATURE_BYTES = 64
# Ten files need two thousand bytes.
MAX_MANIFEST_BYTES = 64 * 1024
MAX_FILES = 32
MAX_FOLDER_BYTES = 2**40
MAX_KEY_BYTES = 4096
KEY_PATTERN = r"^[0-9a-f]{64}$"
# Digits of the manifest's digest in the name of a stored folder.
_DIGEST_DIGITS = 12
_BLOCK_BYTES = 2**20


class SignatureError(ValueError):
    """A folder is not as its owner signed it; says what differs, on one line."""


def _plain_name(name: str) -> str:
    if not is_site_name(name) or name.lower() in (MANIFEST, SIGNATURE):
        raise ValueError(f"{quoted(name)} is no name of a file: {NAME_RULE}")
    return name


_Name = Annotated[str, AfterValidator(_plain_name)]


class SignedFile(BaseModel):
    """A file in a manifest.

    Attributes
    ----------
    name : str
        One component of a path: ASCII, without separators and without a dot first.
    bytes : int
        Its size, at least 1.
    sha256 : str
        Digest of its content, 64 hexadecimal digits.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: _Name
    bytes: Annotated[int, Field(ge=1, le=MAX_FOLDER_BYTES)]
    sha256: Annotated[str, Field(pattern=KEY_PATTERN)]


class _Content(BaseModel):
    """The JSON of a manifest."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # Part of what is signed: a signature of anything else fits no manifest.
    kind: Literal["clip2fl-model-1"]
    run: _Name
    made: AwareDatetime
    files: Annotated[list[SignedFile], Field(min_length=1, max_length=MAX_FILES)]

    @model_validator(mode="after")
    def _names_differ(self) -> "_Content":
        # Some file systems do not tell upper and lower case apart.
        if len({file.name.lower() for file in self.files}) < len(self.files):
            raise ValueError("two files have the same name")
        return self


@dataclass(frozen=True)
class Manifest:
    """A manifest whose signature is valid.

    Attributes
    ----------
    content, signature : bytes
        The two files as they are.
    run : str
        Name of the run that made the folder.
    made : datetime
        When the run ended, by the server's clock. The model of the run that ended last
        is the newest.
    files : tuple of SignedFile
        All other files, in the order in which they are sent.
    """

    content: bytes
    signature: bytes
    run: str
    made: datetime
    files: tuple[SignedFile, ...]

    @classmethod
    def check(cls, content: bytes, signature: bytes, public_key: str) -> "Manifest":
        """Return a manifest after checking its signature, then its content.

        Parameters
        ----------
        content, signature : bytes
            As they came from a file or a message.
        public_key : str
            64 hexadecimal digits.

        Raises
        ------
        SignatureError
            If the signature is not of this key and this content, or the content is no
            manifest.
        """
        if len(content) > MAX_MANIFEST_BYTES:
            raise SignatureError(f"{MANIFEST} has more than {MAX_MANIFEST_BYTES} bytes")
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
        try:
            key.verify(signature, content)
        except InvalidSignature:
            raise SignatureError(
                f"{SIGNATURE} is not the signature of {MANIFEST} by the key "
                f"{public_key[:16]}...: one of the two files was changed, or another "
                "key signed them"
            ) from None
        try:
            found = _Content.model_validate_json(content)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, problem["loc"]))
            raise SignatureError(
                shown(f"{MANIFEST} is signed, but {where}: {problem['msg']}")
            ) from None
        return cls(content, signature, found.run, found.made, tuple(found.files))

    @property
    def size(self) -> int:
        """Return the number of bytes of all files together."""
        return sum(file.bytes for file in self.files)

    @property
    def name(self) -> str:
        """Return the name under which a site stores the folder.

        It contains a digest, so different folders never have the same name.
        """
        digest = hashlib.sha256(self.content).hexdigest()
        return f"{self.run}-{digest[:_DIGEST_DIGITS]}"

    def verify_files(self, folder: Path) -> None:
        """Check that a folder has exactly the signed files, each as it was signed.

        Parameters
        ----------
        folder : Path
            May hold the manifest and its signature besides.

        Raises
        ------
        SignatureError
            Names the first file that is missing, unknown, no regular file or changed.
        """
        known = {MANIFEST, SIGNATURE, *(file.name for file in self.files)}
        try:
            there = set(os.listdir(folder))
        except OSError as error:
            raise SignatureError(f"{shown(folder)}: {error.strerror}") from None
        for name in sorted(there - known):
            raise SignatureError(
                f"{shown(folder)} has a file {quoted(name)} that the server did not "
                "sign: remove it"
            )
        for file in self.files:
            with _opened(folder, file.name) as stream:
                size = os.fstat(stream.fileno()).st_size
                if size != file.bytes:
                    raise SignatureError(
                        f"{shown(folder / file.name)} has {size:,} bytes, and the "
                        f"server signed {file.bytes:,}: it was changed or cut off"
                    )
                if sha256_of(stream) != file.sha256:
                    raise SignatureError(
                        f"{shown(folder / file.name)} is not the file that the server "
                        "signed: it was changed"
                    )


def read_manifest(folder: Path, public_key: str) -> Manifest:
    """Return a folder's manifest after checking its signature, not the other files.

    Raises
    ------
    SignatureError
        As `Manifest.check`; also if one of the two files cannot be read.
    """
    content, signature = (
        _read(folder, name, limit)
        for name, limit in (
            (MANIFEST, MAX_MANIFEST_BYTES),
            (SIGNATURE, SIGNATURE_BYTES),
        )
    )
    try:
        return Manifest.check(content, signature, public_key)
    except SignatureError as error:
        raise SignatureError(f"{shown(folder)}: {error}") from None


def verify_folder(folder: Path, public_key: str) -> Manifest:
    """Return a folder's manifest after checking the signature and all files.

    Parameters
    ----------
    folder : Path
        A folder that a server signed.
    public_key : str
        64 hexadecimal digits.

    Raises
    ------
    SignatureError
        If a single byte of the folder differs from what the server signed, or a file is
        missing or too many.
    """
    manifest = read_manifest(folder, public_key)
    manifest.verify_files(folder)
    return manifest


def sign_folder(
    folder: Path, run: str, made: datetime, names: Iterable[str], key: Ed25519PrivateKey
) -> Manifest:
    """Write the manifest of a folder's files, and its signature.

    Parameters
    ----------
    folder : Path
        Holds the files.
    run : str
        Name of the run.
    made : datetime
        When the run ended, with a time zone.
    names : iterable of str
        Names of the files, in the order in which they are sent.
    key : Ed25519PrivateKey
        The server's signing key.

    Raises
    ------
    ValueError
        If a name is not allowed.
    OSError
        If a file cannot be read or written.
    """
    files = []
    for name in names:
        with (folder / name).open("rb") as stream:
            digest = sha256_of(stream)
            size = os.fstat(stream.fileno()).st_size
        files.append(SignedFile(name=name, bytes=size, sha256=digest))
    found = _Content(kind="clip2fl-model-1", run=run, made=made, files=files)
    content = (found.model_dump_json(indent=1) + "\n").encode()
    signature = key.sign(content)
    write_manifest(folder, content, signature)
    return Manifest.check(content, signature, public_text(key.public_key()))


def sha256_of(file: BinaryIO) -> str:
    """Return the SHA-256 digest of a file from here to its end, in hexadecimal."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, content: bytes, signature: bytes) -> None:
    """Write a manifest and its signature into a folder."""
    for name, data in ((MANIFEST, content), (SIGNATURE, signature)):
        with replacing(folder / name, only_writer=True) as file:
            file.write(data)


def is_signed(folder: Path) -> bool:
    """Return whether a folder claims to be signed: it has a manifest or a signature."""
    return any(os.path.lexists(folder / name) for name in (MANIFEST, SIGNATURE))


def public_text(key: Ed25519PublicKey) -> str:
    """Return a public key as 64 hexadecimal digits."""
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def public_key_of(given: str) -> str:
    """Return the public key that a person names.

    Parameters
    ----------
    given : str
        64 hexadecimal digits, or the path of a PEM file.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    SignatureError
        If it is neither.
    """
    if re.match(KEY_PATTERN, given):
        return given
    path = Path(given)
    content = _read(path.parent, path.name, MAX_KEY_BYTES, links=True)
    try:
        key = load_pem_public_key(content)
    except ValueError:
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(
            f"{shown(path)} is no public key: give the server's signing.key.pub, or "
            "its 64 hexadecimal digits"
        )
    return public_text(key)


def _read(folder: Path, name: str, limit: int, *, links: bool = False) -> bytes:
    with _opened(folder, name, links=links) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise SignatureError(f"{shown(folder / name)} has more than {limit:,} bytes")
    return content


def _opened(folder: Path, name: str, *, links: bool = False) -> BinaryIO:
    """Open a regular file without waiting for a FIFO; links only if they are allowed.

    In a signed folder a link could lead to a file that changes after the check.
    """
    path = folder / name
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        # Opening a device may have an effect, so the path is looked at first.
        if not stat.S_ISREG(os.stat(path, follow_symlinks=links).st_mode):
            raise SignatureError(f"{shown(path)} is no regular file")
        handle = os.open(path, flags if links else flags | os.O_NOFOLLOW)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise SignatureError(f"{shown(path)} is missing") from None
        raise SignatureError(f"{shown(path)}: {error.strerror}") from None
    return os.fdopen(handle, "rb")
