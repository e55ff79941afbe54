"""Views: fixed augmented pictures, and the teacher's logits of the same pictures."""

import copy
import hashlib
import itertools
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from client_app import chosen_views
from client_app.chosen_views import choose_views
from client_app.training import LocalObjective, PixelImages, train_locally
from client_app.views import ViewRecipe, make_views, view_numbers
from clip2fl_common.config.types import ViewMix
from clip2fl_common.data import demo
from clip2fl_common.data.datasets import CIFAR10_NORMALIZATION
from clip2fl_common.models import build_model
from clip2fl_common.teacher import Teacher, load_teacher
from clip2fl_common.teacher.feature_cache import FeatureCache, content_keys
from tests.client_app import slow_augmentation as slow
from tests.federation import federate, metrics
from tests.site_folders import write_site
from tests.test_resume import Stop, go_on, outcome, run, stop_in
from tests.test_sites import federate as federate_sites

CPU = torch.device("cpu")
CROP = ViewRecipe(3, "crop-flip", 4)
RESIZED = ViewRecipe(3, "resized-crop", 4)


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Teacher:
    """Return the demo's teacher with an empty cache, and batches of 4."""
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "cache"))
    return load_teacher("demo", batch_size=4)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of pictures in each of the teacher's forward passes."""
    passes: list[int] = []
    original = Teacher.image_features

    def counted(self: Teacher, pictures: torch.Tensor) -> torch.Tensor:
        passes.append(len(pictures))
        return original(self, pictures)

    monkeypatch.setattr(Teacher, "image_features", counted)
    return passes


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(count: int) -> torch.Tensor:
    """Return pixels [count, 3, 32, 32] of the demo."""
    return torch.from_numpy(demo.draw_images("test", 0, count))


def noise(count: int, height: int, width: int) -> torch.Tensor:
    shape = (count, 3, height, width)
    return torch.randint(256, shape, generator=seeded(1), dtype=torch.uint8)


def images_of(pixels: torch.Tensor) -> PixelImages:
    return PixelImages(pixels, CIFAR10_NORMALIZATION, CPU)


def views_of(pixels: torch.Tensor, view: int, recipe: ViewRecipe) -> torch.Tensor:
    """Return one view of each image."""
    numbers = view_numbers(content_keys(pixels), [view] * len(pixels), recipe.kind)
    return make_views(pixels, numbers, recipe)


def prototypes(teacher: Teacher) -> torch.Tensor:
    return teacher.text_features(["star", "ring", "cross"])


def test_numbers_are_a_hash_of_image_view_and_kind() -> None:
    key = b"0123456789abcdef"
    whole = hashlib.blake2b(key + b"\x02\0\0\0", person=b"crop-flip").digest()
    expected = [
        (int.from_bytes(whole[start : start + 8], "little") >> 11) / 2**53
        for start in range(0, 64, 8)
    ]
    assert view_numbers([key], [2], "crop-flip")[0].tolist() == expected
    keys = [n.to_bytes(16, "little") for n in range(1000)]
    numbers = view_numbers(keys, [0] * 1000, "crop-flip")
    others = view_numbers(keys, [1] * 1000, "crop-flip")
    kinds = view_numbers(keys, [0] * 1000, "resized-crop")
    together = torch.cat([numbers, others, kinds])
    assert len(together.unique()) == together.numel()
    # Five standard deviations of a mean of 3,000 uniform numbers.
    assert (together.mean(0) - 0.5).abs().max() < 5 * (1 / 12 / 3000) ** 0.5
    assert 0 <= together.min() and together.max() < 1


@pytest.mark.parametrize("recipe", [CROP, RESIZED])
@pytest.mark.parametrize("size", [(32, 32), (17, 23), (224, 224)])
def test_view_does_not_depend_on_the_batch(
    recipe: ViewRecipe, size: tuple[int, int]
) -> None:
    pixels = noise(5, *size)
    together = views_of(pixels, 1, recipe)
    alone = torch.cat([views_of(image[None], 1, recipe) for image in pixels])
    assert together.dtype == torch.uint8 and together.shape == pixels.shape
    assert torch.equal(together, alone)
    assert not torch.equal(together, views_of(pixels, 2, recipe))
    assert not torch.equal(together, pixels)


@pytest.mark.parametrize("padding", [0, 2])
def test_crop_flip_equals_the_slow_version(padding: int) -> None:
    """Every window of the padded image is a view, mirrored or not."""
    pixels = noise(1, 5, 7)
    recipe = ViewRecipe(1, "crop-flip", padding)
    corners = range(2 * padding + 1)
    for top, left, mirrored in itertools.product(corners, corners, (False, True)):
        numbers = torch.full((1, 8), 0.9, dtype=torch.float64)
        numbers[0, 0] = (top + 0.99) / len(corners)
        numbers[0, 1] = (left + 0.01) / len(corners)
        numbers[0, 2] = 0.49 if mirrored else 0.51
        expected = slow.shift(pixels[0], top - padding, left - padding)
        if mirrored:
            expected = slow.mirror(expected)
        assert torch.equal(make_views(pixels, numbers, recipe)[0], expected)


def slow_resized_crop(image: torch.Tensor, numbers: list[float]) -> torch.Tensor:
    """Interpolate pixel by pixel; then scale brightness, contrast and saturation."""
    _, height, width = image.shape
    area, aspect = 0.35 + 0.65 * numbers[0], (4 / 3) ** (2 * numbers[1] - 1)
    wide = min(1.0, math.sqrt(area * aspect)) * width
    high = min(1.0, math.sqrt(area / aspect)) * height
    left, top = (width - wide) * numbers[2], (height - high) * numbers[3]
    result = torch.zeros(image.shape, dtype=torch.float64)
    for row, column in itertools.product(range(height), range(width)):
        source = width - 1 - column if numbers[4] < 0.5 else column
        x = min(max(left + (source + 0.5) * wide / width - 0.5, 0), width - 1)
        y = min(max(top + (row + 0.5) * high / height - 0.5, 0), height - 1)
        x0, y0 = math.floor(x), math.floor(y)
        x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
        upper = (1 - x + x0) * image[:, y0, x0] + (x - x0) * image[:, y0, x1]
        lower = (1 - x + x0) * image[:, y1, x0] + (x - x0) * image[:, y1, x1]
        result[:, row, column] = (1 - y + y0) * upper + (y - y0) * lower
    brightness, contrast, saturation = (0.6 + 0.8 * number for number in numbers[5:])
    result = (result * brightness).clamp(0, 255)
    mean = result.mean()
    result = ((result - mean) * contrast + mean).clamp(0, 255)
    grey = result.mean(0)
    return ((result - grey) * saturation + grey).clamp(0, 255)


def test_resized_crop_equals_the_slow_version() -> None:
    """One rounding in between is scaled by at most 1.4 * (1 + 0.4 * 4 / 3)."""
    pixels = noise(12, 9, 6)
    numbers = view_numbers(content_keys(pixels), list(range(12)), "resized-crop")
    for image, row, view in zip(
        pixels, numbers.tolist(), make_views(pixels, numbers, RESIZED), strict=True
    ):
        expected = slow_resized_crop(image, row)
        assert (view - expected).abs().max() < 0.5 + 0.5 * 1.4 * (1 + 0.4 * 4 / 3)
        assert (view - expected).mean().abs() < 0.2


def test_resized_crop_of_the_whole_image_is_the_image() -> None:
    pixels = drawn(3)
    numbers = torch.full((3, 8), 0.5, dtype=torch.float64)
    numbers[:, 0] = 1 - 2**-53
    assert torch.equal(make_views(pixels, numbers, RESIZED), pixels)


@pytest.mark.parametrize("recipe", [CROP, RESIZED])
def test_logits_are_the_teachers_of_the_very_pictures(
    teacher: Teacher, recipe: ViewRecipe
) -> None:
    """Pictures of a batch are views of its images, another choice in each epoch."""
    pixels, texts = drawn(10), prototypes(teacher)
    views = choose_views(images_of(pixels), recipe, 4, seeded(), teacher, texts)
    known = torch.stack([views_of(pixels, view, recipe) for view in range(3)])
    taken = set()
    for epoch in range(4):
        indices = torch.tensor([7, 2, 9, 0, 2])
        pictures, logits = views.batch(epoch, indices)
        for index, picture, logit in zip(indices, pictures, logits, strict=True):
            options = CIFAR10_NORMALIZATION(known[:, index])
            (view,) = [v for v in range(3) if torch.equal(options[v], picture)]
            taken.add((int(index), view))
            expected = teacher.image_features(known[view, index][None]) @ texts.T
            torch.testing.assert_close(
                logit[None],
                teacher.logit_scale * expected,
                atol=1e-6 * teacher.logit_scale,
                rtol=0,
            )
    assert len(taken) > 4
    again = choose_views(images_of(pixels), recipe, 4, seeded(), teacher, texts)
    other = choose_views(images_of(pixels), recipe, 4, seeded(1), teacher, texts)
    assert torch.equal(again.rows, views.rows)
    assert torch.equal(again.logits, views.logits)
    # Numbers differ where another set of views was taken.
    assert not (
        views.numbers.shape == other.numbers.shape
        and torch.equal(views.numbers[views.rows], other.numbers[other.rows])
    )


def test_clients_and_runs_share_views(teacher: Teacher, seen: list[int]) -> None:
    """The same images in other places, and another seed: no view is new."""
    pixels, texts = drawn(10), prototypes(teacher)
    recipe = ViewRecipe(1, "crop-flip", 4)
    first = choose_views(images_of(pixels), recipe, 2, seeded(), teacher, texts)
    assert seen == [4, 4, 2]
    moved = images_of(pixels.flip(0)[:6])
    second = choose_views(moved, recipe, 2, seeded(1), teacher, texts)
    assert seen == [4, 4, 2]
    for one, two in zip(
        first.batch(0, torch.arange(4, 10)),
        second.batch(1, torch.arange(6)),
        strict=True,
    ):
        assert torch.equal(one.flip(0), two)


def test_new_and_stored_logits_are_the_same_to_the_last_digit(
    teacher: Teacher,
) -> None:
    """Also those of equal pictures, and where half of them are stored."""
    pixels = drawn(12)[[0, 1, 0, 2, 1, 0, 3, 4, 5, 6, 7, 8, 9, 9]]
    texts = prototypes(teacher)
    recipe = ViewRecipe(4, "crop-flip", 1)

    def logits(epochs: int) -> torch.Tensor:
        views = choose_views(
            images_of(pixels), recipe, epochs, seeded(), teacher, texts
        )
        return views.logits

    logits(1)
    first = logits(6)
    for _ in range(2):
        assert torch.equal(logits(6), first)


@pytest.mark.parametrize("mix", ["none", "cutmix"])
def test_each_view_is_made_once_and_looked_up_at_once_if_a_round_fits_the_memory(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, mix: ViewMix
) -> None:
    """Else each batch of the training makes its views again: the same ones."""
    images, texts = images_of(drawn(13)), prototypes(teacher)
    recipe = ViewRecipe(5, "resized-crop", 4, mix)
    made, looked_up = [], []
    get = FeatureCache.get

    def counted(pixels: torch.Tensor, *given: Any) -> torch.Tensor:
        made.append(len(pixels))
        return make_views(pixels, *given)

    def watched(self: FeatureCache, keys: Sequence[bytes]) -> Any:
        looked_up.append(len(keys))
        return get(self, keys)

    monkeypatch.setattr(chosen_views, "make_views", counted)
    monkeypatch.setattr(FeatureCache, "get", watched)

    def a_round() -> tuple[torch.Tensor, list[torch.Tensor]]:
        views = choose_views(images, recipe, 2, seeded(), teacher, texts)
        order = torch.randperm(13, generator=seeded(2))
        batches = [views.batch(epoch, order[:6]) for epoch in range(2)]
        return views.logits, [tensor for batch in batches for tensor in batch]

    logits, kept = a_round()
    count = len(logits)
    assert count > 13 and looked_up == [count]
    assert sum(made) == count * (1 if mix == "none" else 2)
    # Two batches of four pictures at once.
    monkeypatch.setattr(chosen_views, "KEPT_BYTES", 11 * images.pixels[0].nbytes)
    again, made_again = a_round()
    assert looked_up == [count, *[8] * (count // 8), *[count % 8] * (count % 8 > 0)]
    assert torch.equal(again, logits)
    assert all(map(torch.equal, made_again, kept))


def test_killed_computation_goes_on(
    tmp_path: Path,
    teacher: Teacher,
    seen: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the batch at which the client was killed is computed again."""
    pixels, texts = drawn(10), prototypes(teacher)
    counted = Teacher.image_features

    def views() -> Any:
        return choose_views(
            images_of(pixels),
            ViewRecipe(1, "resized-crop", 4),
            1,
            seeded(),
            teacher,
            texts,
        )

    def killed(self: Teacher, pictures: torch.Tensor) -> torch.Tensor:
        if len(seen) == 2:
            raise Stop
        return counted(self, pictures)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "image_features", killed)
        with pytest.raises(Stop):
            views()
    assert seen == [4, 4]
    resumed = views()
    assert seen == [4, 4, 2]
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "another"))
    teacher = load_teacher("demo", batch_size=4)
    assert torch.equal(views().logits, resumed.logits)
    assert seen == [4, 4, 2, 4, 4, 2]


def test_long_passes_are_logged(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each batch takes 90 seconds by this clock."""
    pixels, texts = drawn(14), prototypes(teacher)
    clock = itertools.count(0.0, 90.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    recipe = ViewRecipe(1, "crop-flip", 4)
    with caplog.at_level("INFO", logger="flwr"):
        choose_views(images_of(pixels), recipe, 1, seeded(), teacher, texts)
    assert [record.getMessage() for record in caplog.records] == [
        "teacher demo looks at 14 views, once; this takes at most about 135 s",
        "teacher demo: 12 of 14 views done; at most about 45 s to go",
    ]


def test_training_on_one_view_is_training_on_fixed_pictures(teacher: Teacher) -> None:
    """By hand: no crop, no flip, and one picture and one logit of each image."""
    pixels, texts = drawn(10), prototypes(teacher)
    labels = torch.arange(10) % 3
    recipe = ViewRecipe(1, "resized-crop", 4)
    torch.manual_seed(0)
    model = build_model("resnet8-slim", num_classes=3, feature_dim=16)
    fast = copy.deepcopy(model)
    losses = train_locally(
        fast,
        images_of(pixels),
        labels,
        None,
        LocalObjective(0.5, 3.0),
        epochs=2,
        batch_size=4,
        learning_rate=0.02,
        crop_padding=4,
        generator=seeded(5),
        views=choose_views(images_of(pixels), recipe, 2, seeded(6), teacher, texts),
    )

    pictures = views_of(pixels, 0, recipe)
    soft = functional.softmax(
        teacher.logit_scale * teacher.image_features(pictures) @ texts.T / 3, dim=1
    )
    inputs, generator = CIFAR10_NORMALIZATION(pictures), seeded(5)
    model.train()
    for _ in range(2):
        total = 0.0
        for batch in torch.randperm(10, generator=generator).split(4):
            logits = model(inputs[batch])
            log_student = functional.log_softmax(logits / 3, dim=1)
            divergence = soft[batch] * (soft[batch].log() - log_student)
            loss = functional.cross_entropy(logits, labels[batch])
            loss = loss + 0.5 * 9 * divergence.sum(1).mean()
            parameters = list(model.parameters())
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(0.02 * gradient)
            total += loss.item() * len(batch)
    for name, value in fast.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-5, rtol=0)
    assert losses.total == pytest.approx(total / 10, abs=1e-5)
    assert losses.distillation > 0


@pytest.mark.usefixtures("federation_process")
def test_federation_follows_number_and_kind_of_views(tmp_path: Path) -> None:
    """A second run finds all features on disk and gives the same numbers."""
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "one": {"distillation__views": 1},
        "five": {"distillation__views": 5},
        "resized": {
            "distillation__views": 5,
            "distillation__view_kind": "resized-crop",
        },
    }
    losses = []
    for name, changes in settings.items():
        federate(tmp_path / name, "clip2fl", **changes)
        losses.append(str([line["losses"] for line in metrics(tmp_path / name)]))
    assert len(set(losses)) == len(settings)
    federate(tmp_path / "again", "clip2fl", nodes=3, **settings["resized"])
    assert metrics(tmp_path / "again") == metrics(tmp_path / "resized")


@pytest.mark.usefixtures("federation_process")
def test_resumed_run_takes_the_same_views(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"distillation__views": 4}
    run(tmp_path / "whole", **changes)
    with pytest.raises(Stop):
        run(tmp_path / "run", stop_in(2), **changes)
    go_on(tmp_path / "run", **changes)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.usefixtures("federation_process")
def test_sites_train_on_views_of_their_own_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strategy.grid.POLL_S", 0.0)
    folders = [
        write_site(tmp_path / f"private-{n}", {"circle": 4, "square": 4}, first=10 * n)
        for n in range(2)
    ]
    found = []
    for views in (0, 3):
        federate_sites(
            tmp_path / f"run-{views}", folders, ["a", "b"], distillation__views=views
        )
        found.append([line["losses"] for line in metrics(tmp_path / f"run-{views}")])
    assert found[0] != found[1]
