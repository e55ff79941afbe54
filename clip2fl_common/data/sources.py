"""Where a data set's images come from: memory, or files read when asked for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from clip2fl_common.data.image_cache import (
    DecodedImage,
    Refusal,
    decoded_images,
    identical_files,
)
from clip2fl_common.data.image_files import DatasetError
from clip2fl_common.data.image_reading import UnreadableImageError, read_picture
from clip2fl_common.shown import listed, shown

logger = getLogger(__name__)

LabelArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LoadedImages:
    """Images as they came from memory or disk.

    Attributes
    ----------
    images : Tensor of uint8, shape [N, 3, H, W]
        RGB images.
    labels : Tensor of int64, shape [N]
        Their classes.
    unreadable : tuple of str
        Files that were left out.
    """

    images: torch.Tensor
    labels: torch.Tensor
    unreadable: tuple[str, ...] = ()


class ImageSource(Protocol):
    """One split of a data set: labels at hand, images on demand."""

    @property
    def labels(self) -> LabelArray:
        """Class of each image, shape [N]."""

    def load(self, indices: npt.NDArray[np.integer]) -> LoadedImages:
        """Return the images at these indices, in their order."""

    def open(self, indices: npt.NDArray[np.integer]) -> LoadedImages:
        """Return the same, for use again and again: decoded once, maybe on disk."""


@dataclass(frozen=True)
class ArraySource:
    """Images held in memory.

    Attributes
    ----------
    images : Tensor of uint8, shape [N, 3, H, W]
        RGB images.
    labels : ndarray of int64, shape [N]
        Their classes.
    """

    images: torch.Tensor
    labels: LabelArray

    def load(self, indices: npt.NDArray[np.integer]) -> LoadedImages:
        """Return the images at these indices, in their order."""
        chosen = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        return LoadedImages(self.images[chosen], torch.from_numpy(self.labels)[chosen])

    open = load


@dataclass(frozen=True)
class FileSource:
    """Images read from files when they are asked for.

    Attributes
    ----------
    paths : tuple of Path
        N image files.
    labels : ndarray of int64, shape [N]
        Their classes.
    image_size : int
        Side in pixels: the shorter side is brought to it, the centre is kept.
    skip_unreadable : bool
        Leave out unreadable files instead of raising.
    trained_on : tuple of Path
        Of test images: the training images. Identical ones are warned of when the
        first image is asked for.
    """

    paths: tuple[Path, ...]
    labels: LabelArray
    image_size: int
    skip_unreadable: bool
    trained_on: tuple[Path, ...] = ()
    # What was said already: a run loads the same images again and again.
    _said: set[str] = field(default_factory=set, repr=False, compare=False)

    def load(self, indices: npt.NDArray[np.integer]) -> LoadedImages:
        """Return the images at these indices, in their order.

        Raises
        ------
        DatasetError
            If a file is unreadable and unreadable files are not to be left out, or
            nothing is left without them. All are counted, the first are named.
        """
        self._compare()
        paths = [self.paths[i] for i in indices]
        pixels: list[npt.NDArray[np.uint8]] = []
        refused: dict[int, str] = {}
        for position, decoded in enumerate(self._decode(paths)):
            if isinstance(decoded, Refusal):
                refused[position] = decoded.reason
            else:
                pixels.append(decoded)
        self._check(paths, refused)
        return self._loaded(indices, paths, refused, torch.from_numpy(np.stack(pixels)))

    def open(self, indices: npt.NDArray[np.integer]) -> LoadedImages:
        """Return the images at these indices, decoded once and memory-mapped.

        Raises
        ------
        DatasetError
            As `load`.
        """
        self._compare()
        paths = [self.paths[i] for i in indices]
        stored = decoded_images(paths, self.image_size, self._decode(paths))
        if stored is None:
            return self.load(indices)
        pixels, refused = stored
        self._check(paths, refused)
        return self._loaded(indices, paths, refused, pixels)

    def _decode(self, paths: Sequence[Path]) -> Iterator[DecodedImage]:
        """Yield the pixels of each file, or why there are none."""
        for path in paths:
            try:
                picture = read_picture(path, self.image_size)
            except UnreadableImageError as error:
                yield Refusal(error.reason, error.lasting)
                continue
            if picture.several:
                self._say_once(
                    "several",
                    f"{shown(path)} holds several pictures (pages, an animation), "
                    "maybe others too: of each the first is used",
                )
            yield picture.pixels

    def _check(self, paths: Sequence[Path], refused: Mapping[int, str]) -> None:
        """Raise if files were unreadable that must not be, or if nothing is left."""
        named = listed(f"{paths[n]} ({reason})" for n, reason in refused.items())
        if refused and not self.skip_unreadable:
            raise DatasetError(
                f"{len(refused)} of {len(paths)} images cannot be read: {named}; "
                "repair, convert or remove them, or set dataset.skip-unreadable=true",
                f"{len(refused)} of {len(paths)} images cannot be read",
            )
        if len(refused) == len(paths):
            raise DatasetError(
                f"none of {len(paths)} images can be read, so nothing is left: {named}",
                f"none of {len(paths)} images can be read",
            )
        if refused:
            self._say_once(
                f"unreadable: {named}",
                f"left out {len(refused)} of {len(paths)} images that cannot be read: "
                f"{named}",
            )

    def _loaded(
        self,
        indices: npt.NDArray[np.integer],
        paths: Sequence[Path],
        refused: Mapping[int, str],
        pixels: torch.Tensor,
    ) -> LoadedImages:
        there = [n for n in range(len(paths)) if n not in refused]
        labels = self.labels[np.asarray(indices)[there]]
        unreadable = tuple(shown(paths[n]) for n in refused)
        return LoadedImages(pixels, torch.from_numpy(labels), unreadable)

    def _compare(self) -> None:
        """Warn of images that are also trained on."""
        if not self.trained_on or "compared" in self._said:
            return
        self._said.add("compared")
        if same := identical_files(self.paths, self.trained_on):
            named = listed(f"{path} = {other}" for path, other in same)
            logger.warning(
                "%d of %d test images are also training images, so the accuracy is "
                "too good: %s",
                len(same),
                len(self.paths),
                named,
            )

    def _say_once(self, key: str, message: str) -> None:
        if key not in self._said:
            self._said.add(key)
            logger.warning("%s", message)
