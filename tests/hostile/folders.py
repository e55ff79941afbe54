"""Folders of images that a site may turn out to have."""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tests.site_folders import write_site

Maker = Callable[[Path], None]

GOOD = {"circle": 6, "square": 5, "triangle": 4}
SUFFIXES = (
    *("jpg", "jpeg", "jfif", "png", "ppm", "pgm", "pbm", "bmp", "tif", "tiff"),
    *("webp", "gif", "avif", "jp2", "heic", "svg", "pdf", "dcm", "zip", "txt"),
)
FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000")
MODES = (
    *("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"),
    *("I", "I;16", "I;16B", "F"),
)
NAMES = (
    "new\nline",
    "\x1b[31mred",
    "right\u202eto-left",
    "zero\u200bwidth",
    "\u0441ircle",
    "-rf",
    " leading",
    "trailing ",
    "x" * 240,
    "._circle",
    ".hidden",
    "__MACOSX",
    "Thumbs.db",
    "con",
    "a'b\"c`d$e",
    "${HOME}",
    "%00",
    "circle ",
    "CIRCLE",
    "ci\u0301rcle",
)


def encoded(kind: str, size: tuple[int, int] = (40, 30)) -> bytes:
    """Return a small picture of a format."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3))
    Image.fromarray(pixels.astype(np.uint8)).save(stream, kind)
    return stream.getvalue()


def png_of(width: int, height: int, body: bytes = b"", more: bytes = b"") -> bytes:
    """Return a PNG that claims a size, whatever its pixels are."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checked = name + data
        return (
            struct.pack(">I", len(data))
            + checked
            + struct.pack(">I", zlib.crc32(checked))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + more
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )


def text_bomb(megabytes: int) -> bytes:
    """Return a PNG text chunk that unpacks to many megabytes."""
    data = b"Comment\x00\x00" + zlib.compress(bytes(megabytes * 2**20), 9)
    checked = b"zTXt" + data
    return (
        struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))
    )


def _file(name: str, content: bytes) -> Maker:
    def make(folder: Path) -> None:
        (folder / "circle" / name).write_bytes(content)

    return make


def _mode(mode: str, kind: str) -> Maker:
    def make(folder: Path) -> None:
        if mode in ("I;16", "I;16B"):
            deep = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)
            image = Image.fromarray(deep)
        elif mode in ("I", "F"):
            ramp = np.linspace(0, 1e6, 1200).reshape(30, 40)
            image = Image.fromarray(ramp.astype(np.int32 if mode == "I" else "f4"))
        else:
            image = Image.new("RGB", (40, 30), (200, 100, 50)).convert(
                "L" if mode in ("LA", "PA") else "RGB"
            )
            image = image.convert("RGBA") if mode == "PA" else image
            image = (
                image.convert("P").convert(mode)
                if mode == "PA"
                else (image if mode == "LAB" else image.convert(mode))
            )
        stream = io.BytesIO()
        try:
            image.save(stream, kind)
        except (OSError, ValueError, KeyError):
            stream.write(b"no such combination")
        (folder / "circle" / f"odd.{kind.lower()}").write_bytes(stream.getvalue())

    return make


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "circle" / "pipe.png")


def _socket(folder: Path) -> None:
    here = os.open(folder / "circle", os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{here}/s.png")
    finally:
        os.close(here)


def _link(target: str, name: str = "link.png") -> Maker:
    def make(folder: Path) -> None:
        (folder / "circle" / name).symlink_to(target.replace("{}", str(folder)))

    return make


def _folder_link(target: str) -> Maker:
    def make(folder: Path) -> None:
        (folder / "star").symlink_to(target.replace("{}", str(folder)))

    return make


def _folder(name: str) -> Maker:
    def make(folder: Path) -> None:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "1.png").write_bytes(encoded("PNG"))

    return make


def _raw_name(name: bytes) -> Maker:
    def make(folder: Path) -> None:
        place = os.fsencode(folder / "circle") + b"/" + name
        with open(place, "wb") as file:
            file.write(encoded("PNG"))

    return make


def _raw_folder(folder: Path) -> None:
    os.mkdir(os.fsencode(folder) + b"/caf\xe9")


def _nested(folder: Path) -> None:
    place = folder / "circle"
    for _ in range(100):
        place = place / "d"
        place.mkdir()
    (place / "deep.png").write_bytes(encoded("PNG"))


def _many(folder: Path) -> None:
    for number in range(3000):
        (folder / "circle" / f"{number}.txt").touch()


def _twins(folder: Path) -> None:
    _folder("a_b")(folder)
    _folder("a b")(folder)


def _frames(kind: str, count: int) -> Maker:
    def make(folder: Path) -> None:
        frames = [Image.new("RGB", (20, 20), (n % 255, 0, 0)) for n in range(count)]
        stream = io.BytesIO()
        frames[0].save(stream, kind, save_all=True, append_images=frames[1:])
        name = folder / "circle" / f"many.{kind.lower()}"
        name.write_bytes(stream.getvalue())

    return make


def _orientation(value: int) -> Maker:
    def make(folder: Path) -> None:
        image = Image.new("RGB", (40, 30))
        exif = image.getexif()
        exif[0x0112] = value
        image.save(folder / "circle" / "turned.jpg", exif=exif)

    return make


def _mutated(kind: str, seed: int) -> Maker:
    content = bytearray(encoded(kind))
    source = np.random.default_rng(seed)
    for _ in range(1 + seed % 5):
        content[int(source.integers(len(content)))] = int(source.integers(256))
    return _file(f"mutated.{kind.lower()}", bytes(content))


def _empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


def _closed(folder: Path) -> None:
    (folder / "circle").chmod(0)


def hostile_folders() -> Iterator[tuple[str, Maker]]:
    """Yield what makes an honest site's folder a hostile one, by name."""
    for kind in FORMATS:
        content = encoded(kind)
        for cut in (0, 1, 8, len(content) // 3, len(content) - 2):
            name = f"cut.{kind.lower().replace('jpeg2000', 'jp2')}"
            yield f"{kind} cut at {cut}", _file(name, content[:cut])
        for seed in range(6):
            yield f"{kind} mutated {seed}", _mutated(kind, seed)
    for suffix in SUFFIXES:
        yield f"noise.{suffix}", _file(f"noise.{suffix}", os.urandom(2000))
        yield f"wrong.{suffix}", _file(f"wrong.{suffix}", encoded("BMP"))
    for mode in MODES:
        for kind in ("PNG", "TIFF"):
            yield f"mode {mode} as {kind}", _mode(mode, kind)
    for width, height in (
        *((0, 0), (0, 10), (1, 10**7), (10**7, 1), (2**31 - 1, 2**31 - 1)),
        *((20_000, 20_000), (9_000, 9_000), (65_536, 65_536), (1, 1)),
    ):
        yield f"PNG of {width} x {height}", _file("large.png", png_of(width, height))
    body = bytes(8_000 * (8_000 * 3 + 1))
    yield "PNG of 64 megapixels", _file("bomb.png", png_of(8_000, 8_000, body))
    body = bytes(14_000 * (14_000 * 3 + 1))
    yield "PNG of 196 megapixels", _file("bomb.png", png_of(14_000, 14_000, body))
    for megabytes in (1, 64, 200):
        bomb = png_of(8, 8, bytes(8 * 25), text_bomb(megabytes))
        yield f"text of {megabytes} MiB", _file("text.png", bomb)
    for name in NAMES:
        yield f"file {name!r}", _file(f"{name}.png", encoded("PNG"))
        yield f"folder {name!r}", _folder(name)
    for number, raw in enumerate((b"caf\xe9.png", b"\xff\xfe.png", b"\x80\n.png")):
        yield f"undecodable name {number}", _raw_name(raw)
    yield "undecodable folder", _raw_folder
    for target in (
        *("{}/circle/link.png", "/nonexistent", "/dev/zero", "/dev/null", "/dev/tty"),
        *("{}", "/proc/self/mem", "/proc/kmsg", "..", "{}/square/0.png"),
    ):
        yield f"link to {target}", _link(target)
        yield f"folder link to {target}", _folder_link(target)
    for value in (0, 1, 5, 8, 9, 65535):
        yield f"orientation {value}", _orientation(value)
    for kind in ("GIF", "TIFF", "WEBP"):
        yield f"{kind} of 60 frames", _frames(kind, 60)
    yield "pipe", _fifo
    yield "socket", _socket
    yield "twins", _twins
    yield "nested", _nested
    yield "many files", _many
    yield "empty", _empty
    yield "closed", _closed


def honest_folder(folder: Path, first: int) -> Path:
    """Write what every case begins with."""
    return write_site(folder, GOOD, first)
