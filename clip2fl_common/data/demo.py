"""The built-in data set: ten shapes that the program draws, without a download.

Each 32x32 image shows one shape with varying colour, size, place and angle, on a shaded
background, among meaningless strokes and blobs, under pixel noise. A person recognises
nearly all of them and a good network about nine in ten. A network that has seen only a
few examples of a class performs poorly on this class, as in a long-tailed federation.

An image is a function of its split, label and number, so no image is stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from clip2fl_common.data.demo_shapes import SHAPES

Split = Literal["train", "test", "teacher"]
_Float = npt.NDArray[np.float32]
_Uint8 = npt.NDArray[np.uint8]

CLASS_NAMES: Final[tuple[str, ...]] = tuple(SHAPES)
IMAGE_SIZE: Final = 32
COLOUR_NAMES: Final[tuple[str, ...]] = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "grey",
)

_PALETTE: Final = np.array(
    [
        (0.95, 0.35, 0.30),
        (1.00, 0.62, 0.20),
        (0.95, 0.92, 0.35),
        (0.35, 0.85, 0.40),
        (0.40, 0.58, 1.00),
        (0.72, 0.48, 0.95),
        (1.00, 0.68, 0.82),
        (0.86, 0.86, 0.86),
    ],
    dtype=np.float32,
)
_SPLIT_STREAMS: Final[dict[Split, int]] = {"train": 0, "test": 1, "teacher": 2}
_STREAM_TAG: Final = 0xC11F2F
_SCENE_STREAM: Final = 0
_NOISE_STREAM: Final = 1
_CLUTTER: Final = 4
# Largest turn of a shape in radians, and brightness of a background next to a shape of
# the same colour. With shapes at any angle, or darker than their background too,
# 500 images are too few for a small network to learn even the most frequent class.
_TILT: Final = 0.6
_GROUND: Final = 0.4
_SCENE_DRAWS: Final = 19 + 9 * _CLUTTER
_NOISE_BYTES: Final = 4
_NOISE_DRAWS: Final = 3 * IMAGE_SIZE * IMAGE_SIZE * _NOISE_BYTES // 8
# Chunks of this many images keep the intermediate planes in the processor's cache.
_CHUNK: Final = 64


@dataclass(frozen=True)
class Scenes:
    """The content of N images of one class, before they are drawn.

    Lengths are in pixels, angles in radians, colours in [0, 1] RGB.

    Attributes
    ----------
    label : int
        Class of all the images, an index into `CLASS_NAMES`.
    colour, background : int64 array of shape [N]
        Named colours, indices into `COLOUR_NAMES`.
    radius : float32 array of shape [N]
        Radius of the circle that the shape is drawn in.
    centre : float32 array of shape [N, 2]
        Place of the shape (x, y).
    axes : float32 array of shape [N, 2, 2]
        Rows map a pixel's offset from the centre into the shape's unit frame.
    detail : float32 array of shape [N]
        Proportion in [0, 1]: thickness of a ring, depth of a crescent and so on.
    fill, ground, shade : float32 array of shape [N, 3]
        Shape's colour, background's colour, and the background's change of colour
        from the middle of the image to one edge.
    slope : float32 array of shape [N, 2]
        Direction of that change.
    blur : float32 array of shape [N]
        Width of the shape's edge.
    noise : float32 array of shape [N]
        Standard deviation of the pixel noise.
    clutter : float32 array of shape [N, K, 6]
        Strokes: x, y, unit direction (x, y), half length, half thickness.
    clutter_fill : float32 array of shape [N, K, 3]
        Colours of the strokes.
    """

    label: int
    colour: npt.NDArray[np.int64]
    background: npt.NDArray[np.int64]
    radius: _Float
    centre: _Float
    axes: _Float
    detail: _Float
    fill: _Float
    ground: _Float
    shade: _Float
    slope: _Float
    blur: _Float
    noise: _Float
    clutter: _Float
    clutter_fill: _Float


def _raw_draws(
    split: Split, label: int, stream: int, first: int, count: int, draws: int
) -> npt.NDArray[np.uint64]:
    """Return rows `first` to `first + count` of an endless table of raw draws."""
    # Only raw output is used: NumPy keeps a bit generator's stream fixed for good,
    # but may change how Generator turns it into a distribution (NEP 19).
    bits = np.random.PCG64(
        np.random.SeedSequence((_STREAM_TAG, _SPLIT_STREAMS[split], label, stream))
    )
    bits.advance(first * draws)
    table: npt.NDArray[np.uint64] = bits.random_raw(count * draws)
    return table.reshape(count, draws)


def sample_scenes(split: Split, label: int, count: int, first: int = 0) -> Scenes:
    """Choose the content of images `first` to `first + count` of a class.

    Parameters
    ----------
    split : {"train", "test", "teacher"}
        Which of the disjoint streams of images.
    label : int
        Class, an index into `CLASS_NAMES`.
    count : int
        Number of images.
    first : int
        Number of the first image.

    Returns
    -------
    Scenes
        One row for each image.
    """
    raw = _raw_draws(split, label, _SCENE_STREAM, first, count, _SCENE_DRAWS)
    uniform = (raw >> np.uint64(11)) * 2.0**-53
    take = iter(uniform.T).__next__

    def between(low: float, high: float) -> npt.NDArray[np.float64]:
        value: npt.NDArray[np.float64] = low + (high - low) * take()
        return value

    def direction() -> npt.NDArray[np.float64]:
        angle = between(0.0, 2.0 * np.pi)
        return np.stack((np.cos(angle), np.sin(angle)), axis=1)

    def jitter(width: float) -> npt.NDArray[np.float64]:
        return np.stack([between(-width, width) for _ in range(3)], axis=1)

    radius = between(5.5, 12.5)
    room = 0.9 * (IMAGE_SIZE / 2 - 0.8 * radius)
    centre = np.stack(
        [(IMAGE_SIZE - 1) / 2 + room * between(-1.0, 1.0) for _ in range(2)], axis=1
    )
    tilt = between(-_TILT, _TILT)
    cosine, sine = np.cos(tilt), np.sin(tilt)
    stretch = np.exp(between(-0.12, 0.12))
    axes = np.stack(
        (
            np.stack((cosine, sine), axis=1) / (radius * stretch)[:, None],
            np.stack((-sine, cosine), axis=1) * (stretch / radius)[:, None],
        ),
        axis=1,
    )
    detail = take()
    names = len(COLOUR_NAMES)
    colour = (take() * names).astype(np.int64)
    background = (colour + 1 + (take() * (names - 1)).astype(np.int64)) % names
    ground = np.clip(_GROUND * _PALETTE[background] + jitter(0.06), 0.0, 1.0)
    opacity = between(0.35, 1.0)[:, None]
    pure = np.clip(_PALETTE[colour] + jitter(0.08), 0.0, 1.0)
    fill = ground + opacity * (pure - ground)
    slope = direction()
    # One grey step for all three channels keeps the background's colour recognisable.
    shade = np.repeat(between(0.0, 0.10)[:, None], 3, axis=1)
    blur = between(1.0, 1.8)
    noise = between(0.02, 0.12)

    strokes, stroke_fills = [], []
    for _ in range(_CLUTTER):
        place = [between(0.0, IMAGE_SIZE - 1.0) for _ in range(2)]
        along = direction()
        # A third of the strokes have length 0: they are blobs, and may be thicker.
        half_length = between(-2.0, 3.5).clip(min=0.0)
        half_width = between(0.4, 1.2) + np.where(half_length == 0.0, 0.6, 0.0) * take()
        strokes.append(np.column_stack((*place, along, half_length, half_width)))
        stroke_fills.append(np.stack([take() for _ in range(3)], axis=1))

    def single(values: npt.NDArray[np.float64]) -> _Float:
        return values.astype(np.float32)

    return Scenes(
        label=label,
        colour=colour,
        background=background,
        radius=single(radius),
        centre=single(centre),
        axes=single(axes),
        detail=single(detail),
        fill=single(fill),
        ground=single(ground),
        shade=single(shade),
        slope=single(slope),
        blur=single(blur),
        noise=single(noise),
        clutter=single(np.stack(strokes, axis=1)),
        clutter_fill=single(np.stack(stroke_fills, axis=1)),
    )


_LINE: Final = np.arange(IMAGE_SIZE, dtype=np.float32)


def _coverage(distance: _Float, width: _Float) -> _Float:
    """Return the share in [0, 1] of each pixel that lies inside an edge."""
    share: _Float = np.clip(np.float32(0.5) - distance / width, 0.0, 1.0)
    return share


def _paint(canvas: _Float, share: _Float, colour: _Float) -> None:
    """Lay colours [n, 3] over canvases [n, 3, 32, 32] by the shares [n, 32, 32]."""
    canvas += share[:, None] * (colour[:, :, None, None] - canvas)


def _paint_strokes(canvas: _Float, strokes: _Float, colours: _Float) -> None:
    for stroke, colour in zip(
        strokes.transpose(1, 0, 2), colours.transpose(1, 0, 2), strict=True
    ):
        x0, y0, ux, uy, half_length, half_width = stroke.T[:, :, None, None]
        dx, dy = _LINE - x0, _LINE[:, None] - y0
        along = np.maximum(np.abs(dx * ux + dy * uy) - half_length, 0.0)
        across = dy * ux - dx * uy
        edge = np.sqrt(along * along + across * across) - half_width
        _paint(canvas, _coverage(edge, np.ones_like(half_width)), colour)


def _draw_chunk(
    scenes: Scenes, part: slice, noise_draws: npt.NDArray[np.uint64]
) -> _Uint8:
    def plane(values: _Float) -> _Float:
        return values[part][:, None, None]

    across = (_LINE - (IMAGE_SIZE - 1) / 2) / np.float32(IMAGE_SIZE / 2)
    ramp = (
        plane(scenes.slope[:, 0]) * across + plane(scenes.slope[:, 1]) * across[:, None]
    )
    canvas = (
        scenes.ground[part][:, :, None, None]
        + scenes.shade[part][:, :, None, None] * ramp[:, None]
    )
    strokes, colours = scenes.clutter[part], scenes.clutter_fill[part]
    # All but one of the strokes lie behind the shape: one across it is enough to
    # hide an edge, and more would hide what the shape is.
    _paint_strokes(canvas, strokes[:, 1:], colours[:, 1:])

    dx = _LINE - plane(scenes.centre[:, 0])
    dy = plane(scenes.centre[:, 1]) - _LINE[:, None]
    x = dx * plane(scenes.axes[:, 0, 0]) + dy * plane(scenes.axes[:, 0, 1])
    y = dx * plane(scenes.axes[:, 1, 0]) + dy * plane(scenes.axes[:, 1, 1])
    distance = SHAPES[CLASS_NAMES[scenes.label]](x, y, plane(scenes.detail))
    share = _coverage(distance * plane(scenes.radius), plane(scenes.blur))
    _paint(canvas, share, scenes.fill[part])
    _paint_strokes(canvas, strokes[:, :1], colours[:, :1])

    # The sum of a few bytes is close to normal, and the same on every machine.
    octets = noise_draws.astype("<u8", copy=False).view(np.uint8)
    total = octets.reshape(len(octets), _NOISE_BYTES, -1).sum(axis=1, dtype=np.uint16)
    mean = _NOISE_BYTES * 255 / 2
    deviation = np.sqrt(_NOISE_BYTES * (256**2 - 1) / 12)
    unit = (total.astype(np.float32) - np.float32(mean)) / np.float32(deviation)
    canvas += scenes.noise[part][:, None, None, None] * unit.reshape(canvas.shape)
    scaled: _Float = np.rint(np.clip(canvas, 0.0, 1.0) * np.float32(255))
    return scaled.astype(np.uint8)


def draw_images(split: Split, label: int, count: int, first: int = 0) -> _Uint8:
    """Draw images `first` to `first + count` of a class.

    Parameters
    ----------
    split : {"train", "test", "teacher"}
        Which of the disjoint streams of images.
    label : int
        Class, an index into `CLASS_NAMES`.
    count : int
        Number of images.
    first : int
        Number of the first image.

    Returns
    -------
    uint8 array of shape [count, 3, 32, 32]
        RGB images, each a function of its split, label and number alone.
    """
    scenes = sample_scenes(split, label, count, first)
    images = np.empty((count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    for start in range(0, count, _CHUNK):
        part = slice(start, min(start + _CHUNK, count))
        noise_draws = _raw_draws(
            split,
            label,
            _NOISE_STREAM,
            first + part.start,
            part.stop - part.start,
            _NOISE_DRAWS,
        )
        images[part] = _draw_chunk(scenes, part, noise_draws)
    return images


def demo_split(
    split: Split, counts: Sequence[int]
) -> tuple[_Uint8, npt.NDArray[np.int64]]:
    """Draw a data set with a given number of images of each class.

    Parameters
    ----------
    split : {"train", "test", "teacher"}
        Which of the disjoint streams of images.
    counts : sequence of int
        Number of images of each class, in the order of `CLASS_NAMES`.

    Returns
    -------
    images : uint8 array of shape [N, 3, 32, 32]
        RGB images, grouped by class.
    labels : int64 array of shape [N]
        Their classes.

    Raises
    ------
    ValueError
        If there is not one count for each class.
    """
    if len(counts) != len(CLASS_NAMES):
        raise ValueError(
            f"counts has {len(counts)} entries; the demo data has "
            f"{len(CLASS_NAMES)} classes, and needs one count for each"
        )
    images = [draw_images(split, label, count) for label, count in enumerate(counts)]
    labels = np.repeat(np.arange(len(CLASS_NAMES), dtype=np.int64), counts)
    return np.concatenate(images), labels
