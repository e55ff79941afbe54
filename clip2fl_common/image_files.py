"""Image files in class folders: what is there, and how one becomes pixels.

Needs no torch, so that checking a folder costs neither its seconds nor its memory.
"""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
)
# What Pillow raises for files that are no image, damaged, or absurdly large.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class DatasetError(ValueError):
    """The images are not where, or not what, the configuration says.

    Parameters
    ----------
    message : str
        Names folders and files, for those who may see them.
    summary : str
        The same without names from the disk, for those who may not.
    """

    def __init__(self, message: str, summary: str = "the images are not usable"):
        super().__init__(message)
        self.summary = summary


def class_name(text: str) -> str:
    """Return a folder's or listed name as it stands in the teacher's prompt.

    Systems write accents in two ways; both become the same name.
    """
    return unicodedata.normalize("NFC", text.strip()).replace("_", " ")


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder that are not hidden, sorted by name."""
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )


def image_files(folder: Path) -> list[Path]:
    """Return the files in a folder that are images by their name, sorted."""
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES
    )


def site_files(folder: Path, known: Sequence[str]) -> list[tuple[Path, int]]:
    """Return the images ``<class>/<image>`` of a site and their classes.

    Parameters
    ----------
    folder : Path
        The site's own folder; it may hold any of the classes.
    known : sequence of str
        The run's classes.

    Returns
    -------
    list of tuple of Path and int
        File and class, ordered by both.

    Raises
    ------
    DatasetError
        If the folder is not there, has no image, or a folder that is no class.
    """
    if not folder.is_dir():
        raise DatasetError(
            f"data-path = {folder} is not a folder that this node can see; it must "
            "hold <class>/<image>",
            "the data folder is not there",
        )
    labels = {name: label for label, name in enumerate(known)}
    folders = subfolders(folder)
    if unknown := [f.name for f in folders if class_name(f.name) not in labels]:
        raise DatasetError(
            f"{folder} has folders that are no class of the run: "
            f"{', '.join(unknown)}; known classes: {', '.join(known)}. Rename or move "
            "them, or add them to dataset.class-names",
            f"{len(unknown)} folders are no class of the run",
        )
    found = sorted(
        (labels[class_name(place.name)], path)
        for place in folders
        for path in image_files(place)
    )
    if not found:
        raise DatasetError(
            f"{folder} has no image in a class folder; it must hold <class>/<image> "
            f"({', '.join(IMAGE_SUFFIXES)}), with classes from {', '.join(known)}",
            "the data folder has no image",
        )
    return [(path, label) for label, path in found]


def read_image(path: Path, size: int) -> npt.NDArray[np.uint8]:
    """Read one image as RGB, upright, its centre square brought to ``size``.

    Parameters
    ----------
    path : Path
        Any format that Pillow reads.
    size : int
        Side in pixels.

    Returns
    -------
    ndarray of uint8, shape [3, size, size]
    """
    with Image.open(path) as image:
        image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        small = image.convert("RGB")
    if small.size != (size, size):
        small = ImageOps.fit(small, (size, size), Image.Resampling.BICUBIC)
    # Turned last: the centre square is the same, and a large image is not copied.
    if orientation is not None:
        small.getexif()[ExifTags.Base.Orientation] = orientation
        small = ImageOps.exif_transpose(small)
    return np.asarray(small).transpose(2, 0, 1)
