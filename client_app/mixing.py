"""Mixing of views: mixup and CutMix between the images of one client.

A mixed view number v of an image is its view v mixed with the view v of a partner.
mixup (Zhang et al. 2018) adds the two pictures with weights. CutMix (Yun et al. 2019)
replaces a square of the first by the same square of the second. Beyer et al. (2022)
show teacher and student the same mixed picture.

The partner depends on the client's images, the share of the two images on image and
view only. So a mixed view is the same in each round and run with the same partition.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # the mathematics needs no package of the configuration
    from clip2fl_common.config.types import ViewMix

# mixup's weights are multiples of 1 / 65,536. Whole numbers are added without rounding,
# so that every device makes the same picture.
WEIGHTS = 2**16


def partners(keys: list[bytes], places: list[int], views: list[int]) -> list[int]:
    """Return the image with which each view is mixed.

    The client's images form a ring in the order of their keys, which are hashes, so
    the order is random. The partner in view v is v + 1 places further on. It is another
    image if there is one. An image has another partner in each view if the client holds
    more images than there are views, and an added image changes few partners.

    Parameters
    ----------
    keys : list of bytes, length N
        Keys of the client's images (`content_keys`), in any order. Images with equal
        keys count as one.
    places : list of int, length n
        Image of each view: a position in ``keys``.
    views : list of int, length n
        Number of each view, from 0.

    Returns
    -------
    list of int, length n
        Positions in ``keys``; of equal images the first.
    """
    ring = sorted(set(keys))
    position = {key: place for place, key in enumerate(ring)}
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    others = max(len(ring) - 1, 1)
    return [
        first[ring[(position[keys[place]] + 1 + view % others) % len(ring)]]
        for place, view in zip(places, views, strict=True)
    ]


def mix_views(
    first: torch.Tensor, second: torch.Tensor, numbers: torch.Tensor, mix: "ViewMix"
) -> torch.Tensor:
    """Return each picture mixed with a second one.

    Parameters
    ----------
    first, second : Tensor of uint8, shape [n, 3, H, W]
        Views of the images and of their partners.
    numbers : Tensor of float64, shape [n, 8]
        Random numbers of the mixing (`views.view_numbers`), on the CPU.
    mix : str
        mixup or cutmix.

    Returns
    -------
    Tensor of uint8, shape [n, 3, H, W]
        mixup: the weighted sum, rounded. On the device of the pictures.
    """
    height, width = first.shape[2:]
    if mix == "cutmix":
        rows, columns = _patches(numbers, height, width)
        inside = rows.to(first.device)[:, :, None] & columns.to(first.device)[:, None]
        return torch.where(inside[:, None], second, first)
    weights = (mix_shares(numbers, mix, height, width) * WEIGHTS).to(torch.int32)
    step = (first.int() - second) * weights.to(first.device)[:, None, None, None]
    mixed: torch.Tensor = second + ((step + WEIGHTS // 2) >> 16)
    return mixed.to(torch.uint8)


def mix_shares(
    numbers: torch.Tensor, mix: "ViewMix", height: int, width: int
) -> torch.Tensor:
    """Return lambda, the share of the first image in each mixed picture.

    Parameters
    ----------
    numbers : Tensor of float64, shape [n, 8]
        Random numbers of the mixing (`views.view_numbers`).
    mix : str
        mixup: uniform from 0.5 to 1. cutmix: share of the pixels outside of the square.
    height, width : int
        Size of the pictures in pixels.

    Returns
    -------
    Tensor of float32, shape [n]
    """
    if mix == "cutmix":
        rows, columns = _patches(numbers, height, width)
        pixels = rows.sum(dim=1) * columns.sum(dim=1)
        return (1 - pixels / (height * width)).float()
    larger = torch.maximum(numbers[:, 0], 1 - numbers[:, 0])
    return ((larger * WEIGHTS).floor() / WEIGHTS).float()


def _patches(
    numbers: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows [n, H] and columns [n, W] of CutMix's squares, as bool.

    A square has the share 1 - u of the picture's area, with u uniform. Its centre is
    uniform too, and the part outside of the picture is cut off.
    """
    half = (1 - numbers[:, :1]).sqrt() / 2
    rows, columns = (
        # The pixels whose centres lie in the square, in shares of the side.
        ((torch.arange(side).double() + 0.5) / side - centre).abs() < half
        for side, centre in ((height, numbers[:, 1:2]), (width, numbers[:, 2:3]))
    )
    return rows, columns
