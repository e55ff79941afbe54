"""Files are replaced completely; only their owner can read private caches."""

import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from clip2fl_common.data.image_cache import decoded_images, file_digests
from clip2fl_common.files import (
    private_file,
    private_folder,
    remove,
    replacing,
    replacing_folder,
    replacing_private,
)
from clip2fl_common.teacher.facts import TeacherFacts, note_facts
from clip2fl_common.teacher.feature_cache import FeatureCache


@pytest.fixture(params=[0o000, 0o022, 0o377], ids=oct)
def cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """Return the path of a missing cache folder, under a umask."""
    (tmp_path / "x.png").write_bytes(b"x")
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "cache"))
    before = os.umask(request.param)
    yield tmp_path / "cache"
    os.umask(before)


def fill(folder: Path) -> None:
    """Store an item of every kind in the cache."""
    image = np.zeros((3, 4, 4), np.uint8)
    stored = decoded_images([folder / "x.png"], 4, iter([image]))
    assert stored is not None and stored[0].shape == (1, 3, 4, 4)
    file_digests([folder / "x.png"])
    note_facts("model", "tag", [folder / "x.png"], TeacherFacts("f", 1.0))
    store = FeatureCache("fingerprint")
    store.put([bytes(16)], torch.ones(1, 8))
    assert list(store.get([bytes(16)])) == [bytes(16)]
    # Lock files are made when the database was damaged.
    store._remove_damaged(sqlite3.DatabaseError("seen before"))


def modes(folder: Path) -> dict[str, set[int]]:
    """Return the modes of all files and folders below, and of the folder."""
    found: dict[str, set[int]] = {"files": set(), "folders": set()}
    for path in [folder, *folder.rglob("*")]:
        kind = "folders" if path.is_dir() else "files"
        found[kind].add(path.stat().st_mode & 0o777)
    return found


def test_everything_kept_is_private_whatever_the_umask(cache: Path) -> None:
    fill(cache.parent)
    kinds = {p.suffix for p in cache.rglob("*")}
    assert {".sqlite", ".lock", ".bin", ".json", ".npy"} <= kinds
    assert modes(cache) == {"files": {0o600}, "folders": {0o700}}


def test_what_others_could_read_is_closed_to_them(cache: Path) -> None:
    fill(cache.parent)
    for path in cache.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    cache.chmod(0o755)
    file_digests([cache.parent])  # of another set: a new file
    fill(cache.parent)
    # The folder that the user names keeps its mode; our folders in it are private.
    assert cache.stat().st_mode & 0o777 == 0o755
    for name in ("images", "digests", "teachers"):
        assert (cache / name).stat().st_mode & 0o777 == 0o700
    (features,) = cache.glob("features-*.sqlite")
    assert features.stat().st_mode & 0o777 == 0o600


def test_journal_of_features_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = FeatureCache("fingerprint", tmp_path)
        with store._open() as connection:
            connection.execute("INSERT INTO checked_feature VALUES (x'', x'', x'')")
            (journal,) = tmp_path.glob("*-journal")
            assert journal.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def test_links_of_others_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    (tmp_path / "file").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        private_file(tmp_path / "file")
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(OSError):
        private_folder(tmp_path / "folder")


def test_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    place = tmp_path / "folder" / "file"
    with replacing_private(place) as file:
        file.write(b"first")
        assert not place.exists()
    with pytest.raises(KeyError), replacing_private(place) as file:
        file.write(b"second")
        raise KeyError
    assert place.read_bytes() == b"first"
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("only_writer", [False, True])
def test_file_is_replaced_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only_writer: bool
) -> None:
    path = tmp_path / "config.json"
    for content in (b"first", b"second"):
        with replacing(path, only_writer=only_writer) as file:
            file.write(content)
    assert path.read_bytes() == b"second"

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(OSError, match="No space left"),
        replacing(path, only_writer=only_writer) as file,
    ):
        file.write(b"never there")
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o377], ids=oct)
def test_mode_is_the_one_wanted_or_the_umasks(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "default"), replacing(tmp_path / "open", 0o644):
            pass
    finally:
        os.umask(before)
    modes = [(tmp_path / n).stat().st_mode & 0o777 for n in ("default", "open")]
    assert modes == [0o666 & ~umask, 0o644]


def test_file_goes_to_the_open_folder_whatever_has_its_name_now(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    descriptor = os.open(place, os.O_RDONLY)
    try:
        place.rename(tmp_path / "moved")
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
        with replacing(place / "file", folder=descriptor) as file:
            file.write(b"x")
    finally:
        os.close(descriptor)
    assert (tmp_path / "moved" / "file").read_bytes() == b"x"
    assert not list((tmp_path / "elsewhere").iterdir())


def test_folder_is_replaced_whole(tmp_path: Path) -> None:
    place = tmp_path / "round"
    for content in ("old", "new"):
        with replacing_folder(place) as folder:
            (folder / content).write_text(content, "utf-8")
            assert not (place / content).exists()
        assert [file.name for file in place.iterdir()] == [content]
    with pytest.raises(KeyboardInterrupt), replacing_folder(place) as folder:
        (folder / "newer").touch()
        raise KeyboardInterrupt
    assert [file.name for file in place.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [place]


def test_what_a_killed_program_left_is_removed(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "round") as left:
        pass
    left.mkdir()
    (left / "half").touch()
    with replacing_folder(tmp_path / "round") as folder:
        (folder / "whole").touch()
    assert [file.name for file in (tmp_path / "round").iterdir()] == ["whole"]
    (tmp_path / ".file.incomplete").write_bytes(b"half of it, and longer")
    with replacing(tmp_path / "file", only_writer=True) as file:
        file.write(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "round"}


@pytest.mark.parametrize("leads_to", ["folder", "file", "nowhere"])
def test_links_are_replaced_and_removed_themselves(
    tmp_path: Path, leads_to: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / leads_to)
    remove(link)
    assert not link.is_symlink()
    remove(link)  # is not there
    link.symlink_to(tmp_path / leads_to)
    with replacing_folder(link) as folder:
        (folder / "new").touch()
    assert not link.is_symlink() and (link / "new").exists()
    remove(link)
    link.symlink_to(tmp_path / leads_to)
    with replacing(link) as file:
        file.write(b"new")
    assert not link.is_symlink() and link.read_bytes() == b"new"
    assert (tmp_path / "folder" / "precious").read_text() == "x"
    assert (tmp_path / "file").read_text() == "x"
    assert not (tmp_path / "nowhere").exists()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Record the order of synchronisation and renaming."""
    made: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        made.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_replace(source: Path, target: Path, **folders: int) -> None:
        made.append(f"rename {Path(target).name}")
        replace(source, target, **folders)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    yield made


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux' /proc")
def test_content_is_on_disk_before_the_name_and_the_name_at_the_end(
    tmp_path: Path, calls: list[str]
) -> None:
    with replacing(tmp_path / "file", only_writer=True) as file:
        file.write(b"text")
    assert calls == [
        "sync .file.incomplete",
        "rename file",
        f"sync {tmp_path.name}",
    ]
    calls.clear()
    with replacing_folder(tmp_path / "folder") as folder:
        (folder / "inner").touch()
    assert calls == [
        "sync inner",
        "sync .folder.incomplete",
        "rename folder",
        f"sync {tmp_path.name}",
    ]
