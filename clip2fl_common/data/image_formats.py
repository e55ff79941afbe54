"""Image formats: the suffixes of images, and whether this machine can read them.

The suffix of a file decides whether it is an image, its content how it is read.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, features

# Suffixes of each format, by Pillow's name of it.
SUFFIXES: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
}
IMAGE_SUFFIXES = tuple(suffix for group in SUFFIXES.values() for suffix in group)

# Features that a build of Pillow needs for formats that not every build reads.
_FEATURES = {
    "JPEG": "jpg",
    "PNG": "zlib",
    "WEBP": "webp",
    "JPEG2000": "jpg_2000",
    "AVIF": "avif",
}
_HEIF_PACKAGE = "pillow_heif"
INSTALL_HEIF = "install pillow-heif (make install, or pip install pillow-heif)"
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def suffix_of(name: str) -> str:
    """Return a name's suffix in lower case; empty if it has none."""
    return Path(name).suffix.lower()


@cache
def missing_decoder(suffix: str) -> str:
    """Return why this machine cannot read images of a suffix, and the remedy.

    Parameters
    ----------
    suffix : str
        One of `IMAGE_SUFFIXES`.

    Returns
    -------
    str
        Empty if the machine can read them.
    """
    (name,) = (name for name, group in SUFFIXES.items() if suffix in group)
    if name == "HEIF":
        return "" if find_spec(_HEIF_PACKAGE) else INSTALL_HEIF
    if name in _FEATURES and not features.check(_FEATURES[name]):
        return f"install a Pillow with {name}"
    return ""


def is_heif(start: bytes) -> bool:
    """Tell whether a file that starts with these bytes is a HEIC or HEIF image."""
    return start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS


@cache
def pillow_formats(heif: bool) -> tuple[str, ...]:
    """Return the formats that an image may have, whatever its suffix.

    Pillow knows more formats. For some of them it starts programs (PostScript) or reads
    other files.

    Parameters
    ----------
    heif : bool
        Include HEIF, if its package is installed.
    """
    Image.init()
    if heif and find_spec(_HEIF_PACKAGE):
        import_module(_HEIF_PACKAGE).register_heif_opener()
    wanted = tuple(SUFFIXES) if heif else tuple(n for n in SUFFIXES if n != "HEIF")
    return tuple(name for name in wanted if name in Image.OPEN)
