"""Mixed views: mixup and CutMix between the images of one client."""

import copy
import math
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from client_app.chosen_views import ChosenViews, choose_views
from client_app.mixing import mix_shares, mix_views, partners
from client_app.training import (
    LocalObjective,
    PixelImages,
    label_loss,
    logit_offsets,
    train_locally,
)
from client_app.views import ViewRecipe, make_views, view_numbers
from clip2fl_common.data import demo
from clip2fl_common.data.datasets import CIFAR10_NORMALIZATION
from clip2fl_common.models import build_model
from clip2fl_common.teacher import Teacher, load_teacher
from clip2fl_common.teacher.feature_cache import content_keys
from tests.federation import federate, metrics
from tests.test_resume import Stop, go_on, outcome, run, stop_in

if TYPE_CHECKING:
    from clip2fl_common.config.types import ViewMix

MIXES: tuple["ViewMix", ...] = ("mixup", "cutmix")
RECIPES = [
    ViewRecipe(3, "crop-flip", 4, "mixup"),
    ViewRecipe(3, "resized-crop", 4, "cutmix"),
]
Keys = st.lists(st.binary(min_size=1, max_size=2), min_size=1, max_size=12)


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Teacher:
    """Return the demo's teacher with an empty cache, and batches of 4."""
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "cache"))
    return load_teacher("demo", batch_size=4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int, height: int, width: int, seed: int) -> torch.Tensor:
    shape = (count, 3, height, width)
    return torch.randint(256, shape, generator=seeded(seed), dtype=torch.uint8)


def drawn(count: int) -> torch.Tensor:
    """Return pixels [count, 3, 32, 32] of the demo."""
    return torch.from_numpy(demo.draw_images("test", 0, count))


def choose(
    pixels: torch.Tensor,
    recipe: ViewRecipe,
    teacher: Teacher,
    epochs: int = 4,
    seed: int = 0,
) -> ChosenViews:
    images = PixelImages(pixels, CIFAR10_NORMALIZATION, torch.device("cpu"))
    texts = teacher.text_features(["star", "ring", "cross"])
    return choose_views(images, recipe, epochs, seeded(seed), teacher, texts)


def slow_mix(
    first: torch.Tensor, second: torch.Tensor, numbers: list[float], mix: str
) -> tuple[torch.Tensor, Fraction]:
    """Mix two pictures pixel by pixel, in fractions; return lambda too."""
    _, height, width = first.shape
    u = numbers[0]
    share = Fraction(math.floor(max(u, 1 - u) * 65536), 65536)
    result, replaced = first.clone(), 0
    for row in range(height):
        for column in range(width):
            if mix == "cutmix":
                side = math.sqrt(1 - u)
                down = abs((row + 0.5) / height - numbers[1])
                right = abs((column + 0.5) / width - numbers[2])
                if down < side / 2 and right < side / 2:
                    result[:, row, column] = second[:, row, column]
                    replaced += 1
                continue
            for channel in range(3):
                one = int(first[channel, row, column])
                two = int(second[channel, row, column])
                mean = share * one + (1 - share) * two
                result[channel, row, column] = math.floor(mean + Fraction(1, 2))
    if mix == "cutmix":
        share = 1 - Fraction(replaced, height * width)
    return result, share


@pytest.mark.parametrize("mix", MIXES)
def test_pictures_and_shares_equal_the_slow_version(mix: "ViewMix") -> None:
    """Each is the same whatever other pictures are in the batch."""
    first, second = noise(20, 9, 6, 1), noise(20, 9, 6, 2)
    numbers = view_numbers(content_keys(first), [1] * 20, mix)
    # The ends of the range, and squares at a corner and at the centre.
    numbers[0, :3] = 0
    numbers[1, :3] = 1 - 2**-53
    numbers[2, :3] = 0.5
    mixed = mix_views(first, second, numbers, mix)
    shares = mix_shares(numbers, mix, 9, 6)
    assert mixed.dtype == torch.uint8
    for index, row in enumerate(numbers.tolist()):
        expected, share = slow_mix(first[index], second[index], row, mix)
        assert torch.equal(mixed[index], expected)
        assert float(shares[index]) == pytest.approx(float(share), abs=1e-7)
        at = slice(index, index + 1)
        alone = mix_views(first[at], second[at], numbers[at], mix)
        assert torch.equal(alone[0], mixed[index])


@pytest.mark.parametrize("mix", MIXES)
def test_picture_mixed_with_itself_is_the_picture(mix: "ViewMix") -> None:
    pictures = noise(50, 8, 8, 1)
    numbers = view_numbers(content_keys(pictures), [0] * 50, mix)
    assert torch.equal(mix_views(pictures, pictures, numbers, mix), pictures)


def test_shares_have_the_distributions_of_the_papers() -> None:
    """Means within five standard deviations of a mean of 4,000.

    A CutMix square that is cut off at the border has in expectation the area of the
    overlap of a centred interval of length s = sqrt(1 - u), squared:
    (s - s^2 / 4)^2, with s^2 uniform.
    """
    keys = [n.to_bytes(16, "little") for n in range(4000)]
    shares = mix_shares(view_numbers(keys, [0] * 4000, "mixup"), "mixup", 32, 32)
    assert shares.min() >= 0.5 and shares.max() <= 1
    assert abs(float(shares.mean()) - 0.75) < 5 * 0.25 / 3**0.5 / 4000**0.5
    shares = mix_shares(view_numbers(keys, [0] * 4000, "cutmix"), "cutmix", 32, 32)
    # With s^2 = a uniform: mean of a - a^1.5 / 2 + a^2 / 16 is 1/2 - 1/5 + 1/48.
    expected = 1 - (1 / 2 - 1 / 5 + 1 / 48)
    assert abs(float(shares.mean()) - expected) < 5 * float(shares.std()) / 4000**0.5


@given(Keys, st.integers(0, 20), st.randoms())
def test_partner_depends_on_the_set_of_images_only(
    keys: list[bytes], view: int, random: Any
) -> None:
    """Each image has another partner, and is the partner of one image."""

    def by_content(keys: list[bytes]) -> dict[bytes, bytes]:
        found = partners(keys, list(range(len(keys))), [view] * len(keys))
        return {key: keys[n] for key, n in zip(keys, found, strict=True)}

    expected = by_content(keys)
    shuffled = list(keys)
    random.shuffle(shuffled)
    assert by_content(shuffled) == by_content(sorted(set(keys))) == expected
    assert set(expected.values()) == set(keys)
    if len(set(keys)) > 1:
        assert all(key != partner for key, partner in expected.items())
    else:
        assert expected == {keys[0]: keys[0]}


@given(st.sets(st.binary(min_size=2, max_size=2), min_size=2, max_size=12))
def test_partners_of_a_view_are_those_of_no_other(keys: set[bytes]) -> None:
    """Views 0 to N - 2 of an image together are mixed with every other image."""
    count = len(keys)
    found = partners(list(keys), [0] * (count - 1), list(range(count - 1)))
    assert sorted(found) == list(range(1, count))


@pytest.mark.parametrize("recipe", RECIPES)
def test_pictures_logits_and_labels_belong_together(
    teacher: Teacher, recipe: ViewRecipe
) -> None:
    """By hand: the same view of both images, mixed, and the teacher's pass over it."""
    pixels = drawn(10)
    keys = content_keys(pixels)
    views = choose(pixels, recipe, teacher)
    texts = teacher.text_features(["star", "ring", "cross"])
    chances = [view_numbers(keys, [v] * 10, recipe.mix) for v in range(3)]
    known = [
        make_views(pixels, view_numbers(keys, [v] * 10, recipe.kind), recipe)
        for v in range(3)
    ]
    taken = set()
    for epoch in range(4):
        indices = torch.tensor([7, 2, 9, 0, 2])
        pictures, logits = views.batch(epoch, indices)
        mixture = views.mixture(epoch, indices)
        assert mixture is not None
        for n, index in enumerate(indices.tolist()):
            other = int(mixture[0][n])
            options = [
                slow_mix(
                    known[v][index],
                    known[v][other],
                    chances[v][index].tolist(),
                    recipe.mix,
                )
                for v in range(3)
            ]
            (view,) = [
                v
                for v, (picture, _) in enumerate(options)
                if torch.equal(CIFAR10_NORMALIZATION(picture[None])[0], pictures[n])
            ]
            picture, share = options[view]
            assert [other] == partners(keys, [index], [view])
            assert float(mixture[1][n]) == pytest.approx(float(share), abs=1e-7)
            expected = teacher.logit_scale * teacher.image_features(picture[None])
            torch.testing.assert_close(
                logits[n][None],
                expected @ texts.T,
                atol=1e-6 * teacher.logit_scale,
                rtol=0,
            )
            taken.add((index, view))
    assert len(taken) > 4


@pytest.mark.parametrize("recipe", RECIPES)
def test_another_order_of_the_images_needs_no_pass_of_the_teacher(
    teacher: Teacher, recipe: ViewRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client with another set of images has other partners, and needs one."""
    recipe = ViewRecipe(1, recipe.kind, recipe.padding, recipe.mix)
    pixels = drawn(10)
    first = choose(pixels, recipe, teacher)

    def refused(self: Teacher, pictures: torch.Tensor) -> torch.Tensor:
        raise Stop

    monkeypatch.setattr(Teacher, "image_features", refused)
    moved = choose(pixels.flip(0), recipe, teacher, seed=1)
    everything = torch.arange(10)
    for one, two in zip(
        first.batch(0, everything), moved.batch(0, everything), strict=True
    ):
        assert torch.equal(one.flip(0), two)
    with pytest.raises(Stop):
        choose(pixels[:5], recipe, teacher)


def test_client_with_one_image_mixes_it_with_itself(teacher: Teacher) -> None:
    plain = choose(drawn(1), ViewRecipe(3, "crop-flip", 4), teacher)
    mixed = choose(drawn(1), ViewRecipe(3, "crop-flip", 4, "cutmix"), teacher)
    index = torch.tensor([0])
    for one, two in zip(plain.batch(2, index), mixed.batch(2, index), strict=True):
        assert torch.equal(one, two)
    mixture = mixed.mixture(2, index)
    assert plain.mixture(2, index) is None
    assert mixture is not None and mixture[0].tolist() == [0]


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_label_loss_is_the_weighted_sum(strength: float) -> None:
    """Also where the logit adjustment takes out a class that the client lacks."""
    labels, others = torch.tensor([0, 1, 1, 3]), torch.tensor([1, 1, 3, 0])
    shares = torch.tensor([0.75, 0.5, 1.0, 0.0])
    logits = torch.randn(4, 5, generator=seeded(), requires_grad=True)
    scores = logits
    if strength:
        scores = logits + logit_offsets(labels, 5, strength)
    total = 0.0
    for n, row in enumerate(scores.double().tolist()):
        norm = math.log(sum(math.exp(score) for score in row))
        own, other = norm - row[labels[n]], norm - row[others[n]]
        total += float(shares[n]) * own + (1 - float(shares[n])) * other
    loss = label_loss(scores, labels, (others, shares))
    assert float(loss.detach()) == pytest.approx(total / 4, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    soft = functional.one_hot(labels, 5) * shares[:, None]
    soft = soft + functional.one_hot(others, 5) * (1 - shares[:, None])
    torch.testing.assert_close(gradient, (scores.softmax(1) - soft).detach() / 4)


def test_training_uses_mixed_pictures_and_labels(teacher: Teacher) -> None:
    """By hand, with one view of each image and logit adjustment."""
    pixels, recipe = drawn(10), ViewRecipe(1, "resized-crop", 4, "mixup")
    labels = torch.arange(10) % 3
    offsets = logit_offsets(labels, 4, 1.0)
    views = choose(pixels, recipe, teacher, epochs=2)
    texts = teacher.text_features(["star", "ring", "cross"])
    # A fourth class that nobody holds.
    views = ChosenViews(
        **{**vars(views), "logits": functional.pad(views.logits, (0, 1))}
    )
    torch.manual_seed(0)
    model = build_model("resnet8-slim", num_classes=4, feature_dim=16)
    fast = copy.deepcopy(model)
    train_locally(
        fast,
        views.images,
        labels,
        None,
        LocalObjective(0.5, 3.0, label_weight=0.7),
        epochs=2,
        batch_size=4,
        learning_rate=0.02,
        crop_padding=4,
        generator=seeded(5),
        offsets=offsets,
        views=views,
    )

    keys = content_keys(pixels)
    plain = make_views(pixels, view_numbers(keys, [0] * 10, recipe.kind), recipe)
    others = partners(keys, list(range(10)), [0] * 10)
    chances = view_numbers(keys, [0] * 10, "mixup").tolist()
    mixed = [
        slow_mix(plain[n], plain[others[n]], chances[n], "mixup") for n in range(10)
    ]
    pictures = torch.stack([picture for picture, _ in mixed])
    shares = torch.tensor([float(share) for _, share in mixed])[:, None]
    hard = functional.one_hot(labels, 4)[:, :3]
    soft = shares * hard + (1 - shares) * hard[others]
    taught = teacher.logit_scale * teacher.image_features(pictures) @ texts.T
    taught = functional.softmax(functional.pad(taught, (0, 1)) / 3, dim=1)
    inputs, generator = CIFAR10_NORMALIZATION(pictures), seeded(5)
    model.train()
    for _ in range(2):
        for batch in torch.randperm(10, generator=generator).split(4):
            logits = model(inputs[batch])
            log_student = functional.log_softmax(logits / 3, dim=1)
            divergence = taught[batch] * (taught[batch].log() - log_student)
            # The softmax over the three classes that the client holds.
            held = functional.log_softmax((logits + offsets)[:, :3], dim=1)
            loss = -0.7 * (soft[batch] * held).sum(1).mean()
            loss = loss + 0.5 * 9 * divergence.sum(1).mean()
            parameters = list(model.parameters())
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(0.02 * gradient)
    for name, value in fast.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-5, rtol=0)


@pytest.mark.usefixtures("federation_process")
def test_federation_follows_the_mixing(tmp_path: Path) -> None:
    """A second run finds all features on disk and gives the same numbers."""
    losses = []
    for mix in ("none", *MIXES):
        changes: dict[str, Any] = {
            "distillation__views": 3,
            "distillation__view_mix": mix,
        }
        federate(tmp_path / mix, "clip2fl", **changes)
        losses.append(str([line["losses"] for line in metrics(tmp_path / mix)]))
    assert len(set(losses)) == 3
    federate(tmp_path / "again", "clip2fl", nodes=3, **changes)
    assert metrics(tmp_path / "again") == metrics(tmp_path / "cutmix")


@pytest.mark.usefixtures("federation_process")
def test_resumed_run_mixes_the_same_views(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "distillation__views": 4,
        "distillation__view_mix": "mixup",
    }
    run(tmp_path / "whole", **changes)
    with pytest.raises(Stop):
        run(tmp_path / "run", stop_in(2), **changes)
    go_on(tmp_path / "run", **changes)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
