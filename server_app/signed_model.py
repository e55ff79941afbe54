"""A run's folder with its signed model, which the server sends to the sites."""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from filelock import FileLock
from pydantic import BaseModel, ConfigDict

from clip2fl_common.files import replacing_folder
from clip2fl_common.shown import shown
from clip2fl_common.signed_folder import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Manifest,
    SignatureError,
    SignedFile,
    public_text,
    sha256_of,
    sign_folder,
    verify_folder,
)
from server_app.delivery import load_model
from server_app.file_names import DELIVERY, MODEL
from server_app.foreign_files import (
    MEGABYTE,
    opened,
    parse_json,
    read_text,
)
from server_app.model_card import ListedSite, card_text, model_card, run_ended
from server_app.onnx_model import ONNX_FILE, onnx_bytes

CARD, CARD_TEXT = "card.json", "MODEL_CARD.md"
FILES = (CARD, CARD_TEXT, ONNX_FILE, MODEL)
_LOCK = f".{DELIVERY}.lock"
_MAX_CARD_BYTES = 32 * MEGABYTE


class _Signed(BaseModel):
    """The field of ``manifest.json`` with the digests."""

    model_config = ConfigDict(extra="ignore")

    files: list[SignedFile]


class _Listed(BaseModel):
    """A site that ``card.json`` lists."""

    model_config = ConfigDict(extra="ignore")

    name: str
    images: int | None
    per_class: dict[str, float]


class _Sites(BaseModel):
    """The field ``sites`` of ``card.json``."""

    model_config = ConfigDict(extra="ignore")

    listed: list[_Listed] | None


class _Card(BaseModel):
    """The field of ``card.json`` with the sites."""

    model_config = ConfigDict(extra="ignore")

    sites: _Sites


def signed_model(
    run: Path, key: Ed25519PrivateKey, sites: Sequence[ListedSite] | None = None
) -> Manifest:
    """Return the manifest of a run's signed model, in the run's folder `DELIVERY`.

    The folder is made and signed once. Later calls return it as it is, so that all
    sites get the same files, whenever they get them.

    Parameters
    ----------
    run : Path
        Folder of a complete run.
    key : Ed25519PrivateKey
        The server's signing key.
    sites : sequence of ListedSite or None
        Sites that the card may name; None: those that an earlier card names, if there
        is one.

    Returns
    -------
    Manifest

    Raises
    ------
    ForeignFileError
        If the folder holds no complete run, or a file of it is damaged.
    OSError
        If the folder cannot be written.
    """
    # Another delivery of the same run may be under way.
    with FileLock(run / _LOCK):
        return _signed_model(run, key, sites)


def _signed_model(
    run: Path, key: Ed25519PrivateKey, sites: Sequence[ListedSite] | None
) -> Manifest:
    folder = run / DELIVERY
    with opened(run / MODEL) as file:
        digest = sha256_of(file)
    # Another key, another model or a damaged file: the folder is made again.
    with contextlib.suppress(SignatureError):
        found = verify_folder(folder, public_text(key.public_key()))
        if any(f.name == MODEL and f.sha256 == digest for f in found.files):
            return found
    network, described = load_model(run / MODEL)
    # Signing an older run later must not make its model the newest one.
    made = run_ended(run) or datetime.now(UTC).replace(microsecond=0)
    name = plain_name(run.name)
    if sites is None:
        sites = _listed_before(folder, described.class_names)
    card = model_card(run, name, described, made, sites)
    with replacing_folder(folder) as new:
        (new / CARD).write_text(json.dumps(card, indent=2) + "\n", "utf-8")
        (new / CARD_TEXT).write_text(card_text(card), "utf-8")
        (new / ONNX_FILE).write_bytes(onnx_bytes(network, described))
        shutil.copyfile(run / MODEL, new / MODEL)
        return sign_folder(new, name, made, FILES, key)


def _listed_before(folder: Path, class_names: Sequence[str]) -> list[ListedSite] | None:
    """Return the sites that the card in a signed folder lists; None if it is unknown.

    Only the end of the run knows which sites allow it. The signature may be that of a
    key that is gone, so the card's digest in the manifest only shows that it is whole.
    """
    manifest, card = folder / MANIFEST, folder / CARD
    try:
        signed = parse_json(
            read_text(manifest, MAX_MANIFEST_BYTES), _Signed, shown(manifest)
        )
        text = read_text(card, _MAX_CARD_BYTES)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if not any(
            file.name == CARD and file.sha256 == digest
            for file in _Signed(**signed).files
        ):
            return None
        found = _Card(**parse_json(text, _Card, shown(card))).sites.listed
        return (
            None
            if found is None
            else [
                ListedSite(
                    site.name,
                    site.images,
                    {
                        class_names.index(c): value
                        for c, value in site.per_class.items()
                    },
                )
                for site in found
            ]
        )
    except ValueError:  # a damaged or foreign file, or another run's classes
        return None


def plain_name(name: str) -> str:
    """Return a folder's name as sites can store it: ASCII letters, digits, ._-."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-_")[:64] or "run"
