"""Central evaluation against a slow pass, image by image."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from clip2fl_common.config import ConfigError
from clip2fl_common.data.datasets import (
    ImageDataset,
    ImageSource,
    LoadedImages,
    Normalization,
)
from clip2fl_common.metrics import AccuracyReport, ShotGroups
from clip2fl_common.models import ImageClassifier, build_model
from server_app import evaluation
from server_app.evaluation import Evaluator, tuning_images

CLASSES, DIM, SIZE = 4, 16, 8
GROUPS = ShotGroups("rank", many=(0,), medium=(1, 2), few=(3,))


class Source:
    """Random images that count how often they are read.

    Parameters
    ----------
    per_class : sequence of int
        Images of each class, in shuffled order.
    unreadable : int
        Images at the end that cannot be read, each time they are.
    """

    def __init__(self, per_class: Sequence[int], unreadable: int = 0) -> None:
        rng = np.random.default_rng(0)
        labels = np.repeat(np.arange(len(per_class)), per_class)
        self.labels: npt.NDArray[np.int64] = rng.permutation(labels)
        pixels = rng.integers(0, 256, (len(labels), 3, SIZE, SIZE), dtype=np.uint8)
        self.images = torch.from_numpy(pixels)
        self.unreadable = unreadable
        self.reads: list[int] = []

    def load(self, indices: npt.NDArray[np.integer]) -> LoadedImages:
        """Return the images at these indices, in their order."""
        self.reads.append(len(indices))
        unreadable = indices >= len(self.labels) - self.unreadable
        readable = indices[~unreadable]
        left_out = tuple(np.flatnonzero(unreadable).tolist())
        return LoadedImages(
            self.images[readable],
            torch.from_numpy(self.labels[readable]),
            ("x.png",) * len(left_out),
            left_out,
        )

    open = load


def evaluator(
    source: Source,
    max_images: int = 0,
    batch_size: int = 7,
    seed: int = 7,
    tuning_share: float = 0.0,
) -> Evaluator:
    """Return the evaluator of a data set with these test images."""
    test: ImageSource = source
    dataset = ImageDataset(
        name="random",
        class_names=("a", "b", "c", "d"),
        train=test,
        test=test,
        normalization=Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
        image_size=SIZE,
    )
    device = torch.device("cpu")
    return Evaluator(
        dataset, GROUPS, max_images, batch_size, device, seed, tuning_share
    )


def student() -> ImageClassifier:
    """Return a model that does not predict one class for all images."""
    torch.manual_seed(1)
    return build_model("resnet8-slim", CLASSES, DIM)


def heads() -> dict[str, nn.Linear]:
    """Return two classifiers that differ."""
    torch.manual_seed(2)
    return {name: nn.Linear(DIM, CLASSES) for name in ("retrained", "fedavg")}


def slow_report(
    source: Source,
    indices: Sequence[int],
    model: ImageClassifier,
    head: nn.Linear,
    drawn_from: Sequence[int] | None = None,
) -> AccuracyReport:
    """Evaluate image by image and class by class; drawn images stand for all others."""
    model.eval()
    mean = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    std = torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    hits: dict[int, list[bool]] = {c: [] for c in range(CLASSES)}
    for i in indices:
        with torch.no_grad():
            x = (source.images[i] / 255 - mean) / std
            predicted = int(head(model.features(x[None]))[0].argmax())
        hits[int(source.labels[i])].append(predicted == source.labels[i])
    recall = [100 * sum(h) / len(h) for h in hits.values()]
    there = source.labels[list(indices if drawn_from is None else drawn_from)].tolist()
    return AccuracyReport(
        top1=sum(recall[label] for label in there) / len(there),
        balanced=sum(recall) / CLASSES,
        many=recall[0],
        medium=(recall[1] + recall[2]) / 2,
        few=recall[3],
        per_class=tuple(recall),
    )


def close(report: AccuracyReport, expected: AccuracyReport) -> bool:
    """Return whether two reports agree."""
    same = [
        getattr(report, name) == pytest.approx(getattr(expected, name))
        for name in ("top1", "balanced", "many", "medium", "few", "per_class")
    ]
    return all(same)


class PlacedHead(nn.Linear):
    """A classifier that says on which device it met which features."""

    met: ClassVar[list[tuple[str, str]]] = []

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.met.append((self.weight.device.type, features.device.type))
        return torch.zeros(len(features), CLASSES)


def test_heads_come_to_the_device_of_the_features() -> None:
    """Whoever made them: the discriminant is computed on the CPU.

    torch's device without memory stands for a GPU. A method's own classifier stays
    where it is, or the method's next round would mix two devices.
    """
    source = Source([9, 5, 12, 6])
    central = replace(evaluator(source), device=torch.device("meta"))
    head = PlacedHead(DIM, CLASSES)
    central.evaluate(student(), {"discriminant": head}, final=True)
    assert set(PlacedHead.met) == {("meta", "meta")}
    assert head.weight.device.type == "cpu"


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize(("batch_size", "block"), [(7, 1024), (100, 10), (1, 3)])
def test_both_heads_from_one_pass_equal_the_slow_evaluation(
    monkeypatch: pytest.MonkeyPatch, final: bool, batch_size: int, block: int
) -> None:
    monkeypatch.setattr(evaluation, "BLOCK", block)
    source = Source([9, 5, 12, 6])
    central = evaluator(source, max_images=8, batch_size=batch_size)
    model, classifiers = student(), heads()
    reports = central.evaluate(model, classifiers, final)
    used = central.indices(final)
    assert len(used) == (32 if final else 8)
    assert sum(source.reads) == len(used)  # one pass serves both heads
    expected = {
        name: slow_report(source, used.tolist(), model, head, range(32))
        for name, head in classifiers.items()
    }
    assert list(reports) == ["retrained", "fedavg"]
    assert all(close(reports[name], expected[name]) for name in expected)
    assert reports["retrained"].per_class != reports["fedavg"].per_class


def test_evaluation_uses_running_statistics() -> None:
    """A model in training mode is evaluated in evaluation mode, and not changed."""
    central = evaluator(Source([5, 5, 5, 5]))
    model = student().train()
    before = model.get_buffer("bn1.running_mean").clone()
    first = central.evaluate(model, heads(), final=True)
    assert torch.equal(model.get_buffer("bn1.running_mean"), before)
    assert central.evaluate(model, heads(), final=True) == first


def test_subset_is_drawn_evenly_and_from_the_seed() -> None:
    source = Source([30, 10, 20, 40])
    drawn = evaluator(source, max_images=20).indices(final=False)
    assert np.bincount(source.labels[drawn]).tolist() == [5, 5, 5, 5]
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    again = evaluator(source, max_images=20).indices(final=False)
    other = evaluator(source, max_images=20, seed=8).indices(final=False)
    assert again.tolist() == drawn.tolist()
    assert other.tolist() != drawn.tolist()


def test_class_with_too_few_images_gives_all_it_has() -> None:
    source = Source([30, 2, 20, 40])
    drawn = evaluator(source, max_images=20).indices(final=False)
    assert np.bincount(source.labels[drawn]).tolist() == [5, 2, 5, 5]


@given(
    st.lists(st.integers(2, 60), min_size=1, max_size=4),
    st.integers(2, 20),
    st.floats(0.05, 0.95),
    st.integers(0, 99),
)
def test_drawn_images_have_both_parts_of_each_class(
    per_class: list[int], each: int, share: float, seed: int
) -> None:
    """For every seed; otherwise accuracy on a part would be of other classes."""
    source = Source([*per_class, *[40] * (4 - len(per_class))])
    tuning = tuning_images(source.labels, share)
    limit = 4 * each
    assume(limit < len(source.labels) and 0 < tuning.sum() < len(tuning))
    central = evaluator(source, max_images=limit, seed=seed, tuning_share=share)
    drawn = central.indices(final=False)
    for label in range(4):
        whole = np.flatnonzero(source.labels == label)
        own = drawn[source.labels[drawn] == label]
        assert len(own) == min(each, len(whole))
        found, there = tuning[own].sum(), tuning[whole].sum()
        assert (found > 0) == (there > 0)
        assert (found < len(own)) == (there < len(whole))
        if 0 < there < len(whole):
            wanted = len(own) * there / len(whole)
            assert abs(found - min(max(wanted, 1), len(own) - 1)) <= 0.5


@pytest.mark.parametrize("max_images", [0, 22, 1000])
def test_limit_that_does_not_bind_uses_all(max_images: int) -> None:
    central = evaluator(Source([9, 5, 2, 6]), max_images=max_images)
    assert central.indices(final=False).tolist() == list(range(22))


def test_final_evaluation_uses_all() -> None:
    central = evaluator(Source([9, 5, 2, 6]), max_images=4)
    assert central.indices(final=True).tolist() == list(range(22))
    assert len(central.indices(final=False)) == 4


def test_images_are_kept_in_memory_where_they_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The accuracy is the same for images in memory and images read again."""
    reports, reads = [], []
    for limit in (3 * SIZE * SIZE * 20, 3 * SIZE * SIZE * 20 - 1):
        monkeypatch.setattr(evaluation, "KEEP_BYTES", limit)
        source = Source([5, 5, 5, 5])
        central = evaluator(source)
        model, classifiers = student(), heads()
        for _ in range(3):
            reports.append(central.evaluate(model, classifiers, final=False))
        reads.append(source.reads)
    assert reads == [[20], [20, 20, 20]]
    assert all(report == reports[0] for report in reports)


def test_drawn_images_are_kept_where_they_fit_and_all_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluation, "KEEP_BYTES", 3 * SIZE * SIZE * 8)
    source = Source([5, 5, 5, 5])
    central = evaluator(source, max_images=8)
    for final in (False, False, True, True):
        central.evaluate(student(), heads(), final)
    assert source.reads == [8, 20, 20]


def test_unreadable_images_are_counted_each_time() -> None:
    """The count is the same if the readable images come from memory."""
    source = Source([9, 5, 12, 6], unreadable=3)
    central = evaluator(source)
    for _ in range(2):
        reports = central.evaluate(student(), heads(), final=True)
        assert central.unreadable == 3
    model, head = student(), heads()["fedavg"]
    assert close(reports["fedavg"], slow_report(source, range(29), model, head))


def test_images_for_tuning_stay_the_same() -> None:
    """These were drawn when the key was introduced; results refer to them."""
    labels = Source([9, 5, 12, 6]).labels
    drawn = np.flatnonzero(tuning_images(labels, 0.25)).tolist()
    assert drawn == [4, 12, 18, 22, 24, 27, 29, 30]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.one_of(st.just(0.0), st.floats(1e-3, 0.999)),
)
def test_each_class_gives_its_share(per_class: list[int], share: float) -> None:
    labels = Source(per_class).labels
    drawn = np.bincount(labels[tuning_images(labels, share)], minlength=len(per_class))
    off = np.abs(drawn - share * np.array(per_class))
    assert (off <= 0.5 + 1e-9).all()


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("seed", [7, 8])
@pytest.mark.parametrize("block", [1024, 5])
def test_parts_equal_the_slow_evaluation(
    monkeypatch: pytest.MonkeyPatch, final: bool, seed: int, block: int
) -> None:
    """The images for tuning are the same for each seed, in subsets, with files lost."""
    monkeypatch.setattr(evaluation, "BLOCK", block)
    source = Source([18, 16, 20, 14], unreadable=5)
    central = evaluator(source, max_images=40, seed=seed, tuning_share=0.4)
    tuning = set(np.flatnonzero(tuning_images(source.labels, 0.4)).tolist())
    model, classifiers = student(), heads()
    whole = central.evaluate(model, classifiers, final)
    used = [i for i in central.indices(final).tolist() if i < 68 - 5]
    assert len(used) > 30 and central.unreadable > 0
    of_part = {
        "tuning": [i for i in used if i in tuning],
        "held_out": [i for i in used if i not in tuning],
    }
    assert list(central.parts) == ["tuning", "held_out"]
    for name, head in classifiers.items():
        for part, indices in of_part.items():
            there = [i for i in range(68) if (i in tuning) == (part == "tuning")]
            there = indices if final else there
            expected = slow_report(source, indices, model, head, there)
            assert close(central.parts[part][name], expected)
        there = used if final else list(range(68))
        assert close(whole[name], slow_report(source, used, model, head, there))


def test_without_a_share_there_are_no_parts() -> None:
    central = evaluator(Source([9, 5, 12, 6]))
    central.evaluate(student(), heads(), final=True)
    assert central.parts == {} and central.part_sizes() == {}


def test_number_of_images_of_each_part() -> None:
    """Of 10, 5, 2 and 0 images, rounded to even: 3, 2, 1 and 0."""
    central = evaluator(Source([10, 5, 2, 0]), tuning_share=0.3)
    assert central.part_sizes() == {"tuning": 3 + 2 + 1, "held_out": 11}


@pytest.mark.parametrize(
    ("share", "max_images", "said"),
    [
        (0.01, 0, r"share = 0\.01 leaves 0 of 40 test images .* and 40 held out"),
        (0.99, 0, r"share = 0\.99 leaves 40 of 40 test images .* and 0 held out"),
        (0.1, 1, r"leaves 0 of 4 test images \(evaluation\.max-images = 1\)"),
    ],
)
def test_part_without_images_is_refused(
    share: float, max_images: int, said: str
) -> None:
    source = Source([10, 10, 10, 10])
    with pytest.raises(ConfigError, match=said):
        evaluator(source, max_images=max_images, seed=8, tuning_share=share)


def test_part_whose_files_are_all_lost_is_named() -> None:
    """With the one image for tuning unreadable, nothing is left to choose on."""
    source = Source([2, 2, 2, 3])
    place = int(np.flatnonzero(tuning_images(source.labels, 0.25))[-1])
    source.unreadable = len(source.labels) - place
    central = evaluator(source, tuning_share=0.25)
    assert central.part_sizes() == {"tuning": 1, "held_out": 8}
    with pytest.raises(ConfigError, match="leaves 0 of"):
        central.evaluate(student(), heads(), final=True)
