"""Folders of runs with chosen numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip2fl_cli.runs import FinishedRun
from clip2fl_common.config import Scalar
from server_app.run_folder import MODEL
from tests.defaults import default_config


def accuracy(value: float) -> dict[str, Any]:
    """Return an accuracy report in which every column has the same value."""
    groups = dict.fromkeys(("top1", "balanced", "many", "medium", "few"), value)
    return {**groups, "per_class": [value, min(value + 2.0, 100.0)]}


def change_facts(folder: Path, **facts: object) -> None:
    """Change what a run's ``config.json`` says besides the configuration."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


def write_run(
    folder: Path,
    values: Sequence[float],
    *,
    method: str = "fedavg",
    seed: int = 1,
    **config: Scalar,
) -> FinishedRun:
    """Write a complete run with one accuracy per round; ``__`` in a key means a dot.

    With a tuning share, accuracy on the images for tuning is 4 points higher, and on
    the held-out images 1 point lower: as if the share were a fifth.
    """
    folder.mkdir(parents=True)
    own = {k.replace("__", ".").replace("_", "-"): v for k, v in config.items()}
    facts: dict[str, Any] = {
        "config": {
            **default_config(),
            "method": method,
            "seed": seed,
            "federation.rounds": len(values),
            **own,
        },
        "class_names": ["rare", "common"],
        "train_images_per_class": [3, 300],
        "test_images": 20,
        "shot_groups": {"rule": "rank", "many": [1], "medium": [], "few": [0]},
        "versions": {"torch": "2"},
        "code": "abc",
        "teacher": {"name": "tiny", "zero_shot": accuracy(91.0)},
    }
    drawn = int(own.get("evaluation.max-images", 0))
    parts = {"tuning": 4.0, "held_out": -1.0}
    if own.get("evaluation.tuning-share", 0) == 0:
        parts = {}
    else:
        facts |= {"test_images_tuning": 4, "test_images_held_out": 16}
    facts["teacher"] |= {
        f"zero_shot_{part}": accuracy(91.0 + more) for part, more in parts.items()
    }
    (folder / "config.json").write_text(json.dumps(facts))
    lines = [
        {
            "round": n,
            "test_images": 20 if n == len(values) else min(20, drawn or 20),
            "accuracy": {"fedavg": accuracy(value)},
            "losses": {"client": 1.5},
            "seconds": {"clients": 60.0, "clients-training": 9},
            "bytes": {"up": 10, "down": 20},
            **{
                f"accuracy_{part}": {"fedavg": accuracy(value + more)}
                for part, more in parts.items()
            },
        }
        for n, value in enumerate(values, start=1)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / MODEL).touch()
    return FinishedRun.read(folder)
