"""The ten shapes of the built-in data set, as signed distances to their edges."""

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

_Float = npt.NDArray[np.float32]


def _largest_two(
    x: _Float, y: _Float, sides: int, apothem: float
) -> tuple[_Float, ...]:
    """Return the two largest signed distances to the sides of a regular polygon."""
    angles = np.pi / 2 + 2.0 * np.pi * (np.arange(sides) + 0.5) / sides
    largest = np.full_like(x, -np.inf)
    second = np.full_like(x, -np.inf)
    for cosine, sine in zip(np.cos(angles), np.sin(angles), strict=True):
        side = x * np.float32(cosine) + y * np.float32(sine) - np.float32(apothem)
        second = np.maximum(second, np.minimum(largest, side))
        largest = np.maximum(largest, side)
    return largest, second


def _box(x: _Float, y: _Float, half_width: _Float, half_height: _Float) -> _Float:
    inside: _Float = np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)
    return inside


def _circle(x: _Float, y: _Float, detail: _Float) -> _Float:
    edge: _Float = np.sqrt(x * x + y * y) - np.float32(0.88)
    return edge


def _triangle(x: _Float, y: _Float, detail: _Float) -> _Float:
    return _largest_two(x, y + np.float32(0.1), 3, 0.52)[0]


def _square(x: _Float, y: _Float, detail: _Float) -> _Float:
    side = np.full_like(detail, 0.76)
    return _box(x, y, side, side)


def _pentagon(x: _Float, y: _Float, detail: _Float) -> _Float:
    return _largest_two(x, y, 5, 0.76)[0]


def _star(x: _Float, y: _Float, detail: _Float) -> _Float:
    # Each tip of a five-pointed star lies outside exactly one of the five sides'
    # lines and the middle outside none: inside is where the second largest is below 0.
    return _largest_two(x, y, 5, 0.36)[1]


def _cross(x: _Float, y: _Float, detail: _Float) -> _Float:
    arm = 0.22 + 0.12 * detail
    length = np.full_like(detail, 0.95)
    both: _Float = np.minimum(_box(x, y, arm, length), _box(x, y, length, arm))
    return both


def _ring(x: _Float, y: _Float, detail: _Float) -> _Float:
    half = 0.13 + 0.11 * detail
    band: _Float = np.abs(np.sqrt(x * x + y * y) - (0.95 - half)) - half
    return band


def _crescent(x: _Float, y: _Float, detail: _Float) -> _Float:
    bite_x = x - (0.40 + 0.15 * detail)
    outer = np.sqrt(x * x + y * y) - np.float32(0.95)
    bite = np.float32(0.78) - np.sqrt(bite_x * bite_x + y * y)
    both: _Float = np.maximum(outer, bite)
    return both


def _heart(x: _Float, y: _Float, detail: _Float) -> _Float:
    # A square that stands on its corner, with a circle on each of its upper sides.
    half = np.full_like(detail, 0.52)
    lowered = y + np.float32(0.15)
    root = np.float32(np.sqrt(0.5))
    square = _box((x + lowered) * root, (x - lowered) * root, half, half)
    lobe_x = np.abs(x) - half * root
    lobe_y = lowered - half * root
    lobes = np.sqrt(lobe_x * lobe_x + lobe_y * lobe_y) - half
    both: _Float = np.minimum(square, lobes)
    return both


def _arrow(x: _Float, y: _Float, detail: _Float) -> _Float:
    root = np.float32(np.sqrt(0.5))
    head = np.maximum((x + np.abs(y)) * root - np.float32(0.68), -x + np.float32(0.1))
    width = 0.16 + 0.1 * detail
    shaft = _box(x + np.float32(0.4), y, np.full_like(detail, 0.55), width)
    both: _Float = np.minimum(head, shaft)
    return both


# In the order of the classes. Each takes coordinates [n, H, W] in the shape's unit
# frame, y upwards, and a proportion [n, 1, 1] in [0, 1], and returns a distance that is
# negative inside.
SHAPES: Final[dict[str, Callable[[_Float, _Float, _Float], _Float]]] = {
    "circle": _circle,
    "triangle": _triangle,
    "square": _square,
    "pentagon": _pentagon,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
    "heart": _heart,
    "arrow": _arrow,
}
