"""Draw image folders of unequal sizes for a demo: ``FOLDER/SITE/<class>/<image>``.

The images come from the built-in data set. A Dirichlet distribution divides the long
tail among the sites, so some sites lack some classes::

    python -m scripts.draw_sites /sites site-a site-b site-c site-d
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from clip2fl_common.data import demo
from clip2fl_common.partition import long_tail_counts

PER_CLASS = 300
IMBALANCE_FACTOR = 20.0
ALPHA = 0.5
SEED = 7


def draw_sites(folder: Path, sites: list[str]) -> dict[str, dict[str, int]]:
    """Write images for the sites that have none yet.

    Parameters
    ----------
    folder : Path
        Folder that receives one folder per site.
    sites : list of str
        Names of the sites; their order decides which images each site gets.

    Returns
    -------
    dict of str to dict of str to int
        Images of each class at each site.
    """
    classes = demo.CLASS_NAMES
    counts = long_tail_counts(PER_CLASS, len(classes), IMBALANCE_FACTOR)
    shares = np.random.default_rng(SEED).dirichlet([ALPHA] * len(sites), len(classes))
    held: dict[str, dict[str, int]] = {site: {} for site in sites}
    for label, (name, count) in enumerate(zip(classes, counts, strict=True)):
        ends = np.rint(shares[label].cumsum() * count).astype(int).tolist()
        for site, first, last in zip(sites, [0, *ends], ends, strict=False):
            if last > first:
                held[site][name] = last - first
                _write(folder / site / name, label, first, last - first)
    return held


def _write(place: Path, label: int, first: int, count: int) -> None:
    if place.exists():
        return
    place.mkdir(parents=True)
    for i, image in enumerate(demo.draw_images("train", label, count, first)):
        Image.fromarray(image.transpose(1, 2, 0)).save(place / f"{first + i}.png")


def main() -> None:
    """Draw the folders and print the number of images in each."""
    parser = argparse.ArgumentParser(description="Draw image folders for a demo.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("sites", nargs="+")
    options = parser.parse_args()
    for site, counts in draw_sites(options.folder, options.sites).items():
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        print(f"{site}: {sum(counts.values())} images ({listed})")


if __name__ == "__main__":
    main()
