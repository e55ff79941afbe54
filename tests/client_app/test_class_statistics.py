"""Test the client's part of CCVR: which images enter, and what a site refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from clip2fl_common import messages
from clip2fl_common.config import RunConfig, Scalar
from clip2fl_common.data.datasets import open_site
from clip2fl_common.data.demo import CLASS_NAMES
from clip2fl_common.messages import ClassStatistics, StatisticsFormat, symmetric
from tests.conftest import be_flower
from tests.site_folders import write_site
from tests.site_node import SiteNode, refusal, site_run, student, works

CIRCLE, STAR = CLASS_NAMES.index("circle"), CLASS_NAMES.index("star")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use another cache than the user's; identify as one of Flower's processes."""
    be_flower(tmp_path / "cache", monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a site's folder with two classes."""
    return write_site(tmp_path / "private", {"circle": 12, "star": 6})


def ask(folder: Path, config: RunConfig, **rules: Any) -> Message:
    """Return a site's answer to a request for class statistics."""
    return SiteNode(folder, rules).ask(
        "train", config, reply_fields=[messages.CLASS_STATISTICS]
    )


def ccvr_run(**changes: Scalar) -> RunConfig:
    return site_run(method="ccvr", **changes)


def sent(reply: Message, config: RunConfig) -> ClassStatistics:
    """Return the statistics of a reply."""
    declared = StatisticsFormat.of(config, len(CLASS_NAMES))
    return declared.decode(
        works(reply).content.array_records[messages.CLASS_STATISTICS]
    )


def pixels(folder: Path, config: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the site's normalised training images and their labels."""
    dataset = open_site(config.dataset, folder)
    loaded = dataset.train.load(np.arange(len(dataset.train.labels)))
    return dataset.normalization(loaded.images), loaded.labels


def test_statistics_are_those_of_the_global_models_features(folder: Path) -> None:
    """Of all images as they are, before training, in evaluation mode."""
    config = ccvr_run()
    images, labels = pixels(folder, config)
    with torch.no_grad():
        features = student().eval().features(images).double().numpy()
    found = sent(ask(folder, config), config)
    assert found.classes.tolist() == sorted([CIRCLE, STAR])
    for row, c in enumerate(found.classes.tolist()):
        own = features[(labels == c).numpy()]
        assert int(found.counts[row]) == len(own)
        covariance = symmetric(found.covariances[row], own.shape[1]).numpy()
        np.testing.assert_allclose(found.means[row], own.mean(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(covariance, np.cov(own.T), rtol=1e-2, atol=1e-4)


def test_small_classes_are_left_out(folder: Path) -> None:
    _, labels = pixels(folder, ccvr_run())
    circles = int((labels == CIRCLE).sum())
    assert circles > int((labels == STAR).sum())
    for least, classes in ((circles, [CIRCLE]), (circles + 1, [])):
        config = ccvr_run(privacy__min_class_samples=least)
        assert sent(ask(folder, config), config).classes.tolist() == classes


def test_site_fixes_the_images_that_enter(tmp_path: Path, folder: Path) -> None:
    """Images that are added later do not enter."""
    config = ccvr_run()
    first = sent(ask(folder, config, min_class_samples=2), config)
    more = write_site(tmp_path / "more", {"circle": 9}, first=100)
    for image in (more / "circle").iterdir():
        image.rename(folder / "circle" / f"more-{image.name}")
    assert len(pixels(folder, config)[1]) > first.images
    second = sent(ask(folder, config, min_class_samples=2), config)
    assert second.counts.tolist() == first.counts.tolist()
    assert torch.equal(second.means, first.means)


@pytest.mark.parametrize(
    "rules", [{"min_noise_multiplier": 0.5}, {"max_clip_norm": 1.0}]
)
def test_site_that_requires_noise_or_clipping_sends_no_statistics(
    folder: Path, rules: dict[str, Any]
) -> None:
    """A run could promise noise and ask for statistics, which have none."""
    config = ccvr_run(
        privacy__gradient_clip_norm=1.0, privacy__gradient_noise_multiplier=0.5
    )
    assert "class-statistics, which have neither" in refusal(
        ask(folder, config, **rules)
    )
    # In answer to the first question already, so that nobody waits for this site.
    assert "class-statistics" in refusal(SiteNode(folder, rules).ask("query", config))
    # A request may ask for what the configuration does not say.
    plain = site_run(
        method="fedavg",
        privacy__gradient_clip_norm=1.0,
        privacy__gradient_noise_multiplier=0.5,
    )
    node = SiteNode(folder, rules)
    asked = node.ask("train", plain, reply_fields=[messages.CLASS_STATISTICS])
    assert "class-statistics, which have neither" in refusal(asked)


def test_site_that_bounds_epsilon_refuses_statistics_at_once(folder: Path) -> None:
    config = ccvr_run(
        privacy__model_noise_multiplier=1.0, aggregation__max_update_norm=1.0
    )
    node = SiteNode(folder, {"max_epsilon": 50.0})
    assert "class-statistics, to which no noise is added" in refusal(
        node.ask("query", config)
    )
