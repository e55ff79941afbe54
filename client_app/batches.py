"""The batches of one client's training in one round.

All random numbers are drawn before the first step, in the order in which the steps need
them. On a CPU, batches are made one by one. On a GPU, many are made at once, as small
operations cost as much there as large ones, and no step waits for the host.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from client_app.augmentation import Crops, draw_crops

# Bytes of normalised images that are made at once on a GPU.
AT_ONCE_BYTES = 64 * 2**20


class Images(Protocol):
    """Normalised images [N, 3, H, W]: a tensor, or an object that makes batches."""

    @property
    def device(self) -> torch.device:
        """Return the device of the batches."""

    def __len__(self) -> int:
        """Return the number of images N."""

    def __getitem__(self, indices: torch.Tensor, /) -> torch.Tensor:
        """Return the images at these indices."""


@dataclass(frozen=True)
class PixelImages:
    """Images kept as pixels and normalised batch by batch.

    Pixels take a quarter of the memory of normalised images, and may be memory-mapped.

    Attributes
    ----------
    pixels : Tensor of uint8, shape [N, 3, H, W]
        RGB images.
    normalize : callable
        Converts uint8 images to normalised float images (`datasets.Normalization`).
    device : torch.device
        Device of the batches.
    """

    pixels: torch.Tensor
    normalize: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device

    def __len__(self) -> int:
        """Return the number of images N."""
        return len(self.pixels)

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the normalised images at these indices."""
        chosen = self.pixels[indices.to(self.pixels.device)]
        return self.normalize(chosen.to(self.device))


class Views(Protocol):
    """Augmented pictures of the images, with the teacher's logits of each picture."""

    def batch(
        self, epoch: int, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return normalised pictures [n, 3, H, W] and logits [n, C] of the images."""

    def mixture(
        self, epoch: int, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return which images are mixed in [n], and the shares of the first [n].

        None where the pictures are not mixed.
        """


class Batch(NamedTuple):
    """Data of one step, or of several, on the device of the model.

    Attributes
    ----------
    images : Tensor, shape [n, 3, H, W]
        Normalised and augmented pictures.
    labels : Tensor of int64, shape [n]
        Their classes.
    taught : Tensor or None, shape [n, C]
        The teacher's logits.
    others, shares : Tensor or None, shape [n]
        Mixed pictures: class of the image that is mixed in, and share of the first.
    """

    images: torch.Tensor
    labels: torch.Tensor
    taught: torch.Tensor | None = None
    others: torch.Tensor | None = None
    shares: torch.Tensor | None = None

    def part(self, start: int, end: int) -> "Batch":
        """Return the pictures from ``start`` to before ``end``."""
        return Batch(*(None if t is None else t[start:end] for t in self))  # type: ignore[arg-type]


class Batches:
    """Batches of a client's images in new random orders, one order an epoch.

    Parameters
    ----------
    images : Images, N of them
        The client's normalised images.
    labels : Tensor of int64, shape [N]
        Their classes.
    teacher_logits : Tensor or None, shape [N, C]
        The teacher's logits for the un-augmented images.
    views : Views or None
        Pictures in place of the images with a crop and a flip.
    epochs, batch_size : int
        Number of orders, and images in a batch; an epoch's last one may be smaller.
    padding : int
        Zero pixels around an image before its crop.
    generator : torch.Generator
        CPU generator of orders, crops and flips.
    per_image : bool
        Draw crop and flip for each image instead of each batch.
    """

    def __init__(
        self,
        images: Images,
        labels: torch.Tensor,
        teacher_logits: torch.Tensor | None,
        views: Views | None,
        *,
        epochs: int,
        batch_size: int,
        padding: int,
        generator: torch.Generator,
        per_image: bool,
    ) -> None:
        self._images, self._labels = images, labels
        self._teacher_logits, self._views = teacher_logits, views
        self._size, self._padding = batch_size, padding
        orders = []
        self._crops: list[tuple[Crops, int]] = []
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            orders.append(order)
            for batch in order.split(batch_size) if views is None else ():
                drawn = draw_crops(len(batch), padding, generator, per_image=per_image)
                self._crops.append((drawn, len(batch)))
        self._order = torch.stack(orders)
        # One copy for all steps: each copy to a GPU waits until it has nothing to do.
        self._placed = self._order.to(images.device)

    def one_by_one(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, from 0; each is made when it is needed."""
        number = len(self._images)
        crops = iter(self._crops[epoch * -(-number // self._size) :])
        for start in range(0, number, self._size):
            crop = next(crops)[0] if self._crops else None
            yield self._made(epoch, start, start + self._size, crop)

    def many_at_once(self) -> Iterator[Iterator[Batch]]:
        """Yield for each epoch an iterator over the same batches, made many at once."""
        number, device = len(self._images), self._images.device
        crops = Crops.joined(self._crops, device) if self._crops else None
        image_bytes = self._images[self._placed[0, :1]].nbytes
        batches = max(1, AT_ONCE_BYTES // (image_bytes * self._size))
        for epoch in range(len(self._order)):
            yield self._cut(epoch, number, batches * self._size, crops)

    def _cut(
        self, epoch: int, number: int, at_once: int, crops: Crops | None
    ) -> Iterator[Batch]:
        """Yield an epoch's batches, ``at_once`` images of which are made at once."""
        for start in range(0, number, at_once):
            end = min(start + at_once, number)
            first = epoch * number
            made = self._made(
                epoch, start, end, crops and crops.part(first + start, first + end)
            )
            for place in range(0, end - start, self._size):
                yield made.part(place, place + self._size)

    def _made(self, epoch: int, start: int, end: int, crops: Crops | None) -> Batch:
        """Return the pictures at some places of an epoch's order."""
        chosen = self._placed[epoch, start:end]
        labels = self._labels[chosen]
        if self._views is None:
            assert crops is not None
            return Batch(
                crops(self._images[chosen], self._padding),
                labels,
                None if self._teacher_logits is None else self._teacher_logits[chosen],
            )
        indices = self._order[epoch, start:end]
        images, taught = self._views.batch(epoch, indices)
        mixture = self._views.mixture(epoch, indices)
        if mixture is None:
            return Batch(images, labels, taught)
        return Batch(images, labels, taught, self._labels[mixture[0]], mixture[1])
