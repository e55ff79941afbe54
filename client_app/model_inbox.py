"""A site's folder of delivered models: checks each piece that arrives, and stores it.

A message starts a new process, so the bytes that have arrived wait on the disk, in a
folder whose name begins with a dot. When the last byte is there, all files are compared
with the signed manifest, and the folder gets its name in one step. So a folder without
a dot is always complete and as the server signed it.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

from filelock import FileLock, Timeout

from client_app.own_site import MIB, check_size
from client_app.site_policy import NodeConfig, SiteRefusal, is_real_site, site_policy
from clip2fl_common.files import INCOMPLETE, finish_folder, remove
from clip2fl_common.messages import (
    MIN_PIECE_BYTES,
    PIECE_BYTES,
    ModelAnswer,
    ModelOffer,
    ModelState,
)
from clip2fl_common.shown import shown
from clip2fl_common.signed_folder import (
    Manifest,
    SignatureError,
    read_manifest,
    verify_folder,
    write_manifest,
)

logger = getLogger(__name__)

LOCK = ".lock"
LOCK_TIMEOUT_S = 60.0
INCOMING, REMOVED = ".incoming-", ".removed-"
# Bytes that stay free: the site's record and log may lie on the same disk.
SPARE_BYTES = 200 * MIB
# What `Manifest.name` makes.
_NAME = re.compile(r".+-[0-9a-f]{12}")
# Bytes of a request besides its piece and its manifest.
_REST_BYTES = 2**12


@dataclass(frozen=True)
class ModelInbox:
    """A site's folder of delivered models, and the rules for what enters it.

    Attributes
    ----------
    folder : Path
        The policy's ``models-folder``.
    public_key : str
        The policy's ``model-key``.
    largest : float
        The policy's ``max-model-mib``.
    largest_request : float or None
        The policy's ``max-request-mib``.
    most : int
        The policy's ``max-models``.
    """

    folder: Path
    public_key: str
    largest: float
    largest_request: float | None = None
    most: int = 8

    @classmethod
    def of(cls, node_config: NodeConfig) -> "ModelInbox":
        """Return a node's folder of models.

        Raises
        ------
        SiteRefusal
            If the node takes no models, or its rules cannot be used.
        """
        if not is_real_site(node_config):
            raise SiteRefusal("this node simulates a client and keeps no models")
        policy = site_policy(node_config)
        if policy.models_folder is None or policy.model_key is None:
            raise SiteRefusal(
                "the site takes no models: its policy has no models-folder"
            )
        return cls(
            Path(policy.models_folder),
            policy.model_key,
            policy.max_model_mib,
            policy.max_request_mib,
            policy.max_models,
        )

    def check_request(self, request_bytes: int) -> None:
        """Raise `SiteRefusal` if a request is larger than the site allows."""
        check_size("request", request_bytes, self.largest_request)

    def take(self, offer: ModelOffer) -> ModelAnswer:
        """Store a piece of a model; store the model when it is complete.

        Parameters
        ----------
        offer : ModelOffer
            From the server, not checked.

        Returns
        -------
        ModelAnswer
            Names the next byte that the site wants.

        Raises
        ------
        SiteRefusal
            If the manifest is not signed by the server, a file is not as it was signed,
            a rule forbids the model, or it cannot be stored.
        """
        try:
            manifest = Manifest.check(offer.manifest, offer.signature, self.public_key)
        except SignatureError as error:
            raise SiteRefusal(f"the site refuses the model: {error}") from None
        if manifest.size > self.largest * MIB:
            raise SiteRefusal(
                f"the model has {manifest.size / MIB:.1f} MiB, and the site's "
                f"max-model-mib is {self.largest:g}"
            )
        try:
            with self._locked():
                return self._take(manifest, offer)
        except (OSError, Timeout) as error:
            raise SiteRefusal(
                f"the model cannot be stored in {self.folder}: {error}",
                "the site cannot store the model; the site's own log says more",
            ) from error

    def _take(self, manifest: Manifest, offer: ModelOffer) -> ModelAnswer:
        place = self.folder / manifest.name
        room = self._room(manifest)
        if self._has(place):
            self._forget_incoming()
            note = self._age(manifest)
            return ModelAnswer(ModelState.THERE, manifest.size, room, note)
        self._check_age(manifest)
        incoming = self.folder / f"{INCOMING}{manifest.name}"
        # At most one model is incomplete, so that pieces cannot fill the disk.
        self._forget_incoming(incoming)
        self._check_space(incoming, manifest)
        incoming.mkdir(exist_ok=True)
        arrived = _arrived(incoming, manifest)
        if offer.start == arrived and offer.piece:
            try:
                arrived = _append(incoming, manifest, arrived, offer.piece)
            except OSError:
                remove(incoming)  # a full disk does not stay full
                raise
        if arrived < manifest.size:
            return ModelAnswer(ModelState.WANTED, arrived, room)
        # A node that is killed while it writes the manifest leaves half of it.
        for rest in incoming.glob(f".*{INCOMPLETE}"):
            remove(rest)
        try:
            manifest.verify_files(incoming)
        except SignatureError as error:
            remove(incoming)
            raise SiteRefusal(
                f"the model is thrown away: {error}",
                "the site threw the model away: a file is not as it was signed",
            ) from None
        write_manifest(incoming, manifest.content, manifest.signature)
        note = self._age(manifest)
        finish_folder(incoming, place)
        logger.info("the model %s has arrived in %s", manifest.name, self.folder)
        note = "; ".join(filter(None, (note, self._make_room(manifest))))
        return ModelAnswer(ModelState.STORED, arrived, room, note)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other messages to this site out of the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / LOCK, timeout=LOCK_TIMEOUT_S):
            yield

    def _has(self, place: Path) -> bool:
        if not place.is_dir():
            return False
        try:
            verify_folder(place, self.public_key)
        except SignatureError as error:
            logger.warning("%s; the model is fetched again", error)
            return False
        return True

    def _room(self, manifest: Manifest) -> int:
        """Return the most bytes of a piece."""
        if self.largest_request is None:
            return PIECE_BYTES
        rest = len(manifest.content) + len(manifest.signature) + _REST_BYTES
        room = min(PIECE_BYTES, int(self.largest_request * MIB) - rest)
        if room < MIN_PIECE_BYTES:
            raise SiteRefusal(
                f"the site's max-request-mib is {self.largest_request:g}, and pieces "
                f"of a model need {(MIN_PIECE_BYTES + rest) / MIB:.2f}"
            )
        return room

    def _age(self, manifest: Manifest) -> str:
        """Return a note that names a newer model; log it. Empty if there is none."""
        newest = max(
            stored_models(self.folder, self.public_key),
            key=lambda stored: stored.made,
            default=manifest,
        )
        if newest.made <= manifest.made:
            return ""
        note = (
            f"{manifest.name} of {manifest.made:%Y-%m-%d %H:%M} is older than "
            f"{newest.name} of {newest.made:%Y-%m-%d %H:%M}, which stays the newest"
        )
        logger.warning("%s", note)
        return note

    def _check_age(self, manifest: Manifest) -> None:
        """Refuse a model that is older than all that the site keeps.

        So a replay of old models removes no newer one.
        """
        stored = stored_models(self.folder, self.public_key)
        if len(stored) >= self.most and manifest.made < stored[self.most - 1].made:
            raise SiteRefusal(
                f"the site's max-models is {self.most}, and it has as many models of "
                f"later runs than {manifest.name} of {manifest.made:%Y-%m-%d %H:%M}"
            )

    def _check_space(self, incoming: Path, manifest: Manifest) -> None:
        needed = manifest.size - _arrived(incoming, manifest) + SPARE_BYTES
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            remove(incoming)  # a full disk does not stay full
            raise SiteRefusal(
                f"the model needs {needed / MIB:.0f} MiB, and {free / MIB:.0f} are "
                f"free in {self.folder}: make room",
                "the site has too little space for the model",
            )

    def _make_room(self, arrived: Manifest) -> str:
        """Remove the oldest models beyond the most; return a note, empty if none."""
        stored = stored_models(self.folder, self.public_key)
        others = [manifest for manifest in stored if manifest.name != arrived.name]
        notes = []
        for old in others[self.most - 1 :]:
            # A reader finds a whole model or none.
            removed = self.folder / f"{REMOVED}{old.name}"
            os.replace(self.folder / old.name, removed)
            remove(removed)
            notes.append(f"{old.name} was removed, as max-models is {self.most}")
            logger.info("%s", notes[-1])
        return "; ".join(notes)

    def _forget_incoming(self, kept: Path | None = None) -> None:
        for path in (
            *self.folder.glob(f"{INCOMING}*"),
            *self.folder.glob(f"{REMOVED}*"),
        ):
            if path != kept:
                remove(path)


def stored_models(folder: Path, public_key: str) -> list[Manifest]:
    """Return the manifests of the models in a folder that a key signed, newest first.

    Only the signatures are checked here, not the files.

    Parameters
    ----------
    folder : Path
        A site's ``models-folder``; it may be absent.
    public_key : str
        The site's ``model-key``.
    """
    found = [m for _, m in _folders(folder, public_key) if isinstance(m, Manifest)]
    return sorted(found, key=lambda manifest: manifest.made, reverse=True)


def refused_models(folder: Path, public_key: str) -> list[tuple[Path, str]]:
    """Return the folders that have a stored model's name, and hold none, with reasons.

    Without its manifest nobody knows how old such a model is: it may be the newest.

    Parameters
    ----------
    folder : Path
        A site's ``models-folder``; it may be absent.
    public_key : str
        The site's ``model-key``.
    """
    return [
        (path, reason)
        for path, reason in _folders(folder, public_key)
        if isinstance(reason, str) and _NAME.fullmatch(path.name)
    ]


def _folders(folder: Path, public_key: str) -> Iterator[tuple[Path, Manifest | str]]:
    """Yield each complete folder with its manifest, or why it is no stored model."""
    for path in sorted(folder.glob("[!.]*")):
        try:
            manifest = read_manifest(path, public_key)
        except SignatureError as error:
            yield path, str(error)
            continue
        # A copy under another name is not what the site stored.
        renamed = f"{shown(path)} was renamed: it is {manifest.name}"
        yield path, manifest if manifest.name == path.name else renamed


def _arrived(incoming: Path, manifest: Manifest) -> int:
    """Return how many bytes have arrived, of all files one after the other."""
    arrived = 0
    for file in manifest.files:
        with contextlib.suppress(FileNotFoundError):
            arrived += os.lstat(incoming / file.name).st_size
    return arrived


def _append(incoming: Path, manifest: Manifest, start: int, piece: bytes) -> int:
    """Append a piece to the files that it belongs to; return the next byte's place."""
    if start + len(piece) > manifest.size:
        raise SiteRefusal("the server sends more bytes than it signed")
    rest = memoryview(piece)
    end = 0
    for file in manifest.files:
        end += file.bytes
        if share := rest[: max(0, end - start)]:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            handle = os.open(incoming / file.name, flags | os.O_CLOEXEC, 0o666)
            with os.fdopen(handle, "ab") as out:
                out.write(share)
            start += len(share)
            rest = rest[len(share) :]
    return start
