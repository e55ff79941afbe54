"""A site stores what its server signed, piece by piece, and nothing else."""

import dataclasses
import errno
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client_app.model_inbox import ModelInbox, stored_models
from client_app.policy_check import check_policy
from client_app.site_policy import SiteRefusal, policy_file
from clip2fl_common.files import remove
from clip2fl_common.messages import ModelAnswer, ModelOffer, ModelState, message_bytes
from clip2fl_common.signed_folder import (
    Manifest,
    public_text,
    sign_folder,
    verify_folder,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = public_text(KEY.public_key())
MADE = datetime(2026, 11, 27, 15, 30, tzinfo=UTC)
CONTENT = {"a.json": b"12345", "b.bin": b"x" * 7 + b"y", "c": b"z"}
WHOLE = b"".join(CONTENT.values())


def signed(folder: Path, run: str = "run", days: int = 0, **content: bytes) -> Manifest:
    """Return the manifest of a folder at the server."""
    folder.mkdir(parents=True)
    files = content or CONTENT
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return sign_folder(folder, run, MADE + timedelta(days), files, KEY)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Return the manifest of the model that the server offers."""
    return signed(tmp_path / "server")


@pytest.fixture
def inbox(tmp_path: Path) -> ModelInbox:
    """Return a site's folder, which does not exist yet."""
    return ModelInbox(tmp_path / "site" / "models", PUBLIC, 1.0)


def send(
    inbox: ModelInbox, manifest: Manifest, start: int = 0, piece: bytes = b""
) -> ModelAnswer:
    """Send one request to a site."""
    offer = ModelOffer(manifest.content, manifest.signature, start, piece)
    return inbox.take(offer)


def models(inbox: ModelInbox) -> list[str]:
    """Return the names of the models that a site has."""
    return sorted(path.name for path in inbox.folder.glob("[!.]*"))


def incoming(inbox: ModelInbox) -> list[Path]:
    """Return the folders of incomplete models."""
    return sorted(inbox.folder.glob(".incoming-*"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, len(WHOLE)), max_size=5))
def test_pieces_of_any_size_make_the_signed_files(
    inbox: ModelInbox, manifest: Manifest, cuts: Sequence[int]
) -> None:
    remove(inbox.folder)
    places = [0, *sorted(cuts), len(WHOLE)]
    assert send(inbox, manifest).state is ModelState.WANTED
    for start, end in zip(places, places[1:], strict=False):
        answer = send(inbox, manifest, start, WHOLE[start:end])
        assert answer.next == end
        if end < len(WHOLE):
            assert answer.state is ModelState.WANTED
            assert models(inbox) == []
    assert models(inbox) == [manifest.name]
    assert incoming(inbox) == []
    verify_folder(inbox.folder / manifest.name, PUBLIC)
    for name, data in CONTENT.items():
        assert (inbox.folder / manifest.name / name).read_bytes() == data
    assert send(inbox, manifest).state is ModelState.THERE


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, len(WHOLE) - 1), flip=st.integers(1, 255))
def test_changed_byte_on_the_way_leaves_nothing(
    inbox: ModelInbox, manifest: Manifest, place: int, flip: int
) -> None:
    changed = bytearray(WHOLE)
    changed[place] ^= flip
    with pytest.raises(SiteRefusal, match="thrown away") as refusal:
        send(inbox, manifest, 0, bytes(changed))
    assert str(inbox.folder) not in refusal.value.sent
    assert models(inbox) == [] and incoming(inbox) == []
    # A new attempt begins anew.
    assert send(inbox, manifest).next == 0


def test_piece_from_elsewhere_is_passed_over(
    inbox: ModelInbox, manifest: Manifest
) -> None:
    """The site names the byte that it wants, and the server sends it then."""
    send(inbox, manifest, 0, WHOLE[:6])
    for start in (0, 5, 7):
        assert send(inbox, manifest, start, WHOLE[start:]).next == 6
    assert send(inbox, manifest, 6, WHOLE[6:]).state is ModelState.STORED


def test_more_than_was_signed_is_refused(inbox: ModelInbox, manifest: Manifest) -> None:
    with pytest.raises(SiteRefusal, match="more bytes than it signed"):
        send(inbox, manifest, 0, WHOLE + b"!")
    assert models(inbox) == []


def test_only_one_model_is_incomplete(
    inbox: ModelInbox, manifest: Manifest, tmp_path: Path
) -> None:
    """So that offers cannot fill the disk."""
    other = signed(tmp_path / "other", "other")
    send(inbox, manifest, 0, WHOLE[:6])
    send(inbox, other, 0, WHOLE[:4])
    assert [path.name for path in incoming(inbox)] == [f".incoming-{other.name}"]
    assert send(inbox, manifest).next == 0


def test_foreign_manifest_takes_no_space(inbox: ModelInbox, manifest: Manifest) -> None:
    content = manifest.content.replace(b'"run"', b'"RUN"', 1)
    for offer in (
        ModelOffer(content, manifest.signature),
        ModelOffer(manifest.content, bytes(64)),
        ModelOffer(b"", b""),
    ):
        with pytest.raises(SiteRefusal, match="the site refuses the model"):
            inbox.take(offer)
    assert not inbox.folder.exists()


def test_too_large_model_is_refused_before_its_first_byte(
    inbox: ModelInbox, tmp_path: Path
) -> None:
    large = signed(tmp_path / "large", model=b"0" * (2**20 + 1))
    with pytest.raises(SiteRefusal, match="max-model-mib is 1$"):
        send(inbox, large)
    assert not inbox.folder.exists()
    fits = signed(tmp_path / "fits", model=b"0" * 2**20)
    assert send(inbox, fits).state is ModelState.WANTED


def test_pieces_fit_the_sites_largest_request(
    inbox: ModelInbox, manifest: Manifest
) -> None:
    small = ModelInbox(inbox.folder, PUBLIC, 1.0, largest_request=0.5)
    room = send(small, manifest).room
    offer = ModelOffer(manifest.content, manifest.signature, 0, b"0" * room)
    size = message_bytes(offer.content())
    assert 0.49 * 2**20 < size <= 0.5 * 2**20
    small.check_request(size)
    with pytest.raises(SiteRefusal, match="max-request-mib is 0.5"):
        small.check_request(size + 2**14)


def test_older_model_is_stored_and_named_and_never_the_newest(
    inbox: ModelInbox, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever replays an old model does not get it taken for the newest."""
    new, old = (signed(tmp_path / f"day-{d}", "run", d) for d in (2, 1))
    assert send(inbox, new, 0, WHOLE).note == ""
    answer = send(inbox, old, 0, WHOLE)
    assert answer.state is ModelState.STORED
    assert f"{old.name} of 2026-11-28 15:30 is older than {new.name}" in answer.note
    assert answer.note in caplog.text
    again = send(inbox, old)
    assert (again.state, again.note) == (ModelState.THERE, answer.note)
    assert [m.name for m in stored_models(inbox.folder, PUBLIC)] == [new.name, old.name]
    assert send(inbox, new).note == ""


def test_damaged_model_is_fetched_again(inbox: ModelInbox, manifest: Manifest) -> None:
    send(inbox, manifest, 0, WHOLE)
    (inbox.folder / manifest.name / "c").write_bytes(b"!")
    assert send(inbox, manifest).state is ModelState.WANTED
    # The damaged one stays until the whole one takes its place.
    assert send(inbox, manifest, 0, WHOLE[:3]).state is ModelState.WANTED
    assert models(inbox) == [manifest.name]
    assert send(inbox, manifest, 3, WHOLE[3:]).state is ModelState.STORED
    verify_folder(inbox.folder / manifest.name, PUBLIC)


def test_full_disk_does_not_stay_full(
    inbox: ModelInbox, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(inbox, manifest, 0, WHOLE[:6])
    whole = os.open

    def full(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_APPEND:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(SiteRefusal, match="No space left") as refusal:
        send(inbox, manifest, 6, WHOLE[6:])
    assert str(inbox.folder) not in refusal.value.sent
    monkeypatch.undo()
    assert incoming(inbox) == [] and models(inbox) == []


def test_model_that_would_fill_the_disk_is_refused_before_its_first_byte(
    inbox: ModelInbox, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site's record of its answers may lie on the same disk."""
    spare = 200 * 2**20
    free = len(WHOLE) + spare
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _: SimpleNamespace(total=2**40, used=0, free=free)
    )
    assert send(inbox, manifest, 0, WHOLE[:6]).next == 6
    free -= 6  # what has arrived is on the disk
    assert send(inbox, manifest, 6, WHOLE[6:9]).next == 9
    free -= 4
    with pytest.raises(SiteRefusal, match="are free in .*: make room") as refusal:
        send(inbox, manifest, 9, WHOLE[9:])
    assert refusal.value.sent == "the site has too little space for the model"
    assert incoming(inbox) == [] and models(inbox) == []


def test_older_models_make_room_and_an_old_one_is_refused(
    inbox: ModelInbox, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A replay of old models neither fills the disk nor removes a newer model."""
    caplog.set_level("INFO")
    two = dataclasses.replace(inbox, most=2)
    days = {d: signed(tmp_path / f"day-{d}", f"day{d}", d) for d in range(1, 6)}
    for day in (4, 1, 3):
        answer = send(two, days[day], 0, WHOLE)
        assert answer.state is ModelState.STORED
    assert models(two) == sorted([days[4].name, days[3].name])
    removed = f"{days[1].name} was removed, as max-models is 2"
    assert answer.note.endswith(f"; {removed}") and "is older than" in answer.note
    assert removed in caplog.text
    with pytest.raises(SiteRefusal, match="has as many models of later runs"):
        send(two, days[2], 0, WHOLE)
    assert models(two) == sorted([days[4].name, days[3].name])
    assert send(two, days[5], 0, WHOLE).note.startswith(f"{days[3].name} was removed")
    assert models(two) == sorted([days[5].name, days[4].name])
    # With a lower bound, a model between those that are there is too old, too.
    one = dataclasses.replace(inbox, most=1)
    between = signed(tmp_path / "between", "between", 4, a=b"other")
    with pytest.raises(SiteRefusal, match="max-models is 1,"):
        send(one, between, 0, b"other")
    assert not list(inbox.folder.glob(".removed-*"))


def test_rest_of_a_removed_model_is_cleared(
    inbox: ModelInbox, manifest: Manifest
) -> None:
    """A node may be killed while it removes a model."""
    rest = inbox.folder / ".removed-old"
    rest.mkdir(parents=True)
    (rest / "b.bin").write_bytes(b"x")
    send(inbox, manifest)
    assert not rest.exists()


def test_model_survives_a_kill_while_its_manifest_is_written(
    inbox: ModelInbox, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("client_app.model_inbox.write_manifest", kill)
    with pytest.raises(KeyboardInterrupt):
        send(inbox, manifest, 0, WHOLE)
    monkeypatch.undo()
    (incoming(inbox)[0] / ".manifest.json.incomplete").write_bytes(b"{")
    answer = send(inbox, manifest)
    assert (answer.state, answer.next) == (ModelState.STORED, len(WHOLE))
    verify_folder(inbox.folder / manifest.name, PUBLIC)


def test_link_in_the_way_is_not_followed(
    inbox: ModelInbox, manifest: Manifest, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("stays")
    send(inbox, manifest)
    (incoming(inbox)[0] / "a.json").symlink_to(victim)
    with pytest.raises(SiteRefusal):
        start = send(inbox, manifest).next
        send(inbox, manifest, start, WHOLE[start:])
    assert victim.read_text() == "stays"
    assert models(inbox) == []


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """Return the path of a policy file."""
    return tmp_path / "policy.toml"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('models-folder = "/m"', "models-folder needs model-key"),
        ('models-folder = "m"', "models-folder"),
        (f'model-key = "{"A" * 64}"', "model-key"),
        (f'model-key = "{"a" * 63}"', "model-key"),
        ("max-model-mib = 0", "max-model-mib"),
        ("max-models = 0", "max-models"),
        ("listed-in-card = 1", "listed-in-card"),
    ],
)
def test_unusable_rule_is_refused(policy: Path, text: str, said: str) -> None:
    policy.write_text(text)
    with pytest.raises(SiteRefusal, match=said):
        policy_file(policy)


def test_rules_for_models_are_off_without_a_policy(policy: Path) -> None:
    policy.write_text("")
    rules = policy_file(policy)
    assert rules.models_folder is None and not rules.listed_in_card
    assert rules.max_models == 8


def test_doctor_finds_a_folder_that_cannot_be_written(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f'models-folder = "{policy.parent}/a/b"\nmodel-key = "{PUBLIC}"\n'
    policy.write_text(text)
    (found,) = [f for f in check_policy(policy, None) if f.check == "models"]
    assert found.level == "ok"
    (policy.parent / "a").write_text("no folder")
    (found,) = [f for f in check_policy(policy, None) if f.check == "models"]
    assert found.level == "problem" and f"{policy.parent}/a/b" in found.fix
    (policy.parent / "a").unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    (found,) = [f for f in check_policy(policy, None) if f.check == "models"]
    assert found.level == "problem" and f"cannot write into {policy.parent}" in (
        found.text
    )
