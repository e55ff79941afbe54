"""Test each augmentation against a slow version, and the bounds of its parameters."""

import itertools
import math
from collections import Counter
from functools import partial

import pytest
import torch

from client_app.augmentation import OPERATIONS, random_crop_flip, siamese_augment
from tests.client_app import slow_augmentation as slow

EVERY_OPERATION = pytest.mark.parametrize("operation", OPERATIONS)
SIZES = pytest.mark.parametrize(("height", "width"), [(16, 24), (10, 14), (32, 32)])


def seeded(seed: int) -> torch.Generator:
    """Return a CPU generator."""
    return torch.Generator().manual_seed(seed)


def batch(height: int, width: int) -> torch.Tensor:
    """Return a ramp and two random images without zeros, [3, 3, H, W] in float64."""
    random = torch.rand(2, 3, height, width, generator=seeded(0), dtype=torch.float64)
    return torch.cat([slow.ramp(height, width)[None] + 3, random + 0.5])


def augment(images: torch.Tensor, operation: str | None, seed: int) -> torch.Tensor:
    """Augment, and check the properties that every operation has."""
    before = images.clone()
    output = siamese_augment(images, operation, seeded(seed))
    assert torch.equal(images, before)
    assert output.shape == images.shape
    assert output.dtype == images.dtype
    assert torch.isfinite(output).all()
    return output


def test_six_operations() -> None:
    """The operations are the six of DSA."""
    assert set(OPERATIONS) == {"color", "crop", "cutout", "flip", "scale", "rotate"}
    assert len(OPERATIONS) == 6


@SIZES
def test_color(height: int, width: int) -> None:
    """Brightness +-0.5, saturation in [0, 2], contrast in [0.5, 1.5], in turn."""
    images = batch(height, width)
    found = []
    for seed in range(100):
        output = augment(images, "color", seed)
        parameters = slow.find_colour(images[1], output[1])
        expected = slow.per_image(images, partial(slow.colour, parameters=parameters))
        torch.testing.assert_close(output, expected)
        found.append(parameters)
    bounds = ((-0.5, 0.5), (0.0, 2.0), (0.5, 1.5))
    for values, (low, high) in zip(zip(*found, strict=True), bounds, strict=True):
        margin = (high - low) / 20
        assert low - 1e-9 <= min(values) < low + margin
        assert high - margin < max(values) <= high + 1e-9


@SIZES
def test_crop(height: int, width: int) -> None:
    """Every shift of up to 12.5 % of a side occurs, and no other; the gap is zero."""
    images = batch(height, width)
    most = int(0.125 * height + 0.5), int(0.125 * width + 0.5)
    found = set()
    for seed in range(1000):
        shift = slow.find_shift(images, augment(images, "crop", seed), *most)
        assert shift is not None
        found.add(shift)
    assert found == set(itertools.product(*(range(-side, side + 1) for side in most)))
    for seed in range(5):
        output = augment(images, "crop", seed)
        shift = slow.find_shift(images, output, *most)
        assert shift is not None
        expected = slow.per_image(
            images, partial(slow.shift, down=shift[0], right=shift[1])
        )
        assert torch.equal(output, expected)


@SIZES
def test_cutout(height: int, width: int) -> None:
    """The rectangle has half the sides, lies anywhere, and may cross the border."""
    images = batch(height, width)
    expected = []
    for side in (height, width):
        half = int(side * 0.5 + 0.5)
        # Its centre is on any pixel, or between pixels if half the side is even.
        starts = range(-(half // 2), side + 1 - half % 2 - half // 2)
        expected.append({(max(a, 0), min(a + half, side)): a for a in starts})
    rows, columns = set(), set()
    for seed in range(500):
        output = augment(images, "cutout", seed)
        top, bottom, left, right = slow.find_blank(output)
        rows.add((top, bottom))
        columns.add((left, right))
        kept = torch.ones(height, width, dtype=torch.bool)
        kept[top:bottom, left:right] = False
        assert torch.equal(output, images * kept)
        if seed < 10:
            corner = expected[0][top, bottom], expected[1][left, right]
            slowly = partial(slow.cutout, top=corner[0], left=corner[1])
            assert torch.equal(output, slow.per_image(images, slowly))
    assert rows == set(expected[0])
    assert columns == set(expected[1])


def test_flip() -> None:
    """All images are mirrored or none, with probability one half."""
    images = batch(8, 12)
    mirrored = slow.per_image(images, slow.mirror)
    flips = 0
    for seed in range(400):
        output = augment(images, "flip", seed)
        flipped = torch.equal(output, mirrored)
        assert flipped or torch.equal(output, images)
        flips += flipped
    # Five standard deviations of a fair coin.
    assert abs(flips - 200) < 50


def find_matrix(images: torch.Tensor, operation: str, seed: int) -> torch.Tensor:
    """Return a warp's matrix, and check it by warping all images slowly."""
    images = torch.cat([slow.ramp(*images.shape[2:])[None], images])
    output = augment(images, operation, seed)
    matrix = slow.find_matrix(output[0])
    if seed < 5:
        lines = matrix.tolist()
        expected = slow.per_image(images, partial(slow.warp, matrix=lines))
        torch.testing.assert_close(output, expected, atol=1e-9, rtol=0)
    return matrix


@pytest.mark.parametrize(("height", "width"), [(16, 24), (12, 12)])
def test_scale(height: int, width: int) -> None:
    """Each axis has its own factor between 1/1.2 and 1.2."""
    images = batch(height, width)
    found = [find_matrix(images, "scale", seed) for seed in range(100)]
    for axis in range(2):
        factors = [float(matrix[axis, axis]) for matrix in found]
        assert 1 / 1.2 - 1e-9 <= min(factors) < 0.87
        assert 1.16 < max(factors) <= 1.2 + 1e-9
    for matrix in found:
        torch.testing.assert_close(matrix, torch.diag(matrix.diag()))
    assert any(abs(float(m[0, 0] - m[1, 1])) > 0.1 for m in found)


@pytest.mark.parametrize(("height", "width"), [(16, 24), (12, 12)])
def test_rotate(height: int, width: int) -> None:
    """The angle is between -15 and 15 degrees."""
    images = batch(height, width)
    angles = []
    for seed in range(100):
        matrix = find_matrix(images, "rotate", seed)
        angle = math.atan2(float(matrix[1, 0]), float(matrix[0, 0]))
        sine, cosine = math.sin(angle), math.cos(angle)
        expected = torch.tensor([[cosine, -sine], [sine, cosine]]).double()
        torch.testing.assert_close(matrix, expected, atol=1e-6, rtol=0)
        angles.append(math.degrees(angle))
    assert -15 - 1e-6 <= min(angles) < -13
    assert 13 < max(angles) <= 15 + 1e-6


@EVERY_OPERATION
def test_the_generator_decides(operation: str) -> None:
    """Equal seeds give equal results, other seeds others; no global state is used."""
    images = batch(16, 16)
    state = torch.random.get_rng_state()
    outputs = [augment(images, operation, seed) for seed in range(12)]
    for seed, output in enumerate(outputs):
        assert torch.equal(output, augment(images, operation, seed))
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])
    assert torch.equal(state, torch.random.get_rng_state())


@EVERY_OPERATION
def test_parameters_do_not_depend_on_the_batch(operation: str) -> None:
    """An image is augmented as if it were alone, since one draw serves the batch."""
    images = batch(16, 16)
    whole = augment(images, operation, 4)
    for k in range(len(images)):
        torch.testing.assert_close(
            whole[k : k + 1], augment(images[k : k + 1], operation, 4)
        )


@EVERY_OPERATION
def test_differentiable(operation: str) -> None:
    """Gradients reach the images and match finite differences."""
    images = batch(6, 6)[1:, :, :, :].requires_grad_()
    for seed in range(3):
        assert torch.autograd.gradcheck(
            lambda x, s=seed: siamese_augment(x, operation, seeded(s)), (images,)
        )


def name_of(images: torch.Tensor, output: torch.Tensor) -> str:
    """Return the operation that was applied to a batch that starts with a ramp + 3."""
    if torch.equal(output, images):
        return "none"
    if torch.equal(output, images.flip(3)):
        return "flip"
    if slow.find_shift(images, output, 2, 2) is not None:
        return "crop"
    if torch.equal(output, images * (output != 0)):
        return "cutout"
    parameters = slow.find_colour(images[1], output[1])
    coloured = slow.per_image(images, partial(slow.colour, parameters=parameters))
    if torch.allclose(output, coloured):
        return "color"
    matrix = slow.find_matrix(output[0] - 3)
    return "rotate" if abs(float(matrix[0, 1])) > 1e-9 else "scale"


def test_no_operation_named_draws_one_of_six() -> None:
    """Each of the six is drawn about equally often."""
    images = batch(16, 16)
    counts = Counter(name_of(images, augment(images, None, s)) for s in range(300))
    assert set(counts) - {"none"} == set(OPERATIONS)
    assert 5 < counts["none"] < 50
    for operation in ("color", "cutout", "scale", "rotate", "crop"):
        assert 25 < counts[operation] < 80


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_random_crop_flip(padding: int) -> None:
    """The result is a window of the padded batch, mirrored or not."""
    images = batch(6, 8)
    padded = torch.zeros(3, 3, 6 + 2 * padding, 8 + 2 * padding, dtype=torch.float64)
    padded[:, :, padding : padding + 6, padding : padding + 8] = images
    windows = {}
    for top, left in itertools.product(range(2 * padding + 1), repeat=2):
        window = padded[:, :, top : top + 6, left : left + 8]
        windows[top, left, False] = window
        windows[top, left, True] = slow.per_image(window, slow.mirror)
    state = torch.random.get_rng_state()
    seen = set()
    for seed in range(500):
        output = random_crop_flip(images, padding, seeded(seed))
        assert torch.equal(output, random_crop_flip(images, padding, seeded(seed)))
        found = [key for key, window in windows.items() if torch.equal(output, window)]
        assert len(found) == 1
        seen.add(found[0])
    assert seen == set(windows)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("padding", [0, 2])
def test_crop_and_flip_of_each_image(padding: int) -> None:
    """Each image gets its own window; all windows are equally frequent."""
    images = batch(6, 8)[:1].expand(400, -1, -1, -1)
    output = random_crop_flip(images, padding, seeded(0), per_image=True)
    padded = torch.nn.functional.pad(images[0], (padding,) * 4)
    windows = []
    for top, left in itertools.product(range(2 * padding + 1), repeat=2):
        window = padded[:, top : top + 6, left : left + 8]
        windows += [window, window.flip(2)]
    counts = [sum(torch.equal(image, window) for image in output) for window in windows]
    assert sum(counts) == 400
    # Binomial: five standard deviations around the mean.
    mean = 400 / len(windows)
    assert all(abs(count - mean) < 5 * mean**0.5 for count in counts)
