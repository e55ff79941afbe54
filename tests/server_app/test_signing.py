"""The server's signing key is made once, and only its user can read it."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from clip2fl_common.signed_folder import public_key_of, public_text
from server_app.signing import SigningKeyError, public_key_file, signing_key


def digits(path: Path) -> str:
    """Return the public half of the key in a private key's file."""
    return public_text(signing_key(path).public_key())


def test_key_is_made_once_with_its_public_half(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "signing.key"
    first = digits(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    public = path.with_name("signing.key.pub")
    assert stat.S_IMODE(public.stat().st_mode) == 0o644
    assert public_key_of(str(public)) == first
    assert digits(path) == first
    assert {entry.name for entry in path.parent.iterdir()} == {path.name, public.name}


def test_public_half_is_written_again_if_it_is_lost_or_another_keys(
    tmp_path: Path,
) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    public = public_key_file(path)
    content = public.read_bytes()
    public.unlink()
    assert public_key_file(path).read_bytes() == content
    public.write_bytes(public_key_file(other).read_bytes())
    assert public_key_file(path).read_bytes() == content


def test_processes_that_start_together_get_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(digits, [tmp_path / "key"] * 16))
    assert len(keys) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["key", "key.pub"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_key_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    signing_key(tmp_path / "key")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(SigningKeyError, match="chmod 600"):
        signing_key(tmp_path / "key")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no key",
        generate_private_key(SECP256R1()).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        ),
    ],
    ids=["empty", "text", "another kind of key"],
)
def test_file_without_a_key_is_refused_and_stays(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(SigningKeyError, match="is no Ed25519 private key"):
        signing_key(path)
    assert path.read_bytes() == content
    path.unlink()
    path.mkdir()
    with pytest.raises(SigningKeyError, match="is a folder"):
        signing_key(path)
