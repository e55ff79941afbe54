"""Slow augmentations, and functions that find the parameters that were drawn.

The tests do not prescribe the numbers that an augmentation draws. They find the
parameters that explain an output, and check the parameters and their effect, one image
and one pixel at a time.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch

Matrix = Sequence[Sequence[float]]
Colour = tuple[float, float, float]


def per_image(
    images: torch.Tensor, operation: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Apply an operation to each image [3, H, W] separately."""
    return torch.stack([operation(image) for image in images])


def colour(image: torch.Tensor, parameters: Colour) -> torch.Tensor:
    """Shift brightness, then scale saturation, then contrast."""
    brightness, saturation, contrast = parameters
    image = image + brightness
    grey = (image[0] + image[1] + image[2]) / 3
    image = torch.stack([(channel - grey) * saturation + grey for channel in image])
    mean = image.sum() / image.numel()
    return (image - mean) * contrast + mean


def shift(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Take each pixel from ``down`` rows below and ``right`` columns to the right."""
    _, height, width = image.shape
    result = torch.zeros_like(image)
    for y, x in itertools.product(range(height), range(width)):
        if 0 <= y + down < height and 0 <= x + right < width:
            result[:, y, x] = image[:, y + down, x + right]
    return result


def cutout(image: torch.Tensor, top: int, left: int) -> torch.Tensor:
    """Set a rectangle of half the sides, with its corner at (top, left), to zero."""
    _, height, width = image.shape
    result = image.clone()
    for y in range(top, top + int(height * 0.5 + 0.5)):
        for x in range(left, left + int(width * 0.5 + 0.5)):
            if 0 <= y < height and 0 <= x < width:
                result[:, y, x] = 0
    return result


def mirror(image: torch.Tensor) -> torch.Tensor:
    """Exchange left and right."""
    width = image.shape[2]
    return torch.stack([image[:, :, width - 1 - x] for x in range(width)], dim=2)


def warp(image: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """Sample bilinearly at ``matrix @ (x, y)``; coordinates run from -1 to 1."""
    _, height, width = image.shape
    result = torch.zeros_like(image)
    for row, column in itertools.product(range(height), range(width)):
        point = ((2 * column + 1) / width - 1, (2 * row + 1) / height - 1)
        at_x, at_y = (line[0] * point[0] + line[1] * point[1] for line in matrix)
        x, y = ((at_x + 1) * width - 1) / 2, ((at_y + 1) * height - 1) / 2
        left, top = math.floor(x), math.floor(y)
        for near_y, near_x in itertools.product((top, top + 1), (left, left + 1)):
            if 0 <= near_y < height and 0 <= near_x < width:
                share = (1 - abs(x - near_x)) * (1 - abs(y - near_y))
                result[:, row, column] += share * image[:, near_y, near_x]
    return result


def find_colour(image: torch.Tensor, output: torch.Tensor) -> Colour:
    """Return the three factors.

    Contrast alone scales the grey image's deviations. Contrast and saturation scale the
    channels' deviations from grey. Brightness alone moves the mean.
    """

    def slope(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a * b).sum() / (a * a).sum())

    grey, new_grey = image.mean(0), output.mean(0)
    contrast = slope(grey - grey.mean(), new_grey - new_grey.mean())
    both = slope(image - grey, output - new_grey)
    return float(output.mean() - image.mean()), both / contrast, contrast


def find_shift(
    images: torch.Tensor, output: torch.Tensor, most_down: int, most_right: int
) -> tuple[int, int] | None:
    """Return the only shift that turns all images into the output."""
    height, width = images.shape[2:]
    padding = (most_right, most_right, most_down, most_down)
    padded = torch.nn.functional.pad(images, padding)
    found = [
        (down, right)
        for down in range(-most_down, most_down + 1)
        for right in range(-most_right, most_right + 1)
        if torch.equal(
            output,
            padded[:, :, most_down + down :, most_right + right :][
                :, :, :height, :width
            ],
        )
    ]
    return found[0] if len(found) == 1 else None


def find_blank(output: torch.Tensor) -> tuple[int, int, int, int]:
    """Return top, bottom, left, right of the pixels that are zero in all images."""
    blank = (output == 0).all(dim=0).all(dim=0)
    rows = torch.nonzero(blank.any(dim=1)).flatten().tolist()
    columns = torch.nonzero(blank.any(dim=0)).flatten().tolist()
    if not rows:
        return 0, 0, 0, 0
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def ramp(height: int, width: int) -> torch.Tensor:
    """Return an image [3, H, W] whose channels are x, y and 1."""
    x = (2 * torch.arange(width, dtype=torch.float64) + 1) / width - 1
    y = (2 * torch.arange(height, dtype=torch.float64) + 1) / height - 1
    one = torch.ones(height, width, dtype=torch.float64)
    return torch.stack([x * one, y[:, None] * one, one])


def find_matrix(output: torch.Tensor) -> torch.Tensor:
    """Return the [2, 2] matrix that warped a ramp, read from its middle."""
    _, height, width = output.shape
    rows = slice(height // 2 - 2, height // 2 + 2)
    columns = slice(width // 2 - 2, width // 2 + 2)
    before = ramp(height, width)[:2, rows, columns].reshape(2, -1)
    after = output[:2, rows, columns].reshape(2, -1)
    solution: torch.Tensor = torch.linalg.lstsq(before.T, after.T).solution
    return solution.T
