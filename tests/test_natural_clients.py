"""A whole federation on a list of images, with the clients that the list names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip2fl_cli.holdings import Holdings
from tests.defaults import run_config
from tests.federation import federate, metrics

pytestmark = pytest.mark.usefixtures("federation_process")

# Images of each client: of two classes.
HELD = {"anna": (3, 2), "ben": (0, 4), "eve": (2, 1)}


def write_list(folder: Path) -> dict[str, Any]:
    """Write noise pictures and their lists; return the settings that use them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = ["path,label,client"]
    for client, counts in HELD.items():
        for label, count in zip(("dog", "ant"), counts, strict=True):
            for _ in range(count):
                name = f"{len(rows)}.png"
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name)
                rows.append(f"{name},{label},{client}")
    (folder / "train.csv").write_text("\n".join(rows), "utf-8")
    (folder / "test.csv").write_text("\n".join([*rows[:4], *rows[-2:]]), "utf-8")
    return {
        "dataset__name": "list",
        "dataset__train_list": str(folder / "train.csv"),
        "dataset__test_list": str(folder / "test.csv"),
        "dataset__class_names": "dog, ant",
        "dataset__imbalance_factor": 1.0,
        "partition__kind": "natural",
        "federation__clients_per_round": 3,
        "federation__rounds": 1,
    }


def test_each_client_trains_on_its_own_images(tmp_path: Path) -> None:
    settings = write_list(tmp_path / "images")
    expected = np.array(list(HELD.values()))
    assert (Holdings.of(run_config(**settings)).counts == expected).all()
    federate(tmp_path / "run", "fedavg", **settings)
    (line,) = metrics(tmp_path / "run")
    # The server drops a reply with another number of images than its client's.
    assert sorted(line["clients"]) == [0, 1, 2] and line["dropped_replies"] == 0
    facts = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))
    assert facts["class_names"] == ["dog", "ant"]
    assert facts["train_images_per_client"] == [5, 4, 3]
    assert facts["train_images_per_class"] == [5, 7]
