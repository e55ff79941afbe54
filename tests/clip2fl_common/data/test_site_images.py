"""A site's folder: which files are used, and which of them for validation."""

import hashlib
import os
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from clip2fl_common.config import Dataset, Scalar
from clip2fl_common.data import image_cache
from clip2fl_common.data.datasets import (
    DatasetError,
    FileSource,
    ImageDataset,
    open_site,
)
from clip2fl_common.data.image_cache import file_digests
from clip2fl_common.data.image_files import site_files
from tests.defaults import run_config

CLASSES = "big cat, dog, élan"


@pytest.fixture(autouse=True)
def own_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def site_config(**changes: Scalar) -> Dataset:
    """Return the ``dataset`` group of a run with sites."""
    settings: dict[str, Scalar] = {
        "dataset__name": "sites",
        "dataset__class_names": CLASSES,
        "dataset__validation_share": 0.4,
    }
    changed = {f"dataset__{name}": value for name, value in changes.items()}
    return run_config(**{**settings, **changed}).dataset


def write(folder: Path, count: int, first: int = 0) -> None:
    """Write files whose content is their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        (folder / f"{i}.png").write_bytes(b"content %d" % i)


def names(dataset: ImageDataset, split: str) -> set[str]:
    """Return the names of a split's files."""
    source = getattr(dataset, split)
    assert isinstance(source, FileSource)
    return {path.name for path in source.paths}


def test_classes_are_known_by_name_in_any_spelling(tmp_path: Path) -> None:
    """Underscores are spaces, and accents may be written in two ways."""
    write(tmp_path / "big_cat", 1)
    write(tmp_path / unicodedata.normalize("NFD", "élan"), 1, first=1)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "big_cat" / "notes.txt").write_text("no image")
    files = site_files(tmp_path, ("big cat", "dog", "élan"))
    assert [(path.name, label) for path, label in files] == [("0.png", 0), ("1.png", 2)]


def test_unknown_folder_is_named_with_the_known_ones(tmp_path: Path) -> None:
    write(tmp_path / "dog", 1)
    write(tmp_path / "Dog", 1)
    write(tmp_path / "eel", 1)
    with pytest.raises(
        DatasetError,
        match="no class of the run: Dog, eel; known classes: big cat, dog, élan",
    ):
        open_site(site_config(), tmp_path)


def test_split_is_by_content_alone(tmp_path: Path) -> None:
    """Only the hash of the content matters, not name, date, other files or class."""
    one, other = tmp_path / "one", tmp_path / "other"
    write(one / "dog", 40)
    write(other / "big_cat", 20, first=10)
    expected = {
        f"{i}.png"
        for i in range(40)
        if int.from_bytes(
            hashlib.blake2b(b"content %d" % i, digest_size=8).digest(), "little"
        )
        < 0.4 * 2**64
    }
    dataset = open_site(site_config(), one)
    assert 0 < len(expected) < 40
    assert names(dataset, "test") == expected
    assert names(dataset, "train") == {f"{i}.png" for i in range(40)} - expected
    elsewhere = open_site(site_config(), other)
    assert names(elsewhere, "test") == {
        name for name in expected if 10 <= int(name.removesuffix(".png")) < 30
    }
    assert set(elsewhere.test.labels.tolist()) == {0}


def test_greater_share_only_adds_validation_images(tmp_path: Path) -> None:
    write(tmp_path / "dog", 60)
    splits = [
        names(open_site(site_config(validation_share=share), tmp_path), "test")
        for share in (0.1, 0.3, 0.8)
    ]
    assert splits[0] < splits[1] < splits[2]


def test_nothing_left_to_train_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "dog", 1)
    with pytest.raises(DatasetError, match=r"all 1 images .* lower dataset.validation"):
        open_site(site_config(validation_share=0.9), tmp_path)


def test_digests_are_kept_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "dog", 3)
    paths = sorted((tmp_path / "dog").iterdir())
    first = file_digests(paths)
    with monkeypatch.context() as patched:
        patched.setattr(
            image_cache, "_file_digest", lambda _: pytest.fail("read again")
        )
        np.testing.assert_array_equal(file_digests(paths), first)
    paths[1].write_bytes(b"another")
    os.utime(paths[1], ns=(1, 1))
    changed = file_digests(paths) != first
    assert changed.tolist() == [False, True, False]


def test_digests_that_nobody_used_for_a_month_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "cache"))
    write(tmp_path / "dog", 3)
    used, old, fresh = ([path] for path in sorted((tmp_path / "dog").iterdir()))
    file_digests(used)
    file_digests(old)
    kept = list((tmp_path / "cache" / "digests").iterdir())
    long_ago = time.time() - 31 * 24 * 3600
    for path in kept:
        os.utime(path, (long_ago, long_ago))
    file_digests(used)  # in use again
    file_digests(fresh)
    assert len(kept) == 2
    assert len(list((tmp_path / "cache" / "digests").iterdir())) == 2
    assert [path.exists() for path in kept].count(True) == 1


def test_file_that_cannot_be_read_is_trained_on_and_so_reported(tmp_path: Path) -> None:
    write(tmp_path / "dog", 1)
    (tmp_path / "dog" / "broken.png").symlink_to(tmp_path / "nowhere")
    assert "broken.png" in names(open_site(site_config(), tmp_path), "train")


def test_unwritable_cache_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "file"))
    write(tmp_path / "dog", 5)
    assert len(file_digests(sorted((tmp_path / "dog").iterdir()))) == 5
    assert "CLIP2FL_CACHE_DIR" in caplog.text
