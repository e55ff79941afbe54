"""The archive that a server makes for a site, and how the site opens it safely.

An archive is a ``tar.gz`` file with one folder. Its first file, ``kit.json``, names the
site and the server, and has length and SHA-256 of each other file. Equal contents give
equal bytes: owners, times and the order of the files are fixed.

A stranger may have written an archive. Only the files that `FILES` names and the
teacher's files are taken from it, and only as regular files; the archive decides
neither their modes nor their owners. The checksums find damage. Whether the archive
comes from the server at all is for people to compare: see `fingerprint`.
"""

import contextlib
import gzip
import hashlib
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clip2fl_common.files import replacing
from clip2fl_common.shown import plain, quoted
from clip2fl_common.site_names import NAME_RULE, is_site_name

MANIFEST = "kit.json"
CERTIFICATE = "ca.crt"
RUN_CONFIG = "run.toml"
POLICY = "policy.toml"
GUIDE = "README.md"
KEY = "key"
TEACHER = "teacher"
FILES = (CERTIFICATE, RUN_CONFIG, POLICY, GUIDE, KEY)
"""Files that a kit may have, besides the teacher's."""
REQUIRED = (CERTIFICATE, RUN_CONFIG, POLICY)
PRIVATE_MODE, PUBLIC_MODE = 0o600, 0o644

# A teacher has weights, a configuration and the files of a tokenizer.
MOST_FILES = 64
LARGEST_MANIFEST = 2**20
LARGEST_TEXT = 16 * 2**20
LARGEST_WEIGHTS = 32 * 2**30
CHUNK = 2**20

# Takes files above 8 GiB and names of any length.
TAR_FORMAT: Final = tarfile.GNU_FORMAT
_TEACHER_FILE = re.compile(rf"{TEACHER}/[A-Za-z0-9][A-Za-z0-9._-]{{0,120}}")


class KitError(ValueError):
    """A kit that cannot be made or used; says why and what to do."""


class Entry(BaseModel):
    """Length and checksum of a file of the kit."""

    model_config = ConfigDict(extra="forbid", strict=True)

    size: Annotated[int, Field(ge=0, le=LARGEST_WEIGHTS)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """What ``kit.json`` says.

    Attributes
    ----------
    format : int
        Version of the archive's format.
    site : str
        Name of the site.
    superlink : str
        ``HOST:PORT`` at which the site's node reaches the server.
    version : str
        Version of this program at the server.
    teacher_fingerprint : str
        Fingerprint of the run's teacher at the server; empty if it is not known.
    files : dict of str to Entry
        By path in the kit, without ``kit.json`` itself.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1] = 1
    site: str
    superlink: Annotated[str, Field(pattern=r"^[A-Za-z0-9.:\[\]-]{1,255}:[0-9]{1,5}$")]
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9.+-]{1,64}$")]
    teacher_fingerprint: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    files: Annotated[dict[str, Entry], Field(max_length=MOST_FILES)]

    @property
    def has_key(self) -> bool:
        """Whether the server has made the site's key."""
        return KEY in self.files

    @property
    def has_teacher(self) -> bool:
        """Whether the kit has the teacher's weights."""
        return any(name.startswith(f"{TEACHER}/") for name in self.files)


@dataclass(frozen=True)
class Content:
    """What goes into a kit.

    Attributes
    ----------
    site, superlink, version, teacher_fingerprint
        As in `Manifest`.
    files : mapping of str to (bytes or Path)
        Content, or the file that has it, by path in the kit.
    """

    site: str
    superlink: str
    version: str
    teacher_fingerprint: str
    files: Mapping[str, bytes | Path]


def archive_name(site: str) -> str:
    """Return the name of a site's archive."""
    return f"{site}-kit.tar.gz"


def write_archive(content: Content, path: Path) -> None:
    """Write a kit. One with a key can only be read by its owner.

    Raises
    ------
    OSError
        If a file cannot be read or written.
    """
    files = dict(sorted(content.files.items()))
    for name in files:
        assert is_allowed(name), name
    manifest = Manifest(
        site=content.site,
        superlink=content.superlink,
        version=content.version,
        teacher_fingerprint=content.teacher_fingerprint,
        files={name: _entry(source) for name, source in files.items()},
    )
    text = manifest.model_dump_json(indent=1).encode() + b"\n"
    root = f"{content.site}-kit"
    with (
        replacing(path, PRIVATE_MODE if KEY in files else PUBLIC_MODE) as file,
        # Weights hardly get smaller, so that more effort would only take time.
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=TAR_FORMAT) as tar,
    ):
        for name, source in {MANIFEST: text, **files}.items():
            member = tarfile.TarInfo(f"{root}/{name}")
            member.mode = PRIVATE_MODE if name == KEY else PUBLIC_MODE
            if isinstance(source, bytes):
                member.size = len(source)
                tar.addfile(member, io.BytesIO(source))
            else:
                member.size = manifest.files[name].size
                with source.open("rb") as opened:
                    tar.addfile(member, opened)


def _entry(source: bytes | Path) -> Entry:
    if isinstance(source, bytes):
        return Entry(size=len(source), sha256=hashlib.sha256(source).hexdigest())
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Entry(size=file.tell(), sha256=digest)


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of an archive, which both sides compare by telephone."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_archive(path: Path, folder: Path) -> Manifest:
    """Check an archive, and write its files into an empty folder.

    Parameters
    ----------
    path : Path
        The archive.
    folder : Path
        An empty folder. All files in it get the modes that the program chooses.

    Returns
    -------
    Manifest

    Raises
    ------
    KitError
        If the archive is damaged, or has anything that no kit has.
    """
    with _opened(path) as tar:
        return _Reader(tar, folder).read()


def read_manifest(path: Path) -> Manifest:
    """Return what an archive says about itself; raises like `read_archive`."""
    with _opened(path) as tar:
        return _manifest(tar)[0]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    """Lend an archive; all that is wrong with it becomes a `KitError`."""
    try:
        with tarfile.open(path, "r:gz") as tar:
            yield tar
    except KitError as error:
        raise KitError(
            f"{path}: {error}; have the server make the kit again, and copy it as a "
            "binary file"
        ) from None
    except (tarfile.TarError, EOFError, zlib.error, UnicodeError) as error:
        raise KitError(
            f"{path} is no kit, or is damaged ({plain(error)}); copy it from the "
            "server again, as a binary file"
        ) from None
    except OSError as error:
        reason = error.strerror or plain(error)
        raise KitError(f"{path} cannot be read ({reason})") from None


def _manifest(tar: tarfile.TarFile) -> tuple[Manifest, str, bytes]:
    """Return the manifest, the name of the archive's folder, and the file itself."""
    first = tar.next()
    if first is None:
        raise KitError("it is empty")
    root, slash, name = first.name.partition("/")
    if not slash or name != MANIFEST or not first.isreg():
        raise KitError(f"it begins with {quoted(first.name)}, and not {MANIFEST}")
    if first.size > LARGEST_MANIFEST:
        raise KitError(f"its {MANIFEST} has {first.size} bytes")
    text = _file(tar, first).read()
    return _parsed(text), root, text


def _file(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(member)
    assert file is not None  # a regular file
    return file


class _Reader:
    """Reads the members of an archive in their order."""

    def __init__(self, tar: tarfile.TarFile, folder: Path) -> None:
        self._tar = tar
        self._folder = folder

    def read(self) -> Manifest:
        """Write all files; return the manifest."""
        manifest, root, text = _manifest(self._tar)
        (self._folder / MANIFEST).write_bytes(text)
        seen = set()
        for member in iter(self._tar.next, None):
            name = member.name.removeprefix(f"{root}/")
            if not member.name.startswith(f"{root}/") or not is_allowed(name):
                raise KitError(f"it has {quoted(member.name)}, which is part of no kit")
            if not member.isreg():
                raise KitError(f"{quoted(member.name)} is a link or no regular file")
            if name not in manifest.files or name in seen:
                raise KitError(f"{quoted(name)} is not in its {MANIFEST}, or twice")
            seen.add(name)
            self._extract(member, name, manifest.files[name])
        if missing := sorted(set(manifest.files) - seen):
            raise KitError(f"{missing[0]} is missing")
        return manifest

    def _extract(self, member: tarfile.TarInfo, name: str, entry: Entry) -> None:
        if member.size != entry.size:
            raise KitError(f"{name} has {member.size} bytes, and not {entry.size}")
        if entry.size > LARGEST_TEXT and not name.startswith(f"{TEACHER}/"):
            raise KitError(f"{name} has {entry.size} bytes")
        place = self._folder / name
        place.parent.mkdir(mode=0o700, exist_ok=True)
        digest = hashlib.sha256()
        source = _file(self._tar, member)
        with open(place, "xb", opener=_private) as file:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != entry.sha256:
            raise KitError(f"{name} is not what its {MANIFEST} says (SHA-256)")
        if name != KEY:
            place.chmod(PUBLIC_MODE)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, PRIVATE_MODE)


def is_allowed(name: str) -> bool:
    """Return whether a kit may have a file with this path."""
    return name in FILES or _TEACHER_FILE.fullmatch(name) is not None


def parsed_manifest(path: Path) -> Manifest:
    """Return the manifest of an installed kit.

    Raises
    ------
    KitError
        If the file cannot be read, or is no manifest.
    """
    try:
        with path.open("rb") as file:
            return _parsed(file.read(LARGEST_MANIFEST))
    except OSError as error:
        raise KitError(f"{path} cannot be read ({error.strerror})") from None
    except KitError as error:
        raise KitError(f"{path}: {error}") from None


def _parsed(text: bytes) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise KitError(f"its {MANIFEST}: {plain(place)}: {problem['msg']}") from None
    if not is_site_name(manifest.site):
        raise KitError(
            f"its {MANIFEST} names the site {quoted(manifest.site)}; expected "
            f"{NAME_RULE}"
        )
    for name in manifest.files:
        if not is_allowed(name):
            raise KitError(f"its {MANIFEST} lists {quoted(name)}, part of no kit")
    for name in REQUIRED:
        if name not in manifest.files:
            raise KitError(f"its {MANIFEST} does not list {name}")
    return manifest
