"""The comparison's tables say what the run folders say."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare_methods import (
    FinishedRun,
    class_table,
    comparison_table,
    complete_run,
    report,
)


def _accuracy(value: float) -> dict[str, Any]:
    groups = dict.fromkeys(("top1", "balanced", "many", "medium", "few"), value)
    return {**groups, "per_class": [value, value + 2.0]}


def write_run(folder: Path, method: str, seed: int, values: list[float]) -> None:
    """Write the folder of a complete run whose accuracies are all one value a round."""
    folder.mkdir(parents=True)
    config = {
        "config": {"method": method, "seed": seed},
        "class_names": ["rare", "common"],
        "train_images_per_class": [3, 300],
        "test_images": 20,
        "shot_groups": {"rule": "rank", "many": [1], "medium": [], "few": [0]},
        "versions": {"torch": "2"},
        "code": "abc",
        "teacher": {"name": "tiny", "zero_shot": _accuracy(91.0)},
    }
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {"accuracy": {"fedavg": _accuracy(v)}, "seconds": {"a": 60.0, "clients-b": 9}}
        for v in values
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "model.safetensors").touch()


@pytest.fixture
def runs(tmp_path: Path) -> list[FinishedRun]:
    """Two seeds; the last five rounds of the first average 30, of the second 34."""
    write_run(tmp_path / "x-fedavg-1", "fedavg", 1, [99, 28, 29, 30, 31, 32])
    write_run(tmp_path / "x-fedavg-2", "fedavg", 2, [99, 34, 34, 34, 34, 34])
    return [FinishedRun.read(tmp_path / f"x-fedavg-{seed}") for seed in (1, 2)]


def test_table_averages_last_five_rounds_then_seeds(runs: list[FinishedRun]) -> None:
    rows = comparison_table(runs).splitlines()
    # Mean of 30 and 34, sample deviation 2.8; last rounds 32 and 34.
    assert rows[2].startswith("| fedavg | fedavg | 1, 2 | 32.0 ± 2.8 |")
    assert rows[2].endswith("| 33.0 ± 1.4 |")
    assert rows[3].startswith("| teacher | zero-shot, no training | - | 91.0 |")


def test_classes_stand_in_order_of_frequency(runs: list[FinishedRun]) -> None:
    rows = class_table(runs).splitlines()
    assert rows[0] == "| method | head | common | rare |"
    assert rows[2] == "| training images |  | 300 | 3 |"
    assert rows[3] == "| fedavg | fedavg | 34.0 | 32.0 |"


def test_page_names_command_teacher_and_minutes(runs: list[FinishedRun]) -> None:
    page = report(runs, "Title", "the command")
    assert "    the command\n" in page
    assert "Teacher: tiny." in page
    assert "fedavg 1: 6, fedavg 2: 6." in page  # clients' own seconds overlap


def test_complete_run_is_read_not_repeated(tmp_path: Path) -> None:
    write_run(tmp_path / "x-fedavg-1", "fedavg", 1, [50.0] * 5)
    run = complete_run(Path("conf/x.toml"), "fedavg", 1, tmp_path, [])
    assert run.last("fedavg", "balanced") == 50.0


def test_part_of_a_run_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    write_run(tmp_path / "x-fedavg-1", "fedavg", 1, [50.0])
    (tmp_path / "x-fedavg-1" / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="x-fedavg-1 holds a run that did not end"):
        complete_run(Path("conf/x.toml"), "fedavg", 1, tmp_path, [])
