"""HEIC images are read through an optional package."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from clip2fl_common.data import image_formats
from clip2fl_common.data.image_files import look_into
from clip2fl_common.data.image_formats import (
    INSTALL_HEIF,
    is_heif,
    missing_decoder,
    pillow_formats,
)
from clip2fl_common.data.image_reading import UnreadableImageError, read_picture

# What the package below takes for an image.
HEIC = b"\0\0\0\x18ftypheic" + bytes(20)
PACKAGE = """
from PIL import Image, ImageFile

class HeifImageFile(ImageFile.ImageFile):
    format = "HEIF"

    def _open(self):
        self._size, self._mode = (8, 8), "L"
        self.tile = [ImageFile._Tile("raw", (0, 0, 8, 8), 0, ("L", 0, 1))]

    def load(self):
        self.tile = []
        self.im = Image.core.fill("L", (8, 8), 77)
        return Image.Image.load(self)

def register_heif_opener():
    Image.register_open("HEIF", HeifImageFile, lambda start: start[4:12] == b"ftypheic")
"""


@pytest.fixture(autouse=True)
def fresh_decoders() -> Iterator[None]:
    """Repeat the check of available decoders, and restore Pillow afterwards."""
    Image.init()
    known, ids = dict(Image.OPEN), list(Image.ID)
    missing_decoder.cache_clear()
    pillow_formats.cache_clear()
    yield
    missing_decoder.cache_clear()
    pillow_formats.cache_clear()
    sys.modules.pop("pillow_heif", None)
    Image.OPEN.clear()
    Image.OPEN.update(known)
    Image.ID[:] = ids


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Return a folder with a HEIC image for each HEIC suffix."""
    for name in ("a.heic", "b.HEIF", "c.hif", "named as.jpg"):
        (tmp_path / name).write_bytes(HEIC)
    return tmp_path


def test_without_the_package_they_are_no_images_and_it_is_said_what_to_install(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_formats, "find_spec", lambda _: None)
    found = look_into(photographs)
    assert [path.name for path in found.not_decoded] == ["a.heic", "b.HEIF", "c.hif"]
    assert missing_decoder(".heic") == INSTALL_HEIF
    # One with another suffix is an image by its name.
    with pytest.raises(UnreadableImageError) as caught:
        read_picture(photographs / "named as.jpg", 8)
    assert caught.value.reason == f"a HEIC image; {INSTALL_HEIF}"


def test_with_the_package_they_are_read(
    photographs: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    site = tmp_path_factory.mktemp("site")
    (site / "pillow_heif.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(site)
    found = look_into(photographs)
    assert len(found.images) == 4 and not found.not_decoded
    for path in found.images:
        picture = read_picture(path, 8)
        assert (picture.kind, int(picture.pixels.max())) == ("8-bit grey", 77)


def test_package_is_loaded_where_an_image_asks_for_it(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    read_picture(tmp_path / "x.png", 8)
    assert "pillow_heif" not in sys.modules
    assert is_heif(HEIC) and not is_heif(b"\0\0\0\x18ftypavif" + bytes(4))
