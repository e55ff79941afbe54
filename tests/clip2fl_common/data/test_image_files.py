"""Which files of a folder are images, and which folder names are refused."""

import logging
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from PIL import features

from clip2fl_common.config import listed_names
from clip2fl_common.data import image_formats
from clip2fl_common.data.image_files import (
    DatasetError,
    class_folders,
    images_below,
    labelled_images,
    look_into,
    site_files,
)
from clip2fl_common.data.image_formats import IMAGE_SUFFIXES, missing_decoder
from tests.defaults import run_config
from tests.special_files import SPECIAL, make_special_files

NFC, NFD = (unicodedata.normalize(form, "élan") for form in ("NFC", "NFD"))


@pytest.fixture(autouse=True)
def fresh_decoders() -> Iterator[None]:
    """Repeat the check of available decoders before and after the test."""
    missing_decoder.cache_clear()
    yield
    missing_decoder.cache_clear()


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_listing_sorts_by_what_becomes_of_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    make_special_files(tmp_path)
    for name in (
        *("b.PNG", "a.jfif", "c.jp2", "._a.jpg", ".DS_Store", "Thumbs.db", "x.avif"),
        *("notes.txt", "README", "desktop.ini", ".keep.png"),
    ):
        (tmp_path / name).write_text("x")
    for name in ("folder.png", "__MACOSX", ".git", "lost+found", "sub"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    (tmp_path / "nothing.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.png").symlink_to("loop.png")
    found = look_into(tmp_path)
    images = [".keep.png", "a.jfif", "b.PNG", "c.jp2", "loop.png", "nothing.png"]
    assert names(found.images) == images
    assert names(found.folders) == ["folder.png", "linked", "sub"]
    assert names(found.not_decoded) == ["x.avif"]
    assert {path.name: kind for path, kind in found.special} == SPECIAL
    assert names(found.other) == ["README", "notes.txt"]
    assert names(found.system) == [
        *(".DS_Store", "._a.jpg", ".git", "Thumbs.db", "__MACOSX", "desktop.ini"),
        "lost+found",
    ]


def test_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=r"file cannot be listed \(Not a directory"):
        look_into(tmp_path / "file")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("a_b", "a b"), "the folders 'a b' and 'a_b' are the same class 'a b'"),
        (("dog", "dog "), "the folders 'dog' and 'dog ' are the same class 'dog'"),
        (
            (NFC, NFD),
            f"'{NFD}' (split accents) and '{NFC}' (composed accents) are the same",
        ),
        (("a\nb", "c"), "'a\\nb' has a character in its name that cannot be seen"),
        (("a\u202eb", "c"), "'a\\u202eb' has a character in its name"),
        (("a\u200bb", "ab"), "(U+200B)"),
        (("a\u3164", "a"), "(U+3164)"),
        (("a\u200cb", "ab"), "'ab' and 'a\\u200cb' are the same class 'ab'"),
        ((os.fsdecode(b"caf\xe9"), "c"), "'caf\\xe9' has a character"),
    ],
)
def test_names_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, folders: tuple[str, ...], message: str
) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    known = ("a b", "dog", NFC, "ab", "a", "c")
    for look in (lambda: class_folders(tmp_path), lambda: site_files(tmp_path, known)):
        with pytest.raises(DatasetError) as caught:
            look()
        assert message in str(caught.value)
        assert str(caught.value).isprintable()
        assert caught.value.summary == "1 names of class folders are not usable"


def test_site_may_have_every_class_that_a_run_may_have(tmp_path: Path) -> None:
    """Persian and Hindi write zero-width joiners within words."""
    names = "می\u200cخواهم", "क्\u200dष"
    text = ", ".join(names)
    config = run_config(dataset__name="sites", dataset__class_names=text).dataset
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").touch()
    found = site_files(tmp_path, listed_names(config.class_names))
    assert [label for _, label in found] == [0, 1]


def test_site_with_undecodable_file_names_and_leftovers(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    for name in (b"caf\xe9.png", b"a\nb.png", b"._x.png"):
        (tmp_path / "dog" / os.fsdecode(name)).write_bytes(name)
    files = site_files(tmp_path, ("cat", "dog"))
    assert [(os.fsencode(path.name), label) for path, label in files] == [
        (b"a\nb.png", 1),
        (b"caf\xe9.png", 1),
    ]
    (tmp_path / "e\x1bl").mkdir()
    with pytest.raises(DatasetError, match=r"'e\\x1bl' has a character"):
        site_files(tmp_path, ("cat", "dog"))


def test_what_is_passed_over_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(image_formats, "find_spec", lambda _: None)
    folders = [(n, tmp_path / name) for n, name in enumerate(("cat", "dog"))]
    for _, folder in folders:
        make_special_files(folder)
        (folder / "x.heic").touch()
        (folder / "x.png").touch()
    with caplog.at_level(logging.WARNING):
        found = labelled_images(folders)
    assert [(path.parent.name, label) for path, label in found] == [
        ("cat", 0),
        ("dog", 1),
    ]
    ignored, missing = caplog.messages
    assert "ignored, as they are no files" in ignored
    assert f"{tmp_path}/cat/pipe.png (a named pipe (FIFO))" in ignored
    assert "2 images are ignored" in missing and "pip install pillow-heif" in missing


def test_images_in_folders_below_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/x.png", "a/b/y.JPG", "a/b/._y.jpg", "a/b/z.txt"):
        (tmp_path / name).touch()
    (tmp_path / "a" / "again").symlink_to(tmp_path)  # without end, were it followed
    assert images_below(tmp_path) == 2


def test_suffixes_are_lower_case_and_known_to_one_format() -> None:
    assert len(set(IMAGE_SUFFIXES)) == len(IMAGE_SUFFIXES)
    for suffix in (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".pnm"),
        *(".bmp", ".tif", ".tiff", ".webp", ".gif", ".jp2", ".j2k", ".jpx", ".jpf"),
        *(".avif", ".heic", ".heif"),
    ):
        assert suffix in IMAGE_SUFFIXES


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_order_does_not_depend_on_how_a_disk_spells_accents(
    tmp_path: Path, form: Literal["NFC", "NFD"]
) -> None:
    spelled = [
        unicodedata.normalize(form, name)
        for name in ("Zebra", "Éclair", "Eule", "äffchen", "apfel", "Ente")
    ]
    for name in spelled:
        (tmp_path / name).mkdir()
        (tmp_path / spelled[0] / f"{name}.png").touch()
    expected = ["Ente", "Eule", "Zebra", "apfel", "Éclair", "äffchen"]
    assert [name for name, _ in class_folders(tmp_path)] == expected
    images = labelled_images([(0, tmp_path / spelled[0])])
    found = [unicodedata.normalize("NFC", path.stem) for path, _ in images]
    assert found == expected
