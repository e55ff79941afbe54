"""The teacher's accuracy that doctor computes, against a loop over single images."""

from pathlib import Path

import numpy as np
import pytest

from client_app.zero_shot_check import check_zero_shot
from clip2fl_common.data.datasets import open_site
from clip2fl_common.data.demo import CLASS_NAMES
from clip2fl_common.teacher import load_teacher
from tests.conftest import be_flower
from tests.site_folders import write_site
from tests.site_node import site_run


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    be_flower(tmp_path / "cache", monkeypatch)


def test_accuracy_is_of_the_sites_own_validation_images(tmp_path: Path) -> None:
    folder = write_site(tmp_path / "images", {"circle": 14, "star": 20, "heart": 16})
    config = site_run(
        method="clip2fl", dataset__image_size=32, dataset__validation_share=0.6
    )
    found = check_zero_shot(config, folder)
    test = open_site(config.dataset, folder).test
    teacher = load_teacher("demo")
    prototypes = teacher.text_features(CLASS_NAMES)
    hits: dict[int, list[bool]] = {}
    for place, label in enumerate(test.labels.tolist()):
        image = test.load(np.array([place])).images
        guess = int((teacher.image_features(image) @ prototypes.T).argmax())
        hits.setdefault(label, []).append(guess == label)
    shares = {c: 100 * sum(h) / len(h) for c, h in hits.items()}
    assert len(hits) == 3
    mean = sum(shares.values()) / 3
    assert found.level == "ok" and found.check == "zero-shot"
    assert f"on {len(test.labels)} validation images of 3 classes is {mean:.1f} %" in (
        found.text
    )
    assert f"{min(shares.values()):.1f} %" in found.text.split("worst class")[1]


def test_teacher_that_guesses_is_a_warning(tmp_path: Path) -> None:
    """Circles are in a folder that says star, and so on."""
    folder = write_site(tmp_path / "images", {"circle": 30, "star": 30})
    for old, new in (("circle", "x"), ("star", "circle"), ("x", "star")):
        (folder / old).rename(folder / new)
    config = site_run(
        method="clip2fl", dataset__image_size=32, dataset__validation_share=0.5
    )
    found = check_zero_shot(config, folder)
    assert found.level == "warning" and "class names" in found.fix


def test_what_prevents_it_is_another_checks_problem(tmp_path: Path) -> None:
    folder = write_site(tmp_path / "images", {"circle": 30})
    for config, data in (
        (site_run(method="clip2fl"), tmp_path / "none"),
        (
            site_run(
                method="clip2fl",
                teacher__model="no-such",
                dataset__validation_share=0.5,
            ),
            folder,
        ),
    ):
        found = check_zero_shot(config, data)
        assert (found.level, found.fix) == ("ok", "")
        assert found.text.startswith("not computed: ")
