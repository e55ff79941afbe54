"""A run's folder with its signed model, which the server sends to the sites."""

import contextlib
import json
import re
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clip2fl_common.files import replacing_folder
from clip2fl_common.signed_folder import (
    Manifest,
    SignatureError,
    public_text,
    sha256_of,
    sign_folder,
    verify_folder,
)
from server_app.delivery import load_model
from server_app.file_names import DELIVERY, MODEL
from server_app.foreign_files import opened
from server_app.model_card import ListedSite, card_text, model_card, run_ended
from server_app.onnx_model import ONNX_FILE, onnx_bytes

CARD, CARD_TEXT = "card.json", "MODEL_CARD.md"
FILES = (CARD, CARD_TEXT, ONNX_FILE, MODEL)


def signed_model(
    run: Path, key: Ed25519PrivateKey, sites: Sequence[ListedSite] = ()
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
    sites : sequence of ListedSite
        Sites that the card may name.

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
    card = model_card(run, name, described, made, sites)
    with replacing_folder(folder) as new:
        (new / CARD).write_text(json.dumps(card, indent=2) + "\n", "utf-8")
        (new / CARD_TEXT).write_text(card_text(card), "utf-8")
        (new / ONNX_FILE).write_bytes(onnx_bytes(network, described))
        shutil.copyfile(run / MODEL, new / MODEL)
        return sign_folder(new, name, made, FILES, key)


def plain_name(name: str) -> str:
    """Return a folder's name as sites can store it: ASCII letters, digits, ._-."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-_")[:64] or "run"
