"""Public keys of servers that this user trusts to sign models.

``clip2fl site fetch`` writes the key of the site's policy into a file of the user's
configuration folder, outside of every model's folder: a changed folder cannot bring its
own key.
"""

import re
from pathlib import Path

import platformdirs

from clip2fl_cli.runs import RunError
from clip2fl_common.files import replacing
from clip2fl_common.shown import shown
from clip2fl_common.signed_folder import (
    KEY_PATTERN,
    SignatureError,
    is_signed,
    public_key_of,
    read_manifest,
)
from server_app.foreign_files import ForeignFileError, read_text

_MAX_BYTES = 2**16


def key_file() -> Path:
    """Return the file of this user's trusted keys, one on each line."""
    return Path(platformdirs.user_config_dir("clip2fl")) / "model-keys"


def trusted_keys() -> list[str]:
    """Return the keys that this user trusts; empty if none was added.

    Raises
    ------
    RunError
        If the file is damaged.
    """
    path = key_file()
    # Whoever removed the last key from it left an empty file.
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return []
    try:
        keys = read_text(path, _MAX_BYTES).split()
    except ForeignFileError as error:
        raise RunError(str(error)) from None
    for key in keys:
        if not re.match(KEY_PATTERN, key):
            raise RunError(
                f"{shown(path)} has a line that is no public key: correct or remove it"
            )
    return keys


def trust(key: str) -> None:
    """Add a key to those that this user trusts."""
    keys = trusted_keys()
    if key in keys:
        return
    path = key_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write("".join(f"{known}\n" for known in [*keys, key]).encode())


def check_signature(folder: Path, public_key: str | None = None) -> None:
    """Refuse a signed folder that is not exactly what a trusted server signed.

    Parameters
    ----------
    folder : Path
        Folder of a model. Without a manifest it is a run's own and is not checked,
        unless a key is given.
    public_key : str or None
        A key or its file; None: the keys that this user trusts.

    Raises
    ------
    RunError
        If there is no key to check with.
    SignatureError
        Names what differs.
    """
    if public_key is None and not is_signed(folder):
        return
    keys = [public_key_of(public_key)] if public_key else trusted_keys()
    if not keys:
        raise RunError(
            f"{shown(folder)} is signed, but no server's key is known here: give its "
            "signing.key.pub as --public-key, or fetch the model with clip2fl site "
            "fetch"
        )
    refusals = []
    for key in keys:
        try:
            manifest = read_manifest(folder, key)
        except SignatureError as error:
            refusals.append(error)
        else:
            manifest.verify_files(folder)
            return
    others = f" (and by none of {len(keys) - 1} other keys)" if len(keys) > 1 else ""
    raise SignatureError(
        f"{refusals[0]}{others}; do not use this model: fetch it again, and compare "
        "the key with the server's"
    )
