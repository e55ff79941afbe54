"""What is kept of private images is their owner's alone, whatever was there before."""

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from clip2fl_common.data.image_cache import decoded_images, file_digests
from clip2fl_common.files import private_file, private_folder, replacing
from clip2fl_common.teacher.facts import TeacherFacts, note_facts
from clip2fl_common.teacher.feature_cache import FeatureStore


@pytest.fixture(params=[0o000, 0o022, 0o377], ids=oct)
def cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """Return a cache folder that is not there yet, under a umask."""
    (tmp_path / "x.png").write_bytes(b"x")
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "cache"))
    before = os.umask(request.param)
    yield tmp_path / "cache"
    os.umask(before)


def fill(folder: Path) -> None:
    """Keep something of every kind."""
    image = np.zeros((3, 4, 4), np.uint8)
    stored = decoded_images([folder / "x.png"], 4, iter([image]))
    assert stored is not None and stored[0].shape == (1, 3, 4, 4)
    file_digests([folder / "x.png"])
    note_facts("model", "tag", [folder / "x.png"], TeacherFacts("f", 1.0))
    store = FeatureStore("fingerprint")
    store.put([bytes(16)], torch.ones(1, 8))
    assert list(store.get([bytes(16)])) == [bytes(16)]
    # Files of a lock are made when the database was damaged.
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
    # The folder that the user names keeps its mode; ours in it are closed.
    assert cache.stat().st_mode & 0o777 == 0o755
    for name in ("images", "digests", "teachers"):
        assert (cache / name).stat().st_mode & 0o777 == 0o700
    (features,) = cache.glob("features-*.sqlite")
    assert features.stat().st_mode & 0o777 == 0o600


def test_journal_of_features_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = FeatureStore("fingerprint", tmp_path)
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
    with replacing(place) as file:
        file.write(b"first")
        assert not place.exists()
    with pytest.raises(KeyError), replacing(place) as file:
        file.write(b"second")
        raise KeyError
    assert place.read_bytes() == b"first"
    assert list(place.parent.iterdir()) == [place]
