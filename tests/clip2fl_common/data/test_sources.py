"""The warnings of a source of image files, each given once, and its cache."""

import errno
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clip2fl_common.config import Dataset
from clip2fl_common.data import image_cache, image_reading, sources
from clip2fl_common.data.datasets import load_dataset
from clip2fl_common.data.image_cache import identical_files
from clip2fl_common.data.image_files import DatasetError
from clip2fl_common.data.image_reading import (
    Picture,
    UnreadableImageError,
    read_picture,
)
from clip2fl_common.data.regular_files import BoundedReader, open_regular
from clip2fl_common.data.sources import ArraySource, FileSource
from tests.defaults import run_config


@pytest.fixture(autouse=True)
def own_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(cache))
    return cache


def picture(path: Path, grey: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), grey).save(path)
    return path


def source(folder: Path, skip: bool) -> FileSource:
    paths = tuple(sorted(folder.iterdir()))
    return FileSource(paths, np.arange(len(paths)), 8, skip)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a good image, a refused one, and one with an unprintable name."""
    picture(tmp_path / "images" / "a.png", 9)
    values = Image.fromarray(np.full((8, 8), 0.5, np.float32))
    values.save(tmp_path / "images" / "b.tif")
    (tmp_path / "images" / os.fsdecode(b"c\xe9.png")).write_bytes(b"no image")
    return tmp_path / "images"


def test_error_says_why_and_what_to_do_and_its_summary_names_nothing(
    folder: Path,
) -> None:
    for read in (source(folder, False).load, source(folder, False).open):
        with pytest.raises(DatasetError) as caught:
            read(np.arange(3))
        assert (
            f"2 of 3 images cannot be read: {folder}/b.tif (it holds floating-point "
            "numbers; convert it to 8 or 16 bit first), "
            f"{folder}/c\\xe9.png (no image that is known); repair or convert them"
        ) in str(caught.value)
        assert caught.value.summary == "2 of 3 images cannot be read"


def test_left_out_images_are_counted_and_said_once_with_the_reason(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = source(folder, True)
    for read in (images.load, images.open, images.open, images.load):
        loaded = read(np.arange(3))
        assert loaded.labels.tolist() == [0] and loaded.images.shape == (1, 3, 8, 8)
        assert loaded.unreadable == (f"{folder}/b.tif", f"{folder}/c\\xe9.png")
        assert loaded.left_out == (1, 2)
    (message,) = caplog.messages
    assert "left out 2 of 3 images" in message and "convert it to 8 or 16" in message
    # Kept with the reasons: another process says the same.
    caplog.clear()
    source(folder, True).open(np.arange(3))
    assert caplog.messages == [message]


def test_several_pictures_in_files_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.new("L", (8, 8), grey) for grey in (10, 200)]
    for n in range(3):
        frames[0].save(tmp_path / f"{n}.gif", save_all=True, append_images=frames[1:])
    images = source(tmp_path, False)
    for _ in range(2):
        assert images.load(np.arange(3)).images.unique().tolist() == [10]
    (message,) = caplog.messages
    assert "0.gif holds several pictures" in message and "first is used" in message


def test_file_that_cannot_be_read_today_is_tried_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    own_cache: Path,
) -> None:
    """As of a network drive; the system then still says that the file may be read."""
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    images = source(tmp_path, True)

    def refused(path: Path, size: int) -> Picture:
        if path.name == "b.png":
            raise UnreadableImageError(path, "Permission denied", lasting=False)
        return read_picture(path, size)

    def denied(path: Path) -> BoundedReader:
        if path.name == "b.png":
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_regular(path)

    with monkeypatch.context() as patched:
        patched.setattr(sources, "read_picture", refused)
        patched.setattr(image_cache, "open_regular", denied)
        assert len(images.open(np.arange(2)).labels) == 1
        before = image_cache.file_digests(images.paths)
    (line,) = (line for line in caplog.messages if "every round" in line)
    assert line.endswith(f"every round: {tmp_path}/b.png: Permission denied")
    assert not list((own_cache / "images").glob("*/*"))
    assert len(images.open(np.arange(2)).labels) == 2
    after = image_cache.file_digests(images.paths)
    assert (before == after).tolist() == [True, False]


def test_image_that_may_not_be_read_does_not_keep_others_out_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the user joins a group later, which changes no time of the file."""
    for name in "abc":
        picture(tmp_path / f"{name}.png", ord(name))
    images = source(tmp_path, True)
    allowed, read = os.access, []

    def denied(path: Path) -> BoundedReader:
        read.append(path.name)
        if path.name == "b.png":
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_regular(path)

    with monkeypatch.context() as patched:
        # Root, as which tests may run, may read everything.
        patched.setattr(
            os,
            "access",
            lambda path, mode: path.name != "b.png" and allowed(path, mode),
        )
        for place in (image_reading, image_cache):
            patched.setattr(place, "open_regular", denied)
        before = [images.open(np.arange(3)).left_out for _ in range(2)]
        digests = [image_cache.file_digests(images.paths) for _ in range(2)]
    assert before == [(1,), (1,)]
    assert digests[0].tolist() == digests[1].tolist()
    # Once for the pixels and once for the digests.
    assert sorted(read) == [f"{name}.png" for name in "aabbcc"]
    assert not [line for line in caplog.messages if "every round" in line]
    assert len(images.open(np.arange(3)).labels) == 3
    after = image_cache.file_digests(images.paths)
    assert (digests[0] == after).tolist() == [True, False, True]


def folder_config(root: Path) -> Dataset:
    return run_config(
        dataset__name="image-folder",
        dataset__root=str(root),
        dataset__image_size=8,
        dataset__imbalance_factor=1.0,
    ).dataset


def test_test_images_that_are_trained_on_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(4):
        picture(tmp_path / "train" / "ab"[n % 2] / f"{n}.png", 10 * n)
    picture(tmp_path / "test" / "a" / "new.png", 99)
    picture(tmp_path / "test" / "a" / "same.png", 20)
    # Also where somebody gave it another class.
    picture(tmp_path / "test" / "b" / "other class.png", 0)
    dataset = load_dataset(folder_config(tmp_path))
    assert not caplog.messages  # a client, who has no use for it, does not look
    for _ in range(2):
        assert dataset.test.load(np.arange(3)).images[:, 0, 0, 0].tolist() == [
            99,
            20,
            0,
        ]
    (message,) = caplog.messages
    assert message.startswith("2 of 3 test images are also training images")
    assert f"{tmp_path}/test/a/same.png = {tmp_path}/train/a/2.png" in message


def test_only_files_of_equal_size_are_read_to_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in {
        "a": b"1",
        "b": b"22",
        "c": b"333",
        "d": b"22",
        "e": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "f").write_bytes(b"23")
    (tmp_path / "g").touch()
    read: list[str] = []
    digest = image_cache._file_digest

    def watched(path: Path) -> int:
        read.append(path.name)
        return digest(path)

    monkeypatch.setattr(image_cache, "_file_digest", watched)
    found = identical_files(
        [tmp_path / n for n in "abe"], [tmp_path / n for n in "cdfg"]
    )
    assert found == [(tmp_path / "b", tmp_path / "d")]
    assert sorted(read) == ["b", "d", "f"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_folders_of_one_class_are_refused_in_both_splits(
    tmp_path: Path, split: str, caplog: pytest.LogCaptureFixture
) -> None:
    for place in ("train/a b", "train/c", "test/a_b", f"{split}/a b", f"{split}/a_b"):
        picture(tmp_path / place / "x.png")
    with pytest.raises(DatasetError, match=f"{split}: the folders 'a b' and 'a_b' are"):
        load_dataset(folder_config(tmp_path))


def test_splits_may_spell_a_class_differently(tmp_path: Path) -> None:
    for place in ("train/a b", "train/c", "test/a_b"):
        picture(tmp_path / place / "x.png")
    (tmp_path / "train" / "__MACOSX").mkdir()
    dataset = load_dataset(folder_config(tmp_path))
    assert dataset.class_names == ("a b", "c")
    assert dataset.test.labels.tolist() == [0]


@pytest.mark.parametrize("what", ["pixels", "digests"])
def test_files_that_vanish_for_a_moment_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """As of a share that is unmounted while they are read."""
    folder, away = tmp_path / "images", tmp_path / "away"
    for name in "abcd":
        picture(folder / f"{name}.png", ord(name))
    images = source(folder, True)

    def unmounted(path: Path) -> BoundedReader:
        if path.name == "b.png" and folder.exists():
            folder.rename(away)
        return open_regular(path)

    with monkeypatch.context() as patched:
        for place in (image_reading, image_cache):
            patched.setattr(place, "open_regular", unmounted)
        if what == "pixels":
            with pytest.raises(DatasetError):
                images.open(np.arange(4))
        else:
            assert image_cache.NO_DIGEST in image_cache.file_digests(images.paths)
    away.rename(folder)
    assert len(images.open(np.arange(4)).labels) == 4
    assert image_cache.NO_DIGEST not in image_cache.file_digests(images.paths)


def test_new_package_for_a_format_reads_what_was_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = source(folder, True)
    assert len(images.open(np.arange(3)).labels) == 1
    monkeypatch.setattr(image_cache, "pillow_formats", lambda heif: ("PNG", "NEW"))
    monkeypatch.setattr(
        sources,
        "read_picture",
        lambda *_: Picture(np.ones((3, 8, 8), np.uint8), "RGB", False, False),
    )
    assert len(images.open(np.arange(3)).labels) == 3


@pytest.mark.parametrize("size", [8, 24, 40])
def test_images_in_memory_are_scaled_as_pillow_scales_them_a_few_at_a_time(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SCALED_AT_ONCE", 2)
    stored = np.random.default_rng(0).integers(0, 256, (7, 24, 24, 3), np.uint8)
    images = torch.from_numpy(stored).permute(0, 3, 1, 2)
    chosen = np.array([6, 0, 3, 3, 5])
    loaded = ArraySource(images, np.arange(7), size).load(chosen)
    assert loaded.labels.tolist() == chosen.tolist()
    assert loaded.images.shape == (5, 3, size, size)
    for image, n in zip(loaded.images, chosen, strict=True):
        expected = Image.fromarray(stored[n]).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        pixels = image.permute(1, 2, 0).numpy().astype(int)
        # Pillow rounds and cuts between rows and columns; bilinear is 8 levels off.
        assert np.abs(pixels - np.asarray(expected, dtype=int)).mean() < 0.5


def test_content_that_kept_its_size_and_date_is_read_again(tmp_path: Path) -> None:
    """As after moving two files of an archive, or after ``cp -p``."""
    for name, grey in (("a.bmp", 10), ("b.bmp", 200)):
        os.utime(picture(tmp_path / name, grey), ns=(10**18, 10**18))
    images = source(tmp_path, False)
    assert images.open(np.arange(2)).images[:, 0, 0, 0].tolist() == [10, 200]
    digests = image_cache.file_digests(images.paths)
    (tmp_path / "a.bmp").rename(tmp_path / "c")
    (tmp_path / "b.bmp").rename(tmp_path / "a.bmp")
    (tmp_path / "c").rename(tmp_path / "b.bmp")
    assert images.open(np.arange(2)).images[:, 0, 0, 0].tolist() == [200, 10]
    swapped = image_cache.file_digests(images.paths)
    assert swapped.tolist() == digests.tolist()[::-1]


def test_decoded_images_that_nobody_used_for_a_month_are_removed(
    tmp_path: Path, own_cache: Path
) -> None:
    for n in range(4):
        picture(tmp_path / f"{n}.png", n)
    images = source(tmp_path, False)
    kept, old, fresh = (np.array(part) for part in ([0, 1], [2], [3]))
    images.open(kept)
    images.open(old)
    half = own_cache / "images" / ".x.incomplete"
    half.mkdir()
    long_ago = time.time() - 31 * 24 * 3600
    for path in (own_cache / "images").rglob("*"):
        os.utime(path, (long_ago, long_ago))
    used = images.open(kept).images  # in use again
    images.open(fresh)
    stored = [path for path in (own_cache / "images").iterdir() if path.is_dir()]
    assert len(stored) == 2 and not half.exists()
    assert used[:, 0, 0, 0].tolist() == [0, 1]
    assert images.open(old).images[0, 0, 0, 0] == 2


def test_images_that_exceed_the_memory_are_mapped_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Linux refuses writable pages for more than memory and swap together."""
    picture(tmp_path / "a.png", 7)
    mapped: Any = np.memmap
    modes = []

    def limited(*args: Any, mode: Any, **kwargs: Any) -> Any:
        modes.append(mode)
        if mode == "c":
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return mapped(*args, mode=mode, **kwargs)

    monkeypatch.setattr(np, "memmap", limited)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = source(tmp_path, False).open(np.arange(1))
    assert loaded.images.unique().tolist() == [7] and modes == ["c", "r"]
    assert not caplog.messages
