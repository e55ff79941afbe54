"""Drawn data of many classes, and what they cost, at small sizes."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import many_classes
from benchmarks.process_memory import measured_memory
from clip2fl_common.config.files import parse_overrides
from clip2fl_common.data.datasets import load_dataset
from clip2fl_common.data.demo import CLASS_NAMES, draw_images, sample_scenes
from tests.defaults import run_config


def test_drawn_folders_name_what_their_pictures_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many_classes, "DRAWN_AT_ONCE", 100)
    assert many_classes.draw_folders(tmp_path, 1, 1) == 240
    for split in ("train", "test"):
        names = {folder.name for folder in (tmp_path / split).iterdir()}
        assert len(names) == 240
        assert {name.split()[-1] for name in names} == set(CLASS_NAMES)
    label = CLASS_NAMES.index("circle")
    scenes = sample_scenes("test", label, 1000)
    big_and_red = (scenes.radius >= 10) & (scenes.colour == 0)
    first = int(np.flatnonzero(big_and_red)[0])
    (expected,) = draw_images("test", label, 1, first)
    shown = Image.open(tmp_path / "test" / "big red circle" / "0000.png")
    assert (np.asarray(shown).transpose(2, 0, 1) == expected).all()


def test_client_sends_less_with_the_chosen_settings() -> None:
    found = many_classes.client_cost(60, 300, 2, repeats=2)
    assert found["published: upload, MB"][0] > 8 * found["chosen: upload, MB"][0]
    seconds = [found[name] for name in found if name.endswith(", s")]
    assert all(len(values) == 2 and min(values) > 0 for values in seconds)


def test_server_is_measured_with_gradients_of_every_class() -> None:
    seconds = many_classes.server_cost(51, 2, 1)
    assert seconds.keys() == {"mean", "step", "epoch"}
    assert min(seconds.values()) > 0


def test_lists_name_a_thousand_classes(tmp_path: Path) -> None:
    settings = parse_overrides([many_classes.thousand_lists(tmp_path, 20, 2000)])
    named = {
        key.replace(".", "__").replace("-", "_"): value
        for key, value in settings.items()
    }
    dataset = load_dataset(run_config(**named).dataset)  # type: ignore[arg-type]
    counts = np.bincount(dataset.train.labels)
    assert len(dataset.class_names) == len(counts) == 1000
    assert counts.min() > 0 and counts.max() == 10 * counts.min()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_processes_started_within() -> None:
    def hold(megabytes: int) -> "subprocess.Popen[bytes]":
        script = f"held = bytearray(b'x') * ({megabytes} * 2**20)\ninput()"
        return subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)

    processes = [hold(300)]
    try:
        with measured_memory() as peaks:
            processes += [hold(60), hold(100)]
            end = time.monotonic() + 60
            while time.monotonic() < end and (
                peaks.together < 0.15 or peaks.of_role["other"] < 0.1
            ):
                time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert peaks.together >= 0.15
    assert set(peaks.of_role) == {"other"}
    assert 0.1 < peaks.of_role["other"] < 0.2
    assert peaks.together < 0.25
