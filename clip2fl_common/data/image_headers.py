"""Checks of a file's header, made before Pillow reads the file.

Pillow keeps every field of a TIFF directory, and EXIF is one. A small file can claim
millions of values, or refer to the same bytes again and again, and fill the memory.
"""

import io
import struct
from dataclasses import dataclass
from typing import BinaryIO

from PIL import JpegImagePlugin

from clip2fl_common.data.regular_files import NotReadError

# Limit on the values of one field, far above a real image's: TIFF lists one per strip.
MAX_VALUES = 2**18
# Bytes of a field's value by its type; text and raw bytes are kept as they are.
_RAW_TYPES = {1: 1, 2: 1, 6: 1, 7: 1}
_NUMBER_TYPES = {
    **{3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8},
    **{13: 4, 16: 8, 17: 8, 18: 8},
}
_EXIF, _MULTI_PICTURE = b"Exif\0\0", b"MPF\0"
_START_OF_SCAN = 0xFFDA
# Frame headers of JPEGs that must be decoded as a whole: progressive ones.
_PROGRESSIVE = {0xFFC2, 0xFFC6, 0xFFCA, 0xFFCE}
_FRAMES = {*range(0xFFC0, 0xFFD0)} - {0xFFC4, 0xFFC8, 0xFFCC}


@dataclass(frozen=True)
class Header:
    """The facts of a header that matter before the image is opened.

    Attributes
    ----------
    pages : bool
        Whether it is a TIFF file with several pages.
    buffered : bool
        Whether it is a JPEG whose decoder keeps all coefficients, regardless of the
        requested size.
    """

    pages: bool = False
    buffered: bool = False


def check_header(file: BinaryIO) -> Header:
    """Check the header of an image file.

    Parameters
    ----------
    file : file object
        The file; its position afterwards is undefined.

    Returns
    -------
    Header

    Raises
    ------
    NotReadError
        If a TIFF directory or EXIF block claims far too many values or bytes.
    """
    start = file.read(16)
    if start[:2] in (b"II", b"MM"):
        return Header(pages=check_directory(file))
    if start[:3] == b"\xff\xd8\xff":
        return Header(buffered=_check_jpeg(file))
    return Header()


def check_exif(block: bytes) -> None:
    """Check an EXIF block as it is stored in an image.

    Raises
    ------
    NotReadError
        If it claims far too many values or bytes.
    """
    while block.startswith(_EXIF):
        block = block[len(_EXIF) :]
    if block[:2] in (b"II", b"MM"):
        check_directory(io.BytesIO(block))


def check_directory(file: BinaryIO) -> bool:
    """Check the first directory of a TIFF file, or of a block of the same structure.

    Fields whose values are missing are accepted, since Pillow skips them.

    Parameters
    ----------
    file : file object
        Starts with the TIFF header.

    Returns
    -------
    bool
        Whether another directory follows.

    Raises
    ------
    NotReadError
        If a field has more than 262,144 values, or all fields together have more than
        twice the bytes of the file.
    """
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(16)
    order = ">" if start[:2] == b"MM" else "<"
    big = len(start) > 2 and start[2] == 43  # BigTIFF, as Pillow decides it
    count_, entry_, offset_ = ("Q", "HHQQ", "Q") if big else ("H", "HHLL", "L")
    total = 0
    try:
        (offset,) = struct.unpack_from(order + offset_, start, 8 if big else 4)
        file.seek(offset)
        (fields,) = _unpack(file, order + count_)
        for _ in range(min(fields, 2**16)):
            _, kind, count, place = _unpack(file, order + entry_)
            size = count * (_RAW_TYPES.get(kind) or _NUMBER_TYPES.get(kind, 0))
            # A small value is stored in place of its address.
            if size <= struct.calcsize(order + offset_) or place + size > length:
                continue
            total += size
            if kind in _NUMBER_TYPES and count > MAX_VALUES:
                raise NotReadError(f"a field of its header has {count} values")
            if total > 2 * length + 2**16:
                raise NotReadError("the fields of its header overlap")
        (following,) = _unpack(file, order + offset_)
    except (struct.error, OverflowError, ValueError):
        return False  # cut off or invalid: Pillow reports the error
    return bool(following)


def _unpack(file: BinaryIO, layout: str) -> tuple[int, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _check_jpeg(file: BinaryIO) -> bool:
    """Check the EXIF of a JPEG file; return whether it must be decoded as a whole."""
    exif = b""
    progressive, components = False, 0
    file.seek(2)
    while byte := file.read(1):
        if byte != b"\xff":
            continue
        while (byte := file.read(1)) == b"\xff":
            pass
        marker = 0xFF00 + (byte[0] if byte else 0)
        # Pillow's table of markers tells which of them are followed by a segment.
        _, _, handler = JpegImagePlugin.MARKER.get(marker, ("", "", None))
        if handler is None:
            continue
        size = int.from_bytes(file.read(2), "big") - 2
        if marker in _FRAMES:
            frame = file.read(max(size, 0))
            progressive, components = marker in _PROGRESSIVE, max(frame[5:6], default=0)
        elif marker == _START_OF_SCAN:
            in_scan = max(file.read(1), default=0)
            break
        elif marker in (0xFFE1, 0xFFE2):
            segment = file.read(max(size, 0))
            if segment.startswith(_EXIF):
                # Pillow joins several EXIF segments.
                exif += segment[len(_EXIF) :]
            elif segment.startswith(_MULTI_PICTURE):
                check_exif(segment[len(_MULTI_PICTURE) :])
        else:
            file.seek(max(size, 0), io.SEEK_CUR)
    else:
        in_scan = 0
    check_exif(exif)
    return progressive or in_scan < components
