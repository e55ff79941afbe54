"""Reading one image file as pixels, or refusing it with a reason, in bounded memory.

This module needs no torch, so that checking a folder is fast and takes little memory.
"""

import errno
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.Image import Transpose

from clip2fl_common.data.image_formats import (
    INSTALL_HEIF,
    SUFFIXES,
    is_heif,
    missing_decoder,
    pillow_formats,
)
from clip2fl_common.data.image_headers import Header, check_exif, check_header
from clip2fl_common.data.regular_files import BoundedReader, NotReadError, open_regular
from clip2fl_common.shown import shown

# Memory that decoding one image may take, besides the largest header.
DECODE_BYTES = 2**30
# Bytes of a file that may be read besides its pixels, such as profiles and thumbnails;
# WebP, AVIF and HEIF files are read as a whole and must be smaller.
HEADER_BYTES = 64 * 2**20
# Longest side. A longer one is no picture, and each row costs memory of its own.
MAX_SIDE = 65_535
# Largest number of bytes that decoding takes per pixel; measured if not counted.
_BYTES_PER_PIXEL = {"JPEG2000": 32, "WEBP": 20, "AVIF": 20, "HEIF": 20}
_OTHER_BYTES_PER_PIXEL = 16
# Scales at which a JPEG can be decoded, as divisors.
_JPEG_SCALES = (2, 4, 8)
# Number of rows of 16-bit pixels to scale at a time.
_PIXELS_AT_A_TIME = 2**20
# TIFF fields.
_TILE_WIDTH, _TILE_LENGTH, _BITS, _PHOTOMETRIC = 322, 323, 258, 262
# EXIF orientations, and the operation that undoes each.
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_KINDS = {
    "1": "black and white",
    "L": "8-bit grey",
    "LA": "8-bit grey with transparency",
    "P": "palette",
    "PA": "palette with transparency",
    "RGB": "8-bit RGB",
    "RGBA": "8-bit RGB with transparency",
    "CMYK": "8-bit CMYK",
}
# Errors that remain while the file does not change: faults of its content, or no file.
_LASTING = {None, errno.ENOENT, errno.ELOOP}
_CONVERT = "convert it to 8 or 16 bit first"


class UnreadableImageError(ValueError):
    """An image file that cannot be used.

    Parameters
    ----------
    path : Path
        The file.
    reason : str
        The reason and the remedy, without names from the disk.
    lasting : bool
        Whether the reason is the file's content or permissions. Otherwise it is the
        system, and another attempt may succeed with the same file.
    """

    def __init__(self, path: Path, reason: str, lasting: bool = True):
        super().__init__(f"{shown(path)}: {reason}")
        self.reason = reason
        self.lasting = lasting


@dataclass(frozen=True)
class Picture:
    """A decoded image.

    Attributes
    ----------
    pixels : ndarray of uint8, shape [3, size, size]
        RGB, upright.
    kind : str
        Kind of the pixels in the file, such as ``16-bit grey``.
    scaled : bool
        Whether the file's values had more than 8 bits and were scaled.
    several : bool
        Whether the file has more pictures (pages, an animation); this is the first.
    """

    pixels: npt.NDArray[np.uint8]
    kind: str
    scaled: bool
    several: bool


def read_image(path: Path, size: int) -> npt.NDArray[np.uint8]:
    """Read the centre square of one image as upright RGB, scaled to ``size``.

    Parameters
    ----------
    path : Path
        A file with any of the formats in `clip2fl_common.data.image_formats`.
    size : int
        Side in pixels.

    Returns
    -------
    ndarray of uint8, shape [3, size, size]

    Raises
    ------
    UnreadableImageError
        If the file is no image, damaged, too large, or has no range of 8-bit colours.
    """
    return read_picture(path, size).pixels


def read_picture(path: Path, size: int) -> Picture:
    """Read one image and the facts about its file; see `read_image`.

    Takes at most 1 GiB of memory besides the program's own, and up to half of that more
    if the file contains much besides pixels.
    """
    try:
        with open_regular(path) as file, warnings.catch_warnings():
            # An error reports what is wrong with a file. Pillow's warnings also report
            # faults that Pillow corrects.
            warnings.simplefilter("ignore")
            return _read(file, path, size)
    except MemoryError:
        raise UnreadableImageError(
            path, "decoding it needs more memory than there is", lasting=False
        ) from None
    # Pillow raises nearly every type of error for damaged files.
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        # The right to read a file is a part of the cache's key, as the file's size is.
        lasting = code in _LASTING or not os.access(path, os.R_OK)
        raise UnreadableImageError(path, _reason(path, error), lasting) from error


def pixel_limit(format: str | None, bytes_per_pixel: float = 0) -> int:
    """Return the largest number of pixels that an image of a format may have."""
    known = _BYTES_PER_PIXEL.get(format or "", _OTHER_BYTES_PER_PIXEL)
    return int(DECODE_BYTES / max(known, bytes_per_pixel))


def _read(file: BoundedReader, path: Path, size: int) -> Picture:
    file.allow(HEADER_BYTES)
    header = check_header(file)
    file.allow(HEADER_BYTES)
    file.seek(0)
    heif = path.suffix.lower() in SUFFIXES["HEIF"] or is_heif(file.read(12))
    with Image.open(file, formats=pillow_formats(heif)) as image:
        _bound_size(image, header)
        file.allow(HEADER_BYTES + 8 * image.width * image.height)
        # A multi-picture JPEG is one photograph with variants.
        several = header.pages or (
            image.format not in ("TIFF", "MPO")
            and bool(getattr(image, "is_animated", False))
        )
        depth = _depth(image, file)
        image.load()
        mode = image.mode
        pixels = square_pixels(image, size)
    return Picture(pixels, _kind(mode, depth), depth > 8, several)


def square_pixels(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """Return the centre square of a loaded image as upright RGB, scaled to ``size``.

    Parameters
    ----------
    image : Image
        An image of any mode.
    size : int
        Side in pixels.

    Returns
    -------
    ndarray of uint8, shape [3, size, size]

    Raises
    ------
    NotReadError
        As `to_rgb`, or if its EXIF block is too large.
    """
    orientation = _orientation(image)
    small = to_rgb(image)
    if small.size != (size, size):
        small = ImageOps.fit(small, (size, size), Image.Resampling.BICUBIC)
    # Rotated last: the centre square is the same, and no large image is copied.
    if orientation in _UPRIGHT:
        small = small.transpose(_UPRIGHT[orientation])
    return np.asarray(small).transpose(2, 0, 1)


def _bound_size(image: Image.Image, header: Header) -> None:
    """Refuse an image too large to decode; have a large JPEG decoded smaller."""
    width, height = image.size
    fields = _tiff_fields(image)
    bits = fields.get(_BITS, ())
    limit = pixel_limit(image.format, 8 + sum(bits) / 8)
    if max(width, height) > MAX_SIDE:
        raise NotReadError(
            f"it has {width} x {height} pixels; a side of at most {MAX_SIDE} is read"
        )
    # A tile of a TIFF file can be larger than its image.
    tile = fields.get(_TILE_WIDTH, 0) * fields.get(_TILE_LENGTH, 0)
    if width * height <= limit and tile <= limit:
        return
    if image.format in ("JPEG", "MPO") and not header.buffered:
        for scale in _JPEG_SCALES:
            if (width // scale + 1) * (height // scale + 1) <= limit:
                image.draft(None, (width // scale, height // scale))
                return
    raise NotReadError(_too_large(f"{width} x {height}", image.format, limit))


def _too_large(pixels: str, format: str | None, limit: int) -> str:
    return (
        f"it has {pixels} pixels; {format or ''}{' ' * bool(format)}images of at most "
        f"{limit / 1e6:.1f} million are decoded: make it smaller"
    )


def _depth(image: Image.Image, file: BoundedReader) -> int:
    """Return the bits per channel of a file that is opened and not yet loaded."""
    if image.format == "PNG":
        return os.pread(file.fileno(), 1, 24)[0]
    if image.format == "TIFF":
        return int(max(_tiff_fields(image).get(_BITS, (1,))))
    return 16 if image.mode.startswith("I") else 8


def _tiff_fields(image: Image.Image) -> Mapping[int, Any]:
    """Return the fields of a TIFF file; empty for other files."""
    return getattr(image, "tag_v2", {})


def _orientation(image: Image.Image) -> object:
    """Return the EXIF orientation; None if the EXIF is absent or damaged."""
    try:
        check_exif(_exif(image))
        return image.getexif().get(ExifTags.Base.Orientation)
    except (NotReadError, MemoryError):
        raise
    except Exception:  # Pillow raises nearly everything; the pixels are good
        return None


def _exif(image: Image.Image) -> bytes:
    """Return the EXIF block that Pillow would read."""
    block = image.info.get("exif")
    if block is None and (text := image.info.get("Raw profile type exif")):
        block = bytes.fromhex("".join(text.split("\n")[3:]))  # ImageMagick's PNGs
    return block or b""


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as 8-bit RGB.

    Transparency is dropped: a pixel keeps the colour that is stored for it.

    Parameters
    ----------
    image : Image
        Loaded, of any mode.

    Raises
    ------
    NotReadError
        If the values have no known range: 32-bit integers and floating-point numbers.
    """
    fields = _tiff_fields(image)
    # Pillow opens 16-bit grey PGM, and in some versions 16-bit PNG, as 32-bit images.
    if image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in ("PNG", "PPM")
    ):
        bits = fields.get(_BITS, (16,))[0]
        grey = _eight_bit(image, 2**bits - 1)
        # Pillow does not invert this kind of file, but does so for 8-bit files.
        return ImageOps.invert(grey) if fields.get(_PHOTOMETRIC, 1) == 0 else grey
    if image.mode == "I":
        raise NotReadError(f"it is grey of 32 or signed 16 bits; {_CONVERT}")
    if image.mode == "F":
        raise NotReadError(f"it holds floating-point numbers; {_CONVERT}")
    if image.mode == "La":  # premultiplied; Pillow goes no straight way to RGB
        image = image.convert("LA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bit(image: Image.Image, largest: int) -> Image.Image:
    """Return grey values from 0 to ``largest`` as RGB from 0 to 255, rounded."""
    scaled = Image.new("L", image.size)
    rows = max(1, _PIXELS_AT_A_TIME // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        values = np.asarray(image.crop(box)).astype(np.int64)
        rounded = (values * 255 + largest // 2) // largest
        scaled.paste(Image.fromarray(rounded.astype(np.uint8)), box)
    return scaled.convert("RGB")


def _kind(mode: str, depth: int) -> str:
    if depth <= 8:
        return _KINDS.get(mode, mode)
    return f"{depth}-bit {'grey' if mode.startswith('I') else mode}"


def _reason(path: Path, error: Exception) -> str:
    """Return an error in words that people without knowledge of Pillow understand."""
    if isinstance(error, NotReadError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        if path.is_symlink() and error.errno == errno.ENOENT:
            return "a link to a file that is not there"
        if error.errno == errno.ELOOP:
            return "a link that leads back to itself"
        return os.strerror(error.errno)
    if isinstance(error, Image.DecompressionBombError):
        # Pillow raises this when it opens a file, before this program's own limit.
        pixels = "".join(filter(str.isdigit, str(error).partition("pixels")[0]))
        return _too_large(pixels or "too many", None, pixel_limit(None))
    if isinstance(error, UnidentifiedImageError):
        return _unidentified(path)
    lines = str(error).splitlines()
    return shown(lines[0]) if lines else type(error).__name__


def _unidentified(path: Path) -> str:
    try:
        with open_regular(path) as file:
            heif = is_heif(file.read(12))
    except OSError:
        heif = False
    if heif and missing_decoder(".heic"):
        return f"a HEIC image; {INSTALL_HEIF}"
    return "no image that is known"
