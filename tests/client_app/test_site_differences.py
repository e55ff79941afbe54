"""Test that a curious server cannot find a single image by many requests.

The server's classifier has no weights, so every image has the same residual. Then the
row of a class gradient over its bias is the plain mean of the features of its images.
"""

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from clip2fl_common.config import RunConfig
from clip2fl_common.data.datasets import IMAGENET_NORMALIZATION, FileSource, open_site
from clip2fl_common.data.image_reading import (
    Picture,
    UnreadableImageError,
    read_image,
    read_picture,
)
from tests.conftest import be_flower
from tests.site_folders import write_site
from tests.site_node import (
    SiteNode,
    gradients,
    images_in,
    mean_features,
    same,
    site_run,
    student,
)

BOUND = 4


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use another cache than the user's; identify as one of Flower's processes."""
    be_flower(tmp_path / "cache", monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a site's images."""
    return write_site(tmp_path / "private", {"circle": 30, "star": 20})


def training_files(folder: Path, name: str, config: RunConfig) -> list[Path]:
    """Return the training files of a class."""
    source = open_site(config.dataset, folder).train
    assert isinstance(source, FileSource)
    return [path for path in source.paths if path.parent.name == name]


@torch.no_grad()
def features(paths: list[Path]) -> npt.NDArray[Any]:
    """Return each image's feature under the model that the server sends."""
    images = np.stack([read_image(path, 16) for path in paths])
    found = student().eval().features(IMAGENET_NORMALIZATION(torch.from_numpy(images)))
    array: npt.NDArray[Any] = found.numpy()
    return array


def is_one_of(vector: npt.NDArray[Any], known: npt.NDArray[Any]) -> bool:
    """Return whether a vector is the feature of one image, up to its length."""
    size = np.linalg.norm(vector) * np.linalg.norm(known, axis=1)
    return bool((known @ vector > 0.9999 * size).any())


def test_one_image_in_a_draw_is_its_feature_and_is_refused(folder: Path) -> None:
    """The bound counts the images that enter the gradient, not the images held."""
    single = site_run(class_gradients__samples_per_class=1)
    known = features(training_files(folder, "circle", single))
    plain = SiteNode(folder).ask("train", single)
    assert is_one_of(mean_features(plain)["circle"], known)  # the leak is real
    refused = SiteNode(folder, {"min_class_samples": BOUND}).ask("train", single)
    assert refused.has_error()


@pytest.mark.parametrize(
    "changes",
    [
        [{"class_gradients__samples_per_class": n} for n in (4, 5, 6, 40)],
        [{"class_gradients__samples_per_class": 8, "seed": n} for n in range(4)],
        [
            {"class_gradients__samples_per_class": 8, "class_gradients__draws": n}
            for n in (1, 2, 3)
        ],
        [{"dataset__validation_share": n} for n in (0.2, 0.25, 0.3, 0.6)],
        [{"privacy__min_class_samples": n} for n in (1, 4, 8)],
        [{"dataset__skip_unreadable": n} for n in (False, True)],
    ],
)
def test_no_way_of_asking_changes_which_images_answer(
    folder: Path, changes: list[dict[str, Any]]
) -> None:
    """The run, its round, its seed and its number of images per class do not matter."""
    node = SiteNode(folder, {"min_class_samples": BOUND, "gradient_samples": 8})
    replies = [
        node.ask("train", site_run(**change), run=i, server_round=i + 1)
        for i, change in enumerate(changes)
    ]
    means = [mean_features(reply) for reply in replies]
    for mean in means[1:]:
        assert mean.keys() == means[0].keys() == {"circle", "star"}
        for name in mean:
            np.testing.assert_allclose(mean[name], means[0][name], rtol=1e-3, atol=1e-5)
    assert len({images_in(reply) for reply in replies}) == 1


def test_two_cuts_of_one_permutation_gave_an_image_away(folder: Path) -> None:
    """Test a known attack: 5 times the mean of five, less 4 times the mean of four.

    It still works if the site has set no bound, and fails if it has.
    """
    four, five = (
        site_run(class_gradients__samples_per_class=n, seed=3) for n in (4, 5)
    )
    known = features(training_files(folder, "circle", four))
    for rules, leaks in (({}, True), ({"min_class_samples": BOUND}, False)):
        node = SiteNode(folder, rules)
        fewer, more = (
            mean_features(node.ask("train", config))["circle"]
            for config in (four, five)
        )
        assert is_one_of(5 * more - 4 * fewer, known) == leaks


def test_first_runs_division_into_training_and_validation_stays(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise two shares would reveal class counts, even with the site's rules."""
    node = SiteNode(folder)
    asked = [0.2, 0.5, 0.05]
    counts = [
        (
            images_in(node.ask("train", site_run(dataset__validation_share=share))),
            images_in(node.ask("evaluate", site_run(dataset__validation_share=share))),
        )
        for share in asked
    ]
    dataset = open_site(site_run(dataset__validation_share=0.2).dataset, folder)
    own = (len(dataset.train.labels), len(dataset.test.labels))
    assert counts == [own] * 3
    assert "keeps its division into training and validation images: 0.2" in caplog.text


def test_a_query_does_not_decide_the_division(folder: Path) -> None:
    node = SiteNode(folder)
    node.ask("query", site_run(dataset__validation_share=0.5))
    found = images_in(node.ask("train", site_run(dataset__validation_share=0.2)))
    expected = open_site(site_run(dataset__validation_share=0.2).dataset, folder)
    assert found == len(expected.train.labels)


def test_sites_own_share_comes_first(folder: Path) -> None:
    SiteNode(folder).ask("train", site_run(dataset__validation_share=0.2))
    node = SiteNode(folder, {"validation_share": 0.4})
    found = images_in(node.ask("train", site_run(dataset__validation_share=0.2)))
    expected = open_site(site_run(dataset__validation_share=0.4).dataset, folder)
    assert found == len(expected.train.labels)


def test_without_a_bound_the_seed_chooses_as_ever(folder: Path) -> None:
    node = SiteNode(folder)
    few = [site_run(seed=n, class_gradients__samples_per_class=4) for n in (1, 1, 2)]
    first, again, other = (node.ask("train", config) for config in few)
    assert same(first, again) and not same(first, other)


def test_fixed_images_are_augmented_anew_in_each_round(folder: Path) -> None:
    node = SiteNode(folder, {"min_class_samples": BOUND})
    config = site_run(class_gradients__augment=True)
    first, second = (node.ask("train", config, server_round=n) for n in (1, 2))
    assert not same(first, second)
    assert same(first, node.ask("train", config, server_round=1))


def fixed_set(folder: Path, node: SiteNode, name: str, size: int) -> list[Path]:
    """Return the images in the answer, found by their mean."""
    config = site_run()
    paths = training_files(folder, name, config)
    known = features(paths)
    mean = mean_features(node.ask("train", config))[name]
    chosen = next(
        places
        for places in itertools.combinations(range(len(paths)), size)
        if np.allclose(known[list(places)].mean(0), mean, rtol=1e-4, atol=1e-6)
    )
    return [paths[i] for i in chosen]


def test_added_images_change_nothing_and_removed_ones_end_the_class(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = SiteNode(folder, {"min_class_samples": 3, "gradient_samples": 3})
    before = node.ask("train", site_run())
    write_site(folder.parent / "more", {"circle": 10, "star": 10}, first=500)
    for path in sorted((folder.parent / "more").glob("*/*.png")):
        shutil.copy(path, folder / path.parent.name / f"new-{path.name}")
    after = node.ask("train", site_run())
    assert images_in(after) > images_in(before) and same(before, after)

    gone = fixed_set(folder, node, "star", 3)[0]
    content = gone.read_bytes()
    gone.unlink()
    assert set(gradients(node.ask("train", site_run()))) == {"circle"}
    assert "class star sends no gradient any more" in caplog.text
    gone.write_bytes(content)
    assert same(before, node.ask("train", site_run()))


def test_second_set_has_no_image_of_the_first(folder: Path) -> None:
    """The site allows several sets; any sum over answers is a sum over whole sets."""
    rules = {"min_class_samples": 3, "gradient_samples": 3, "gradient_cuts": 2}
    node = SiteNode(folder, rules)
    first = fixed_set(folder, node, "star", 3)
    first[0].unlink()
    second = fixed_set(folder, node, "star", 3)
    assert not set(first) & set(second)
    second[0].unlink()
    assert set(gradients(node.ask("train", site_run()))) == {"circle"}


def test_unreadable_fixed_image_silences_its_class_and_spends_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which images are readable may depend on the size that a run asks for."""
    node = SiteNode(folder, {"min_class_samples": 3, "gradient_samples": 4})
    before = node.ask("train", site_run())
    broken = fixed_set(folder, node, "star", 4)[0]

    def picky(path: Path, size: int) -> Picture:
        if path == broken and size == 24:
            raise UnreadableImageError(path, "not at this size", lasting=True)
        return read_picture(path, size)

    monkeypatch.setattr("clip2fl_common.data.sources.read_picture", picky)
    other = site_run(dataset__image_size=24, dataset__skip_unreadable=True)
    assert set(gradients(node.ask("train", other))) == {"circle"}
    assert same(before, node.ask("train", site_run()))


def test_copies_of_an_image_count_once(tmp_path: Path) -> None:
    folder = write_site(tmp_path / "private", {"circle": 12, "star": 1})
    star = folder / "star" / "0.png"
    for i in range(1, 9):
        shutil.copy(star, star.with_name(f"{i}.png"))
    node = SiteNode(folder, {"min_class_samples": BOUND})
    for share in (0.001, 0.9):  # for either side of the division
        reply = node.ask("train", site_run(dataset__validation_share=share))
        assert "star" not in gradients(reply)


def test_image_in_two_class_folders_enters_one_class(tmp_path: Path) -> None:
    """Otherwise the classes' difference is the image that only one of them has."""
    folder = write_site(tmp_path / "private", {"circle": 12})
    (folder / "star").mkdir()
    for path in sorted((folder / "circle").iterdir())[1:]:
        shutil.copy(path, folder / "star" / path.name)
    few = {"min_class_samples": 3, "gradient_samples": 3}
    node = SiteNode(folder, few)
    node.ask("train", site_run())
    circle, star = (fixed_set(folder, node, c, 3) for c in ("circle", "star"))
    contents = [path.read_bytes() for path in (*circle, *star)]
    assert len(set(contents)) == 6
    # Without such a bound on the set, the first class takes all images.
    shutil.rmtree(tmp_path / "cache")
    node = SiteNode(folder, {"min_class_samples": 3})
    assert set(gradients(node.ask("train", site_run()))) == {"circle"}
