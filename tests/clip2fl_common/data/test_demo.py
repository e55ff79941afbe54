"""The drawn data set and the teacher that ships with it."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from clip2fl_common.data.demo import CLASS_NAMES, Split, demo_split, draw_images
from clip2fl_common.teacher.demo import (
    DATA_PATH,
    Tokenizer,
    load_demo_model,
    weight_paths,
)

Teacher = tuple[Any, Tokenizer, dict[str, Any]]
SPLITS: tuple[Split, ...] = ("train", "test", "teacher")
# More than the 64 images that are drawn at a time, so that the seam between two such
# groups is crossed.
PREFIX, WHOLE = 10, 100


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    """Load the shipped model once for the module."""
    return load_demo_model()


def to_input(
    images: npt.NDArray[np.uint8], preprocess_config: dict[str, Any]
) -> torch.Tensor:
    """Normalise uint8 images [N, 3, 32, 32] for the teacher."""
    mean = torch.tensor(preprocess_config["mean"])[:, None, None]
    std = torch.tensor(preprocess_config["std"])[:, None, None]
    return (torch.from_numpy(images).float() / 255 - mean) / std


@pytest.mark.parametrize("label", range(len(CLASS_NAMES)))
def test_images_are_a_function_of_their_number(label: int) -> None:
    """Drawing again, fewer, or from the middle on gives the same images."""
    whole = draw_images("train", label, WHOLE)
    assert whole.shape == (WHOLE, 3, 32, 32)
    assert whole.dtype == np.uint8
    np.testing.assert_array_equal(whole, draw_images("train", label, WHOLE))
    np.testing.assert_array_equal(whole[:PREFIX], draw_images("train", label, PREFIX))
    later = draw_images("train", label, WHOLE - PREFIX, first=PREFIX)
    np.testing.assert_array_equal(whole[PREFIX:], later)


# Mean over the first 64 images of each class.
MEANS = {
    "train": [
        *(86.629, 80.949, 86.997, 85.846, 82.314),
        *(82.777, 80.867, 77.056, 82.793, 76.791),
    ],
    "test": [
        *(83.497, 78.919, 80.285, 85.613, 78.922),
        *(84.001, 81.433, 78.887, 84.628, 81.388),
    ],
}


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_are_those_of_all_measurements(split: Split) -> None:
    """Figures in benchmarks/results hold for these images."""
    found = [draw_images(split, label, 64).mean() for label in range(10)]
    assert found == pytest.approx(MEANS[split], abs=0.05)


def test_first_test_image_is_that_of_all_measurements() -> None:
    red = draw_images("test", 0, 1)[0][0, ::8, ::8].astype(int)
    expected = [[34, 47, 77, 43], [17, 255, 73, 56], [17, 38, 35, 55], [0, 36, 42, 24]]
    np.testing.assert_allclose(red, expected, atol=1)


def test_no_image_occurs_twice() -> None:
    """Splits and classes are disjoint."""
    images = [
        draw_images(split, label, WHOLE).reshape(WHOLE, -1)
        for split in SPLITS
        for label in range(len(CLASS_NAMES))
    ]
    everything = np.concatenate(images)
    assert len({image.tobytes() for image in everything}) == len(everything)


def test_every_image_shows_something() -> None:
    """No image is of one flat colour."""
    images, _ = demo_split("test", [WHOLE] * len(CLASS_NAMES))
    assert images.astype(np.float32).std(axis=(1, 2, 3)).min() > 5


def test_split_has_the_counts_asked_for() -> None:
    """Images come grouped by class, in the classes' order."""
    counts = [5, 0, 3, 1, 0, 0, 2, 0, 0, 4]
    images, labels = demo_split("train", counts)
    assert images.shape == (sum(counts), 3, 32, 32)
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(np.bincount(labels, minlength=10), counts)
    np.testing.assert_array_equal(images[5:8], draw_images("train", 2, 3))


def test_split_refuses_a_wrong_number_of_classes() -> None:
    """There must be one count for each class."""
    with pytest.raises(ValueError, match="counts has 2 entries"):
        demo_split("train", [1, 2])


def test_teacher_file_fits_the_bundle() -> None:
    """A Flower bundle is limited in size."""
    for file in (DATA_PATH, *weight_paths()):
        assert file.stat().st_size < 2**20  # Flower publishes no larger ones


def test_teacher_is_a_frozen_open_clip_model(teacher: Teacher) -> None:
    """The demo teacher differs from a real CLIP model only by its size and weights."""
    import open_clip

    model, _, _ = teacher
    assert isinstance(model, open_clip.CLIP)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.logit_scale.exp().item() == pytest.approx(100.0, rel=1e-5)


def test_loading_the_teacher_leaves_the_generator_alone() -> None:
    """A run's random draws do not depend on which teacher it loads."""
    before = torch.get_rng_state()
    load_demo_model()
    assert torch.equal(torch.get_rng_state(), before)


def test_teacher_knows_the_shapes_by_their_names(teacher: Teacher) -> None:
    """Zero-shot accuracy is at least 85 % on 50 test images of each class."""
    model, tokenizer, preprocess_config = teacher
    images, labels = demo_split("test", [50] * len(CLASS_NAMES))
    with torch.no_grad():
        text = model.encode_text(tokenizer([f"a photo of a {n}" for n in CLASS_NAMES]))
        image = model.encode_image(to_input(images, preprocess_config))
    assert text.shape == (10, 512)
    assert image.shape == (500, 512)
    text, image = (x / x.norm(dim=1, keepdim=True) for x in (text, image))
    for features in (text, image):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))
    correct = (image @ text.T).argmax(dim=1) == torch.from_numpy(labels)
    assert correct.float().mean().item() >= 0.85


@pytest.mark.parametrize(
    "change",
    [
        "missing",
        "cut",
        "not json",
        "other format",
        "no weights",
        "bits",
        "other weights",
    ],
)
def test_damaged_teacher_file_is_named(tmp_path: Path, change: str) -> None:
    """The error names the file and the command that makes it again."""
    path = tmp_path / "teacher.json"
    text = DATA_PATH.read_text(encoding="utf-8")
    broken = {
        "cut": text[: len(text) // 2],
        "not json": "teacher",
        "other format": '{"format": "another"}',
    }
    if change != "missing":
        path.write_text(broken.get(change, text), encoding="utf-8")
    if change != "no weights":
        first, second = (part.read_text("utf-8") for part in weight_paths())
        first = {
            "bits": first.replace('"', '"AAAA', 1),
            "other weights": first[:-200] + "A" * 198 + first[-2:],
        }.get(change, first)
        for part, content in zip(weight_paths(path), (first, second), strict=True):
            part.write_text(content, "utf-8")
    with pytest.raises(ValueError, match="train_demo_teacher") as raised:
        load_demo_model(path)
    assert str(path) in str(raised.value)
