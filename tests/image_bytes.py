"""Image files written byte by byte, for what Pillow does not write."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# TIFF field types.
SHORT, LONG, UNDEFINED = 3, 4, 7
_SIZES = {SHORT: 2, LONG: 4, UNDEFINED: 1}
Field = tuple[int, int, Sequence[int]]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return one chunk of a PNG file."""
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(
    width: int,
    height: int,
    rows: bytes,
    depth: int = 8,
    colour: int = 2,
    chunks: bytes = b"",
) -> bytes:
    """Return a PNG file of rows that each start with a filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + chunks
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def png_of(samples: npt.NDArray[np.uint16]) -> bytes:
    """Return a 16-bit PNG of samples [H, W, 3]."""
    height, width, _ = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    return png(width, height, rows, depth=16)


def tiff(fields: Sequence[Field], data: bytes, order: str = "<") -> bytes:
    """Return a TIFF file; its pixels start at byte 8.

    Parameters
    ----------
    fields : sequence of (tag, type, values)
        A field of type UNDEFINED has one value: how many bytes of the file it is.
    data : bytes
        What stands at byte 8.
    order : {"<", ">"}
        Little or big endian.
    """
    start = 8 + len(data) + len(data) % 2
    extra = start + 2 + 12 * len(fields) + 4
    entries, outside = b"", b""
    for tag, kind, values in sorted(fields):
        code = {SHORT: "H", LONG: "L"}.get(kind)
        if code is None:
            entries += struct.pack(order + "HHLL", tag, kind, values[0], 8)
            continue
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        entries += struct.pack(order + "HHL", tag, kind, len(values))
        if len(packed) <= 4:
            entries += packed.ljust(4, b"\0")
        else:
            entries += struct.pack(order + "L", extra + len(outside))
            outside += packed
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return (
        magic
        + struct.pack(order + "L", start)
        + data.ljust(start - 8, b"\0")
        + struct.pack(order + "H", len(fields))
        + entries
        + struct.pack(order + "L", 0)
        + outside
    )


def tiff_image(
    width: int,
    height: int,
    data: bytes,
    bits: Sequence[int] = (16,),
    order: str = "<",
    more: Sequence[Field] = (),
) -> bytes:
    """Return an uncompressed TIFF image: grey, or RGB where there are three samples."""
    fields: list[Field] = [
        (256, SHORT, [width]),
        (257, SHORT, [height]),
        (258, SHORT, bits),
        (259, SHORT, [1]),
        (262, SHORT, [2 if len(bits) == 3 else 1]),
        (273, LONG, [8]),
        (277, SHORT, [len(bits)]),
        (278, SHORT, [height]),
        (279, LONG, [len(data)]),
    ]
    replaced = {tag for tag, _, _ in more}
    return tiff([f for f in fields if f[0] not in replaced] + [*more], data, order)
