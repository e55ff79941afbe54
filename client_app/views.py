"""Views: a fixed set of augmented pictures of each image, for consistent distillation.

Beyer et al. (2022, "Knowledge distillation: A good teacher is patient and consistent")
show the teacher the same augmented picture as the student. A teacher pass in each step
would be too slow here. So each image has K views, of which each epoch takes one. The
teacher sees each view once, and its features are stored.

A view depends only on the image's content, the number of the view and the kind. So it
is made again whenever it is needed, and clients, partitions and runs share its
features. `mixing` mixes two views.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from client_app.augmentation import FLIP_PROBABILITY, crop_flip

if TYPE_CHECKING:  # the mathematics needs no package of the configuration
    from clip2fl_common.config.types import ViewKind, ViewMix

LEAST_AREA = 0.35
MAX_ASPECT = 4 / 3
MAX_COLOUR_CHANGE = 0.4
# Random numbers of one view; 64 bytes are the longest hash of BLAKE2b.
NUMBERS = 8


@dataclass(frozen=True)
class ViewRecipe:
    """How views are made.

    Attributes
    ----------
    number : int
        K, the number of views of each image.
    kind : str
        crop-flip or resized-crop.
    padding : int
        crop-flip: black pixels around an image before its crop.
    mix : str
        none, mixup or cutmix.
    """

    number: int
    kind: "ViewKind"
    padding: int
    mix: "ViewMix" = "none"


def view_numbers(
    keys: list[bytes], views: list[int], kind: "ViewKind | ViewMix"
) -> torch.Tensor:
    """Return the random numbers of views, which are a hash of image, view and kind.

    Parameters
    ----------
    keys : list of bytes, length n
        Keys of the images' content (`content_keys`).
    views : list of int, length n
        Number of the view of each image, from 0.
    kind : str
        Kind of view, or of mixing.

    Returns
    -------
    Tensor of float64, shape [n, 8]
        Numbers from 0 to below 1.
    """
    hashes = b"".join(
        hashlib.blake2b(key + view.to_bytes(4, "little"), person=kind.encode()).digest()
        for key, view in zip(keys, views, strict=True)
    )
    # The upper 53 bits are a float64's precision.
    bits = np.frombuffer(hashes, dtype="<u8").reshape(-1, NUMBERS) >> np.uint64(11)
    return torch.from_numpy(bits.astype(np.float64) * 2.0**-53)


def make_views(
    pixels: torch.Tensor, numbers: torch.Tensor, recipe: ViewRecipe
) -> torch.Tensor:
    """Return one view of each image.

    Each view is the same whatever other images are in the batch.

    Parameters
    ----------
    pixels : Tensor of uint8, shape [n, 3, H, W]
        RGB images.
    numbers : Tensor of float64, shape [n, 8]
        Random numbers of the views (`view_numbers`), on the CPU.
    recipe : ViewRecipe
        How views are made; they are not mixed here.

    Returns
    -------
    Tensor of uint8, shape [n, 3, H, W]
        On the device of the images.
    """
    if recipe.kind == "resized-crop":
        return _jitter(_resized_crop(pixels, numbers), numbers).to(torch.uint8)
    top, left = (numbers[:, :2] * (2 * recipe.padding + 1)).long().unbind(dim=1)
    mirrored = numbers[:, 2] < FLIP_PROBABILITY
    return crop_flip(pixels, recipe.padding, top, left, mirrored)


def _resized_crop(pixels: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Cut a rectangle from each image, scale it to the image's size, maybe mirror it.

    Returns
    -------
    Tensor of float32, shape [n, 3, H, W]
        Grey levels from 0 to 255, interpolated linearly.
    """
    height, width = pixels.shape[2:]
    area = LEAST_AREA + (1 - LEAST_AREA) * numbers[:, 0]
    aspect = MAX_ASPECT ** (2 * numbers[:, 1] - 1)
    wide, high = (
        (share.sqrt().clamp(max=1)) for share in (area * aspect, area / aspect)
    )
    columns = (torch.arange(width) + 0.5) / width
    columns = torch.where(
        numbers[:, 4, None] < FLIP_PROBABILITY, columns.flip(0), columns
    )
    rows = (torch.arange(height) + 0.5) / height
    # Shares of the image's sides: the corner, and the way from there.
    x = ((1 - wide) * numbers[:, 2])[:, None] + columns * wide[:, None]
    y = ((1 - high) * numbers[:, 3])[:, None] + rows * high[:, None]
    x, y = ((2 * place - 1).to(pixels.device, torch.float32) for place in (x, y))
    shape = len(pixels), height, width
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], 3)
    return functional.grid_sample(
        pixels.float(), grid, padding_mode="border", align_corners=False
    )


def _jitter(levels: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Scale brightness, then contrast, then saturation of each image by 0.6 to 1.4.

    Parameters and result are grey levels [n, 3, H, W] from 0 to 255; the result is
    rounded.
    """
    factors = 1 + MAX_COLOUR_CHANGE * (2 * numbers[:, 5:8, None, None, None] - 1)
    brightness, contrast, saturation = factors.to(levels.device, torch.float32).unbind(
        1
    )
    # Sums of whole numbers are exact, so that they do not depend on the batch.
    levels = (levels * brightness).clamp(0, 255).round()
    mean = levels.double().mean(dim=(1, 2, 3), keepdim=True).float()
    levels = ((levels - mean) * contrast + mean).clamp(0, 255)
    grey = ((levels[:, 0] + levels[:, 1] + levels[:, 2]) / 3)[:, None]
    return ((levels - grey) * saturation + grey).clamp(0, 255).round()
