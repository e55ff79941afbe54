"""Folders of drawn images, as sites have them."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from clip2fl_common.data import demo


def write_site(folder: Path, counts: Mapping[str, int], first: int = 0) -> Path:
    """Write PNGs of drawn shapes to ``<class>/<image>``.

    Parameters
    ----------
    folder : Path
        Made if need be.
    counts : mapping of str to int
        Images of each class, by the class's name.
    first : int
        Number of the first image; others draw others.

    Returns
    -------
    Path
        The folder.
    """
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        label = demo.CLASS_NAMES.index(name)
        for i, image in enumerate(demo.draw_images("train", label, count, first)):
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / name / f"{i}.png")
    return folder
