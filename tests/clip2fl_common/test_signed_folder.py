"""A signed folder is exactly what its owner signed, or it is refused."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from clip2fl_common.signed_folder import (
    MANIFEST,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    Manifest,
    SignatureError,
    public_key_of,
    public_text,
    sign_folder,
    verify_folder,
)
from tests.tools import needed_tool

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = public_text(KEY.public_key())
MADE = datetime(2026, 11, 27, 15, 30, tzinfo=UTC)
CONTENT = {
    "card.json": b'{"a": 1}\n',
    "MODEL_CARD.md": b"# A card\n",
    "model.safetensors": bytes(range(256)) * 2,
}


def make(folder: Path) -> Path:
    """Write and sign a small folder."""
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    sign_folder(folder, "run-7", MADE, CONTENT, KEY)
    return folder


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a signed folder; leave it as it is."""
    return make(tmp_path_factory.mktemp("signed") / "model")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return a signed folder that a test may change."""
    return make(tmp_path / "model")


def test_manifest_lists_every_file_with_its_digest(signed: Path) -> None:
    manifest = verify_folder(signed, PUBLIC)
    assert (manifest.run, manifest.made) == ("run-7", MADE)
    assert [(f.name, f.bytes, f.sha256) for f in manifest.files] == [
        (name, len(data), hashlib.sha256(data).hexdigest())
        for name, data in CONTENT.items()
    ]
    assert manifest.size == sum(map(len, CONTENT.values()))
    digest = hashlib.sha256((signed / MANIFEST).read_bytes()).hexdigest()
    assert manifest.name == f"run-7-{digest[:12]}"


def test_openssl_accepts_the_signature(signed: Path, tmp_path: Path) -> None:
    """Anybody can check a folder without this program."""
    openssl = needed_tool("openssl")
    public = KEY.public_key().public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )
    (tmp_path / "signing.key.pub").write_bytes(public)

    def accepted(content: Path) -> bool:
        command = [openssl, "pkeyutl", "-verify", "-pubin", "-rawin"]
        command += ["-inkey", str(tmp_path / "signing.key.pub"), "-in", str(content)]
        command += ["-sigfile", str(signed / SIGNATURE)]
        return subprocess.run(command, capture_output=True).returncode == 0

    assert accepted(signed / MANIFEST)
    assert not accepted(signed / "card.json")
    assert (
        public_key_of(str(tmp_path / "signing.key.pub"))
        == PUBLIC
        == (
            # The last 32 bytes of the key's DER form.
            base64.b64decode(b"".join(public.splitlines()[1:-1]))[-32:].hex()
        )
    )


@settings(max_examples=200)
@given(st.data())
def test_any_changed_byte_is_refused(signed: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([MANIFEST, SIGNATURE, *CONTENT]))
    content = bytearray((signed / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    before = bytes(content)
    content[place] ^= data.draw(st.integers(1, 255))
    try:
        (signed / name).write_bytes(content)
        with pytest.raises(SignatureError):
            verify_folder(signed, PUBLIC)
    finally:
        (signed / name).write_bytes(before)
    verify_folder(signed, PUBLIC)


@given(name=st.sampled_from([MANIFEST, SIGNATURE, *CONTENT]), cut=st.integers(1, 8))
def test_any_other_length_is_refused(signed: Path, name: str, cut: int) -> None:
    before = (signed / name).read_bytes()
    try:
        for content in (before[:-cut], before + b"\n" * cut):
            (signed / name).write_bytes(content)
            with pytest.raises(SignatureError):
                verify_folder(signed, PUBLIC)
    finally:
        (signed / name).write_bytes(before)


def test_other_key_is_refused(signed: Path) -> None:
    other = public_text(Ed25519PrivateKey.generate().public_key())
    with pytest.raises(SignatureError, match="or another key signed them"):
        verify_folder(signed, other)


@pytest.mark.parametrize("name", [MANIFEST, SIGNATURE, *CONTENT])
def test_missing_file_is_named(own: Path, name: str) -> None:
    (own / name).unlink()
    with pytest.raises(SignatureError, match=f"{name} is missing"):
        verify_folder(own, PUBLIC)


def _link(path: Path) -> None:
    target = path.with_name("..elsewhere")
    path.rename(path.parent.parent / target.name)
    path.symlink_to(path.parent.parent / target.name)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("replace", [_link, _fifo, _folder])
@pytest.mark.parametrize("name", [MANIFEST, "model.safetensors"])
def test_only_regular_files_are_read(
    own: Path, name: str, replace: Callable[[Path], None]
) -> None:
    """A link's target could change after the check; a FIFO would never answer."""
    replace(own / name)
    with pytest.raises(SignatureError, match="no regular file"):
        verify_folder(own, PUBLIC)


@pytest.mark.parametrize("name", ["run.sh", ".hidden", "model.safetensors.bak"])
def test_extra_file_is_named(own: Path, name: str) -> None:
    (own / name).write_text("x")
    with pytest.raises(SignatureError, match="did not sign") as refusal:
        verify_folder(own, PUBLIC)
    assert name in str(refusal.value)


def test_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match="nothing"):
        verify_folder(tmp_path / "nothing", PUBLIC)


def signed_bytes(**changes: Any) -> tuple[bytes, bytes]:
    """Return a manifest with changes, and a valid signature of it."""
    fields: dict[str, Any] = {
        "kind": "clip2fl-model-1",
        "run": "run-7",
        "made": "2026-11-27T15:30:00Z",
        "files": [{"name": "a", "bytes": 1, "sha256": "0" * 64}],
    }
    content = json.dumps(fields | changes).encode()
    return content, KEY.sign(content)


def file(**changes: Any) -> dict[str, Any]:
    """Return an entry of a file."""
    return {"name": "a", "bytes": 1, "sha256": "0" * 64} | changes


def test_signed_bytes_are_accepted_without_changes() -> None:
    assert Manifest.check(*signed_bytes(), PUBLIC).run == "run-7"


@pytest.mark.parametrize(
    "name",
    [
        *("../a", "/etc/passwd", "a/b", "a\\b", "..", ".", "", ".a", "-a", "a\0b", "ä"),
        *("a\nb", "a" * 65, MANIFEST, SIGNATURE, MANIFEST.upper(), "C:a", "a b", 7),
    ],
)
def test_name_that_could_lead_elsewhere_is_refused_though_it_is_signed(
    name: Any,
) -> None:
    for changes in ({"files": [file(name=name)]}, {"run": name}):
        with pytest.raises(SignatureError) as refusal:
            Manifest.check(*signed_bytes(**changes), PUBLIC)
        assert str(refusal.value).isprintable()


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "clip2fl-model-2"},
        {"made": "2026-11-27T15:30:00"},
        {"made": 7},
        {"files": []},
        {"files": [file(), file()]},
        {"files": [file(), file(name="A")]},
        {"files": [file(name=f"f{i}") for i in range(MAX_FILES + 1)]},
        {"files": [file(bytes=0)]},
        {"files": [file(bytes=-1)]},
        {"files": [file(bytes=2**41)]},
        {"files": [file(bytes="1")]},
        {"files": [file(sha256="0" * 63)]},
        {"files": [file(more=1)]},
        {"more": 1},
    ],
    ids=str,
)
def test_odd_manifest_is_refused_though_it_is_signed(changes: dict[str, Any]) -> None:
    with pytest.raises(SignatureError, match="is signed, but"):
        Manifest.check(*signed_bytes(**changes), PUBLIC)


def test_large_manifest_is_refused_before_it_is_parsed() -> None:
    content = b" " * (MAX_MANIFEST_BYTES + 1)
    with pytest.raises(SignatureError, match="more than"):
        Manifest.check(content, KEY.sign(content), PUBLIC)


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_no_other_bytes_are_a_signature(content: bytes, signature: bytes) -> None:
    with pytest.raises(SignatureError, match="is not the signature"):
        Manifest.check(content, signature, PUBLIC)


def test_signature_of_another_kind_of_content_fits_no_manifest() -> None:
    """The key may sign other things; they never count as a model."""
    content = b'{"kind": "something else"}'
    with pytest.raises(SignatureError, match="is signed, but"):
        Manifest.check(content, KEY.sign(content), PUBLIC)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x" * 5000,
        generate_private_key(SECP256R1())
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    ],
    ids=["empty", "long", "another kind of key"],
)
def test_file_without_a_public_key_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(SignatureError, match="key"):
        public_key_of(str(tmp_path / "key"))
    with pytest.raises(SignatureError, match="missing"):
        public_key_of("0" * 63)


def test_public_key_may_be_a_link_to_its_file(own: Path, tmp_path: Path) -> None:
    """Unlike a signed folder's files: mounted secrets are links."""
    pem = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "real.pub").write_bytes(pem)
    (tmp_path / "link.pub").symlink_to("real.pub")
    assert public_key_of(str(tmp_path / "link.pub")) == PUBLIC
    shutil.rmtree(own)
