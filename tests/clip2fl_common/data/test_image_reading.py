"""Files of every kind give the right colours, or are refused with a reason."""

import errno
import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import ExifTags, Image, ImageFile, ImageOps

from clip2fl_common.data import image_reading
from clip2fl_common.data.image_headers import MAX_VALUES
from clip2fl_common.data.image_reading import (
    UnreadableImageError,
    pixel_limit,
    read_image,
    read_picture,
    to_rgb,
)
from tests.defaults import ROOT
from tests.image_bytes import (
    LONG,
    SHORT,
    UNDEFINED,
    png,
    png_chunk,
    png_of,
    tiff,
    tiff_image,
)

# Every 16-bit value once.
RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)
SCALED = np.rint(RAMP / 257).astype(np.uint8)


def noise(mode: str = "RGB", size: tuple[int, int] = (60, 40)) -> Image.Image:
    """Return an image of random colours."""
    pixels = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 4), np.uint8)
    return Image.fromarray(pixels[..., :3]).convert(mode)


def refusal(path: Path) -> str:
    """Return the reason why a file is refused."""
    with pytest.raises(UnreadableImageError) as caught:
        read_image(path, 8)
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    return caught.value.reason


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.png", {}),
        ("x.pgm", {}),
        ("x.jp2", {}),
        ("x.tif", {}),
        ("packed.tif", {"compression": "tiff_deflate"}),
    ],
)
def test_sixteen_bit_grey_keeps_its_whole_range(
    tmp_path: Path, name: str, options: dict[str, object]
) -> None:
    picture = read_picture(save(tmp_path / name, Image.fromarray(RAMP), **options), 256)
    assert (picture.kind, picture.scaled) == ("16-bit grey", True)
    np.testing.assert_array_equal(picture.pixels, np.stack([SCALED] * 3))


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bit_tiff_of_either_byte_order(tmp_path: Path, order: str) -> None:
    data = RAMP.astype(f"{order}u2").tobytes()
    (tmp_path / "x.tif").write_bytes(tiff_image(256, 256, data, order=order))
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif", 256)[1], SCALED)


def test_sixteen_bit_tiff_whose_white_is_zero_is_inverted(tmp_path: Path) -> None:
    """Pillow inverts only 8-bit files of this kind."""
    data = tiff_image(256, 256, RAMP.tobytes(), more=[(262, SHORT, [0])])
    (tmp_path / "x.tif").write_bytes(data)
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif", 256)[0], 255 - SCALED)


def test_twelve_bit_tiff_reaches_white(tmp_path: Path) -> None:
    # Two samples, 0 and 4095, then 2048 and 1, in three bytes each.
    rows = bytes.fromhex("000fff 800001".replace(" ", "")) * 2
    (tmp_path / "x.tif").write_bytes(tiff_image(4, 2, rows, bits=(12,)))
    picture = read_picture(tmp_path / "x.tif", 2)
    assert picture.kind == "12-bit grey"
    # The centre square: 4095 and 2048 of 4095.
    np.testing.assert_array_equal(picture.pixels[0], [[255, 128]] * 2)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_sixteen_bit_modes_in_memory(mode: str) -> None:
    for value, grey in ((0, 0), (128, 0), (129, 1), (32896, 128), (65535, 255)):
        image = Image.new(mode, (3, 2), value)
        assert to_rgb(image).getpixel((2, 1)) == (grey,) * 3


def test_sixteen_bit_colours_lose_their_low_byte(tmp_path: Path) -> None:
    """Pillow drops the low byte; the result is correct within one of 255 steps."""
    samples = np.random.default_rng(0).integers(0, 65536, (16, 16, 3), np.uint16)
    (tmp_path / "x.png").write_bytes(png_of(samples))
    data = samples.astype("<u2").tobytes()
    (tmp_path / "x.tif").write_bytes(tiff_image(16, 16, data, bits=(16,) * 3))
    for name in ("x.png", "x.tif"):
        picture = read_picture(tmp_path / name, 16)
        assert (picture.kind, picture.scaled) == ("16-bit RGB", True)
        np.testing.assert_array_equal(picture.pixels, (samples >> 8).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (np.full((8, 8), 70000, np.int32), "grey of 32 or signed 16 bits"),
        (np.full((8, 8), -5, np.int16), "grey of 32 or signed 16 bits"),
        (np.full((8, 8), 0.5, np.float32), "floating-point numbers"),
    ],
)
def test_values_without_a_range_are_refused(
    tmp_path: Path, values: npt.NDArray[np.generic], what: str
) -> None:
    if values.dtype == np.int16:
        sign = (339, SHORT, [2])
        data = tiff_image(8, 8, values.tobytes(), more=[sign])
        (tmp_path / "x.tif").write_bytes(data)
    else:
        save(tmp_path / "x.tif", Image.fromarray(values))
    reason = refusal(tmp_path / "x.tif")
    assert what in reason and "convert it to 8 or 16 bit first" in reason


def with_transparent_palette() -> Image.Image:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("L", (2, 2), 77), (77, 77, 77)),
        (Image.new("LA", (2, 2), (77, 0)), (77, 77, 77)),
        (Image.new("La", (2, 2), (50, 255)), (50, 50, 50)),
        (with_transparent_palette(), (200, 100, 50)),
        (with_transparent_palette().convert("PA"), (200, 100, 50)),
        (Image.new("RGB", (2, 2), (1, 2, 3)), (1, 2, 3)),
        # Transparent: the stored colour stays.
        (Image.new("RGBA", (2, 2), (200, 100, 50, 0)), (200, 100, 50)),
        (Image.new("RGBa", (2, 2), (100, 50, 25, 128)), (199, 99, 49)),
        (Image.new("RGBX", (2, 2), (200, 100, 50, 9)), (200, 100, 50)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("YCbCr", (2, 2), (76, 85, 255)), (254, 0, 0)),
        (Image.new("HSV", (2, 2), (85, 255, 255)), (0, 255, 0)),
        # L = 53 of 100, a = 80, b = 67, both from -128: red.
        (Image.new("LAB", (2, 2), (136, 208, 195)), (251, 2, 10)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_every_mode_becomes_rgb(image: Image.Image, colour: tuple[int, ...]) -> None:
    made = to_rgb(image)
    assert made.mode == "RGB"
    np.testing.assert_allclose(np.asarray(made)[1, 1], colour, atol=2)


def read_as_ever(path: Path, size: int) -> npt.NDArray[np.uint8]:
    """Return the pixels that every version of this program gave for an image."""
    with Image.open(path) as image:
        image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        small = image.convert("RGB")
    if small.size != (size, size):
        small = ImageOps.fit(small, (size, size), Image.Resampling.BICUBIC)
    if orientation is not None:
        small.getexif()[ExifTags.Base.Orientation] = orientation
        small = ImageOps.exif_transpose(small)
    return np.asarray(small).transpose(2, 0, 1)


MODES = ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK"]
# Formats that lack some of these modes.
LACKING: dict[str, set[str]] = {
    "jpg": {"P", "RGBA", "LA"},
    "png": {"CMYK"},
    "webp": set(),
    "tif": set(),
    "bmp": {"LA", "CMYK"},
    "ppm": {"P", "LA", "CMYK"},
    "gif": {"CMYK"},
}


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [(f, m) for f, lacking in LACKING.items() for m in MODES if m not in lacking],
)
def test_ordinary_images_keep_their_pixels(
    tmp_path: Path, suffix: str, mode: str
) -> None:
    exif = Image.Exif()
    if suffix != "tif":
        exif[ExifTags.Base.Orientation] = 8
    path = tmp_path / f"x.{suffix}"
    noise().convert(mode).save(path, exif=exif)
    for size in (16, 40, 60):
        np.testing.assert_array_equal(read_image(path, size), read_as_ever(path, size))


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_turned_tiff_of_every_mode(
    tmp_path: Path, mode: str, compression: str | None
) -> None:
    """Pillow scrambles uncompressed rotated TIFF files that it maps into memory."""
    if mode == "I;16":
        image = Image.fromarray(RAMP[:40, :60])
    else:
        image = noise().convert(mode)
    path = save(tmp_path / "x.tif", image, compression=compression)
    plain = read_image(path, 40)
    for orientation, turns in ((3, 2), (6, -1), (8, 1)):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        save(path, image, compression=compression, exif=exif)
        expected = np.rot90(plain, turns, axes=(1, 2))
        np.testing.assert_array_equal(read_image(path, 40), expected)


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png", "x.tif"])
def test_first_of_several_pictures_is_used(tmp_path: Path, name: str) -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    first, *others = (Image.new("RGB", (8, 8), colour) for colour in colours)
    one = read_picture(save(tmp_path / f"one-{name}", first), 8)
    options = {"save_all": True, "append_images": others}
    if name == "x.webp":
        options["lossless"] = True
    many = read_picture(save(tmp_path / name, first, **options), 8)
    assert (one.several, many.several) == (False, True)
    assert many.pixels[:, 4, 4].tolist() == [200, 0, 0]


FORMATS = ["png", "jpg", "tif", "bmp", "ppm", "gif", "webp", "jp2", "avif"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_too_many_pixels_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    options = {"progressive": True} if suffix == "jpg" else {}
    path = save(tmp_path / f"x.{suffix}", noise(), **options)
    assert read_image(path, 8).shape == (3, 8, 8)
    monkeypatch.setattr(image_reading, "DECODE_BYTES", 16 * 2399)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    reason = refusal(path)
    assert "60 x 40 pixels" in reason and "images of at most 0.0 million" in reason


def test_limits_that_are_documented() -> None:
    limits = {name: pixel_limit(name) for name in ("PNG", "WEBP", "HEIF", "JPEG2000")}
    assert limits == {
        "PNG": 67_108_864,
        "WEBP": 53_687_091,
        "HEIF": 53_687_091,
        "JPEG2000": 33_554_432,
    }
    # 16-bit samples beside the colours need more room.
    assert pixel_limit("TIFF", 20) == 53_687_091


@pytest.mark.parametrize("side", [13_000, 40_000])
@pytest.mark.parametrize("pillow_limit", [1000, None])
def test_bomb_names_file_size_and_limit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    side: int,
    pillow_limit: int | None,
) -> None:
    """The result must not depend on Pillow's limit, which other code may change."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    (tmp_path / "x.png").write_bytes(png(side, side, b"\0" * 3 * side))
    reason = refusal(tmp_path / "x.png")
    size = f"{side * side}" if pillow_limit else f"{side} x {side}"
    assert f"{size} pixels" in reason and "at most 67.1 million" in reason


def test_absurd_sides_are_refused(tmp_path: Path) -> None:
    assert read_image(save(tmp_path / "x.png", Image.new("L", (1, 65535))), 8).shape
    for size in ((1, 65536), (10**7, 1)):
        save(tmp_path / "x.png", Image.new("L", size))
        reason = refusal(tmp_path / "x.png")
        assert f"{size[0]} x {size[1]} pixels; a side of at most 65535" in reason
    (tmp_path / "x.png").write_bytes(png(0, 5, b"\0" * 5))
    assert refusal(tmp_path / "x.png") == "no image that is known"


def test_large_jpeg_is_decoded_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, columns = np.linspace(0, 255, 480)[:, None], np.linspace(255, 0, 640)
    picture = Image.fromarray(((rows + columns) / 2).astype(np.uint8)).convert("RGB")
    for options in ({}, {"progressive": True}):
        save(tmp_path / f"{len(options)}.jpg", picture, quality=95, **options)
    whole = read_image(tmp_path / "0.jpg", 32)
    # Room for a sixth of the pixels: a quarter is not small enough, the next scale is.
    monkeypatch.setattr(image_reading, "DECODE_BYTES", 16 * 480 * 640 // 6)
    decoded: list[tuple[int, int]] = []
    fit = ImageOps.fit

    def watched(image: Image.Image, *arguments: object) -> Image.Image:
        decoded.append(image.size)
        return fit(image, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageOps, "fit", watched)
    smaller = read_image(tmp_path / "0.jpg", 32)
    assert decoded == [(160, 120)]
    np.testing.assert_allclose(smaller, whole.astype(float), atol=3)
    # Its decoder keeps the whole image whatever the scale.
    assert "640 x 480 pixels" in refusal(tmp_path / "1.jpg")


def test_jpeg_of_several_scans_counts_as_kept_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one scan per component, the decoder must keep the whole image."""
    content = save(tmp_path / "x.jpg", noise(), subsampling=0).read_bytes()
    scan = content.index(b"\xff\xda\x00\x0c\x03")
    alone = b"\xff\xda\x00\x08\x01" + content[scan + 5 : scan + 7] + b"\x00\x3f\x00"
    (tmp_path / "x.jpg").write_bytes(content[:scan] + alone + content[scan + 14 :])
    monkeypatch.setattr(image_reading, "DECODE_BYTES", 16 * 1000)
    assert "60 x 40 pixels" in refusal(tmp_path / "x.jpg")


PEAK = """
import sys; from pathlib import Path
from PIL import Image
from clip2fl_common.data import image_reading
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if "VmHWM" in line)
image_reading.read_image(Path(sys.argv[1]), 32)
image_reading.DECODE_BYTES = int(sys.argv[3])
before = peak()
image_reading.read_image(Path(sys.argv[2]), 32)
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("x.png", "RGBA", {"compress_level": 1}),
        ("x.jpg", "CMYK", {"progressive": True, "subsampling": 0}),
        ("x.tif", "RGBA", {"compression": "tiff_lzw", "tiffinfo": {278: 10**5}}),
        ("x.webp", "RGBA", {"lossless": True, "quality": 0, "method": 0}),
        ("x.jp2", "RGBA", {}),
        ("x.avif", "RGBA", {"speed": 10, "subsampling": "4:4:4"}),
    ],
)
def test_peak_memory_of_the_largest_accepted_image(
    tmp_path: Path, name: str, mode: str, options: dict[str, object]
) -> None:
    """Bound and image are both reduced to a 32nd, so that the test is fast."""
    bound = 2**25
    format = Image.registered_extensions()[f".{name.split('.')[1]}"]
    side = int((pixel_limit(format) / 32) ** 0.5)
    save(tmp_path / name, noise(mode, (side, side)), **options)
    save(tmp_path / f"small-{name}", noise(mode), **options)
    done = subprocess.run(
        [
            *(sys.executable, "-c", PEAK, tmp_path / f"small-{name}"),
            *(tmp_path / name, str(bound)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    # Much of it is taken, so the bound is no idle one.
    assert bound / 3 < int(done.stdout) < bound + 2**23


def test_pillow_keeps_bounding_compressed_texts_and_profiles(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(30 * 2**20))
    for kind, start in ((b"zTXt", b"k\0\0"), (b"iCCP", b"p\0\0")):
        content = png(1, 1, bytes(4), chunks=png_chunk(kind, start + bomb))
        (tmp_path / "x.png").write_bytes(content)
        assert "too large" in refusal(tmp_path / "x.png").lower()


def test_file_that_is_mostly_no_pixels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_reading, "HEADER_BYTES", 2**16)
    blob = png_chunk(b"prIv", bytes(2**17))
    image = png(1, 1, bytes(4))
    for content in (png(1, 1, bytes(4), chunks=blob), image[:-12] + blob + image[-12:]):
        (tmp_path / "x.png").write_bytes(content)
        assert refusal(tmp_path / "x.png") == "it holds too much besides its pixels"


def overlapping_fields(count: int) -> bytes:
    """Return a TIFF block whose fields all refer to the same bytes."""
    data = bytes(2**14)
    return tiff([(50_000 + n, UNDEFINED, [len(data)]) for n in range(count)], data)


def exif_of_many_values() -> bytes:
    """Return an EXIF block whose resolution field has far too many values."""
    return tiff([(282, LONG, range(MAX_VALUES + 1))], b"")


def jpeg_with(exif: bytes) -> bytes:
    """Return a JPEG with an EXIF block, divided into as many segments as needed."""
    plain = io.BytesIO()
    noise().save(plain, "JPEG")
    pieces = [exif[n : n + 65000] for n in range(0, len(exif), 65000)]
    segments = b"".join(
        b"\xff\xe1" + struct.pack(">H", len(piece) + 8) + b"Exif\0\0" + piece
        for piece in pieces
    )
    # Without the JFIF segment Pillow reads the EXIF's resolution.
    return b"\xff\xd8" + segments + plain.getvalue()[20:]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.jpg", lambda: jpeg_with(overlapping_fields(400)), "overlap"),
        ("x.jpg", lambda: jpeg_with(exif_of_many_values()), "has 262145 values"),
        (
            "x.png",
            lambda: png(
                1, 1, bytes(4), chunks=png_chunk(b"eXIf", overlapping_fields(400))
            ),
            "overlap",
        ),
        ("x.tif", lambda: overlapping_fields(400), "overlap"),
        (
            "x.tif",
            lambda: tiff_image(
                8, 8, bytes(64), (8,), more=[(273, LONG, [8] * (MAX_VALUES + 1))]
            ),
            "has 262145 values",
        ),
        # One pixel in a tile of 1.2 GB.
        (
            "x.tif",
            lambda: tiff_image(
                1,
                1,
                bytes(64),
                (8,),
                more=[(322, LONG, [35_000]), (323, LONG, [35_000])],
            ),
            "1 x 1 pixels",
        ),
    ],
    ids=["jpeg overlap", "jpeg values", "png", "tiff overlap", "tiff strips", "tile"],
)
def test_header_that_would_fill_the_memory_is_refused(
    tmp_path: Path, name: str, content: Callable[[], bytes], reason: str
) -> None:
    (tmp_path / name).write_bytes(content())
    assert reason in refusal(tmp_path / name)


def test_damaged_exif_leaves_the_pixels(tmp_path: Path) -> None:
    """Fields that point outside the block are common, and are not an attack."""
    outside = struct.pack("<2sHLHHHLLL", b"II", 42, 8, 1, 37500, 7, 2**31, 2**20, 0)
    for exif in (b"no exif at all", outside):
        (tmp_path / "x.jpg").write_bytes(jpeg_with(exif))
        (tmp_path / "plain.jpg").write_bytes(jpeg_with(b""))
        np.testing.assert_array_equal(
            read_image(tmp_path / "x.jpg", 8), read_image(tmp_path / "plain.jpg", 8)
        )


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"8BPS\0\1"]
)
def test_formats_that_start_programs_are_not_opened(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "x.png").write_bytes(content + bytes(200))
    assert refusal(tmp_path / "x.png") == "no image that is known"


def test_reasons_are_plain(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("a letter")
    whole = save(tmp_path / "x.jpg", noise()).read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "nothing.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert refusal(tmp_path / "empty.png") == "the file is empty"
    assert refusal(tmp_path / "text.png") == "no image that is known"
    assert "truncated" in refusal(tmp_path / "half.jpg")
    assert refusal(tmp_path / "nothing.png") == "a link to a file that is not there"
    assert refusal(tmp_path / "loop.png") == "a link that leads back to itself"


@pytest.mark.parametrize(
    ("error", "reason", "lasting"),
    [
        (PermissionError(errno.EACCES, "denied"), "Permission denied", False),
        (OSError(errno.EIO, "disk"), "Input/output error", False),
        (MemoryError(), "decoding it needs more memory than there is", False),
        (OSError("damaged\x1b data"), "damaged\\x1b data", True),
        (struct.error(), "error", True),
    ],
)
def test_reasons_of_the_system_do_not_last(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    reason: str,
    lasting: bool,
) -> None:
    def fail(_: object) -> None:
        raise error

    path = save(tmp_path / "x.png", noise())
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(UnreadableImageError) as caught:
        read_image(path, 8)
    assert (caught.value.reason, caught.value.lasting) == (reason, lasting)


@pytest.mark.filterwarnings("error")
def test_warnings_of_pillow_are_no_errors(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4))
    image.info["transparency"] = bytes(16)
    assert read_image(save(tmp_path / "x.png", image), 4).shape == (3, 4, 4)
