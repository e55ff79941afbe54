"""Sources of a data set's images: memory, or files that are read on request."""

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
SCALED_AT_ONCE = 256


@dataclass(frozen=True)
class LoadedImages:
    """Images loaded from memory or disk.

    Attributes
    ----------
    images : Tensor of uint8, shape [N, 3, H, W]
        RGB images.
    labels : Tensor of int64, shape [N]
        Their classes.
    unreadable : tuple of str
        Files that could not be read.
    left_out : tuple of int
        Their positions among the indices that were asked for.
    """

    images: torch.Tensor
    labels: torch.Tensor
    unreadable: tuple[str, ...] = ()
    left_out: tuple[int, ...] = ()


class ImageSource(Protocol):
    """One split of a data set: labels in memory, images on request."""

    @property
    def labels(self) -> LabelArray:
        """Class of each image, shape [N]."""

    def load(self, indices: npt.NDArray[np.integer]) -> LoadedImages:
        """Return the images at these indices, in their order."""

    def open(self, indices: npt.NDArray[np.integer]) -> LoadedImages:
        """Return the same images for repeated use: decoded once, possibly on disk."""


def refuse_if_empty(loaded: LoadedImages) -> None:
    """Raise if there are files, and none of them can be read."""
    if loaded.unreadable and not len(loaded.labels):
        count = len(loaded.unreadable)
        raise DatasetError(
            f"none of {count} images can be read, so nothing is left: "
            f"{listed(loaded.unreadable)}",
            f"none of {count} images can be read",
        )


@dataclass(frozen=True)
class ArraySource:
    """Images held in memory, in the size in which they are stored.

    Attributes
    ----------
    images : Tensor of uint8, shape [N, 3, H, H]
        RGB images.
    labels : ndarray of int64, shape [N]
        Their classes.
    image_size : int
        Side in pixels to which images are scaled when they are loaded.
    """

    images: torch.Tensor
    labels: LabelArray
    image_size: int

    def load(self, indices: npt.NDArray[np.integer]) -> LoadedImages:
        """Return the images at these indices, in their order."""
        chosen = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        images = self.images[chosen]
        if images.shape[2] != self.image_size:
            images = _scaled(images, self.image_size)
        return LoadedImages(images, torch.from_numpy(self.labels)[chosen])

    open = load


def _scaled(images: torch.Tensor, size: int) -> torch.Tensor:
    """Scale some images at a time: torchvision computes in float32."""
    # Imported here, because the import takes more than a second.
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    mode = InterpolationMode.BICUBIC  # as image files and `clip2fl predict`
    scaled = images.new_empty(len(images), 3, size, size)
    parts = zip(images.split(SCALED_AT_ONCE), scaled.split(SCALED_AT_ONCE), strict=True)
    for few, result in parts:
        result[:] = resize(few, [size, size], mode, antialias=True)
    return scaled


@dataclass(frozen=True)
class FileSource:
    """Images that are read from files on request.

    Attributes
    ----------
    paths : tuple of Path
        N image files.
    labels : ndarray of int64, shape [N]
        Their classes.
    image_size : int
        Side in pixels: the shorter side is scaled to it, and the centre is kept.
    skip_unreadable : bool
        Skip unreadable files instead of raising an error.
    trained_on : tuple of Path
        For test images: the training images. When the first image is read, a warning
        names identical ones.
    """

    paths: tuple[Path, ...]
    labels: LabelArray
    image_size: int
    skip_unreadable: bool
    trained_on: tuple[Path, ...] = ()
    # Warnings that were already logged: a run loads the same images again and again.
    _said: set[str] = field(default_factory=set, repr=False, compare=False)

    def load(self, indices: npt.NDArray[np.integer]) -> LoadedImages:
        """Return the images at these indices, in their order; maybe none of them.

        Raises
        ------
        DatasetError
            If a file is unreadable and ``skip_unreadable`` is false. The message counts
            all unreadable files and names the first ones.
        """
        self._compare()
        paths = [self.paths[i] for i in indices]
        pixels = np.empty((len(paths), 3, self.image_size, self.image_size), np.uint8)
        refused: dict[int, str] = {}
        for position, decoded in enumerate(self._decode(paths)):
            if isinstance(decoded, Refusal):
                refused[position] = decoded.reason
            else:
                pixels[position - len(refused)] = decoded
        self._check(paths, refused)
        readable = torch.from_numpy(pixels[: len(paths) - len(refused)])
        return self._loaded(indices, paths, refused, readable)

    def open(self, indices: npt.NDArray[np.integer]) -> LoadedImages:
        """Return the images at these indices, decoded once and memory-mapped.

        Raises
        ------
        DatasetError
            As `load`, and if none of the files is readable.
        """
        self._compare()
        paths = [self.paths[i] for i in indices]
        stored = decoded_images(paths, self.image_size, self._decode(paths))
        if stored is None:
            loaded = self.load(indices)
        else:
            pixels, refused = stored
            self._check(paths, refused)
            loaded = self._loaded(indices, paths, refused, pixels)
        refuse_if_empty(loaded)
        return loaded

    def _decode(self, paths: Sequence[Path]) -> Iterator[DecodedImage]:
        """Yield the pixels of each file, or the reason why it is refused."""
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
        """Raise if unreadable files are not allowed; log those that are left out."""
        named = listed(f"{paths[n]} ({reason})" for n, reason in refused.items())
        if refused and not self.skip_unreadable:
            raise DatasetError(
                f"{len(refused)} of {len(paths)} images cannot be read: {named}; "
                "repair or convert them, or set dataset.skip-unreadable=true, with "
                "which a run may also be resumed; remove them only before a run",
                f"{len(refused)} of {len(paths)} images cannot be read",
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
        return LoadedImages(
            pixels, torch.from_numpy(labels), unreadable, tuple(refused)
        )

    def _compare(self) -> None:
        """Warn of test images that are also training images."""
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
