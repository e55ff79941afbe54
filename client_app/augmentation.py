"""Augmentation: differentiable Siamese for class gradients, crop and flip to train.

The Siamese augmentation (DSA, Zhao and Bilen 2021) draws one of six operations and one
set of parameters for a whole batch, as CReFF and CLIP2FL do. Images are normalised;
borders are filled with zeros.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

MAX_SHIFT = 0.125
CUTOUT_SIDE = 0.5
FLIP_PROBABILITY = 0.5
MAX_SCALE = 1.2
MAX_ROTATION = math.radians(15)

Operation = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """Return a random integer from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _color(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift brightness by +-0.5, scale saturation by [0, 2], contrast by [0.5, 1.5]."""
    images = images + (_uniform(generator) - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * (2 * _uniform(generator)) + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (0.5 + _uniform(generator)) + mean


def _crop(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift by up to 12.5 % of each side."""
    height, width = images.shape[2:]
    pad_y, pad_x = (int(side * MAX_SHIFT + 0.5) for side in (height, width))
    down = _integer(-pad_y, pad_y, generator)
    right = _integer(-pad_x, pad_x, generator)
    return _shift(images, pad_y + down, pad_x + right, pad_y, pad_x)


def _shift(
    images: torch.Tensor, top: int, left: int, pad_y: int, pad_x: int
) -> torch.Tensor:
    """Return a window of the images' own size, cut from zero-padded images."""
    height, width = images.shape[2:]
    padded = functional.pad(images, (pad_x, pad_x, pad_y, pad_y))
    return padded[:, :, top : top + height, left : left + width]


def _cutout(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Set a square of half the side to zero; it may cross the border."""
    height, width = images.shape[2:]
    mask = torch.ones(height, width, dtype=images.dtype, device=images.device)
    size_y, size_x = (int(side * CUTOUT_SIDE + 0.5) for side in (height, width))
    top = _integer(0, height - size_y % 2, generator) - size_y // 2
    left = _integer(0, width - size_x % 2, generator) - size_x // 2
    mask[max(top, 0) : max(top + size_y, 0), max(left, 0) : max(left + size_x, 0)] = 0
    return images * mask


def _flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror left and right with probability one half."""
    return images.flip(3) if _uniform(generator) < FLIP_PROBABILITY else images


def _scale(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Scale each axis by a factor between 1/1.2 and 1.2."""
    low = 1 / MAX_SCALE
    factors = [low + _uniform(generator) * (MAX_SCALE - low) for _ in range(2)]
    return _warp(images, [[factors[0], 0, 0], [0, factors[1], 0]])


def _rotate(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotate by up to 15 degrees."""
    angle = (2 * _uniform(generator) - 1) * MAX_ROTATION
    sine, cosine = math.sin(angle), math.cos(angle)
    return _warp(images, [[cosine, -sine, 0], [sine, cosine, 0]])


def _warp(images: torch.Tensor, matrix: list[list[float]]) -> torch.Tensor:
    theta = torch.tensor([matrix], dtype=images.dtype, device=images.device)
    grid = functional.affine_grid(
        theta.expand(len(images), 2, 3), list(images.shape), align_corners=False
    )
    return functional.grid_sample(images, grid, align_corners=False)


_OPERATIONS: dict[str, Operation] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}
OPERATIONS = tuple(_OPERATIONS)


def siamese_augment(
    images: torch.Tensor, operation: str | None, generator: torch.Generator
) -> torch.Tensor:
    """Return the images after one augmentation, the same for the whole batch.

    Parameters
    ----------
    images : Tensor, shape [N, 3, H, W]
        Normalised images.
    operation : str or None
        One of `OPERATIONS`; None draws one at random.
    generator : torch.Generator
        CPU generator of the operation and its parameters.

    Returns
    -------
    Tensor, shape [N, 3, H, W]

    Raises
    ------
    KeyError
        If the operation is not one of `OPERATIONS`.
    """
    if operation is None:
        operation = OPERATIONS[_integer(0, len(OPERATIONS) - 1, generator)]
    return _OPERATIONS[operation](images, generator)


def random_crop_flip(
    images: torch.Tensor,
    padding: int,
    generator: torch.Generator,
    *,
    per_image: bool = False,
) -> torch.Tensor:
    """Return images after a random crop with zero padding and a random flip.

    The flip has probability one half.

    Parameters
    ----------
    images : Tensor, shape [N, 3, H, W]
        Normalised images.
    padding : int
        Zero pixels added on every side before the crop; 0 turns the crop off.
    generator : torch.Generator
        CPU generator of crop and flip.
    per_image : bool
        Draw crop and flip for each image; the released code draws them once per
        batch.

    Returns
    -------
    Tensor, shape [N, 3, H, W]
    """
    drawn = draw_crops(len(images), padding, generator, per_image=per_image)
    return drawn(images, padding)


@dataclass(frozen=True)
class Crops:
    """Random crops and flips: one for all images of a batch, or one for each image.

    Attributes
    ----------
    top, left : Tensor of int64, shape [1] or [N]
        Corner of each crop in the padded image.
    mirrored : Tensor of bool, shape [1] or [N]
        Which crops are mirrored, left and right.
    shared : bool
        Whether there is one for all images.
    """

    top: torch.Tensor
    left: torch.Tensor
    mirrored: torch.Tensor
    shared: bool

    def __call__(self, images: torch.Tensor, padding: int) -> torch.Tensor:
        """Return images [N, 3, H, W] after their crops and flips."""
        if self.shared:
            moved = _shift(images, int(self.top), int(self.left), padding, padding)
            return moved.flip(3) if self.mirrored else moved
        return crop_flip(images, padding, self.top, self.left, self.mirrored)

    @staticmethod
    def joined(batches: "Sequence[tuple[Crops, int]]", device: torch.device) -> "Crops":
        """Return one crop for each image of several batches, one after the other.

        Parameters
        ----------
        batches : sequence of tuple
            Crops of each batch, and its number of images.
        device : torch.device
            Where the numbers are kept.
        """
        top, left, mirrored = (
            torch.cat(
                [getattr(crops, name).expand(number) for crops, number in batches]
            )
            for name in ("top", "left", "mirrored")
        )
        return Crops(top.to(device), left.to(device), mirrored.to(device), shared=False)

    def part(self, start: int, end: int) -> "Crops":
        """Return the crops of the images from ``start`` to before ``end``."""
        return Crops(
            self.top[start:end],
            self.left[start:end],
            self.mirrored[start:end],
            shared=False,
        )


def draw_crops(
    number: int, padding: int, generator: torch.Generator, *, per_image: bool
) -> Crops:
    """Draw the crops and flips of a batch, of each image or of the whole batch.

    Parameters
    ----------
    number : int
        Images of the batch.
    padding, generator, per_image
        As `random_crop_flip`.

    Returns
    -------
    Crops
        On the CPU.
    """
    if per_image:
        draw = torch.randint(2 * padding + 1, (2, number, 1), generator=generator)
        mirrored = torch.rand(number, 1, generator=generator) < FLIP_PROBABILITY
        return Crops(draw[0, :, 0], draw[1, :, 0], mirrored[:, 0], shared=False)
    top = torch.tensor([_integer(0, 2 * padding, generator)])
    left = torch.tensor([_integer(0, 2 * padding, generator)])
    mirrored = torch.tensor([_uniform(generator) < FLIP_PROBABILITY])
    return Crops(top, left, mirrored, shared=True)


def crop_flip(
    images: torch.Tensor,
    padding: int,
    top: torch.Tensor,
    left: torch.Tensor,
    mirrored: torch.Tensor,
) -> torch.Tensor:
    """Return each image after its own crop and flip, by one gather for all images.

    Parameters
    ----------
    images : Tensor of any type, shape [N, 3, H, W]
        Images.
    padding : int
        Zero pixels added on every side before the crop.
    top, left : Tensor of int64, shape [N]
        Corner of each crop in the padded image, from 0 to twice the padding; on any
        device.
    mirrored : Tensor of bool, shape [N]
        Which crops are mirrored, left and right.

    Returns
    -------
    Tensor, shape [N, 3, H, W]
        Of the images' type.
    """
    number, _, height, width = images.shape
    device = images.device
    top, left, mirrored = (t.to(device)[:, None] for t in (top, left, mirrored))
    columns = torch.arange(width, device=device)
    columns = torch.where(mirrored, columns.flip(0), columns) + left
    rows = torch.arange(height, device=device) + top
    padded = functional.pad(images, (padding, padding, padding, padding))
    each = torch.arange(number, device=device)[:, None, None]
    # Channels last while gathering, so that each index selects a whole pixel.
    pixels = padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]]
    return pixels.permute(0, 3, 1, 2)
