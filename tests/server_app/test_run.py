"""A run at the server, without Flower."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from clip2fl_common.config import Scalar
from clip2fl_common.data.datasets import load_dataset, partition_indices
from clip2fl_common.metrics import AccuracyReport
from clip2fl_common.provenance import (
    ALL_CODE,
    SHARED_TRAINING_VARIABLE,
    code_fingerprint,
)
from server_app.run import ServerRun
from strategy.base import Method
from strategy.clients import SimulatedClients
from strategy.registry import method_named
from strategy.round_record import RoundRecord
from strategy.setting import Setting
from tests.defaults import run_config


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a temporary cache folder instead of the user's."""
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "cache"))


def tiny_run(folder: Path, **changes: Scalar) -> ServerRun:
    """Return the configuration of a tiny run."""
    place: dict[str, Scalar] = {
        "run__dir": str(folder.parent),
        "run__name": folder.name,
    }
    return ServerRun(run_config(**{**place, **changes}), 1)


def strategy(run: ServerRun) -> Method:
    """Return a strategy that has just closed a round."""
    made = method_named(run.config.method)(
        Setting(
            SimulatedClients((1,), 3, 2, 7, (20, 20, 20)),
            run.config,
            run.data.class_names,
            torch.device("cpu"),
            run.teacher,
        )
    )
    made.round = RoundRecord(
        clients=[0, 2],
        dropped=1,
        shortened_updates=2,
        shortened_gradients=5,
        bytes_down=3000,
        upload_bytes=[400, 600],
        gradient_bytes=[100, 200],
        losses={"client": 1.5, "distillation": 0.25},
        unreadable=4,
        seconds={"clients": 1.23456789},
    )
    return made


def test_config_file_holds_what_the_run_found(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    run.open(strategy(run))
    facts = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))
    config = run_config()
    dataset = load_dataset(config.dataset)
    parts = partition_indices(config.dataset, config.partition, config.seed)
    labels = dataset.train.labels[np.concatenate(parts)].tolist()
    assert facts["class_names"] == list(dataset.class_names)
    assert facts["train_images_per_class"] == [labels.count(c) for c in range(10)]
    assert facts["train_images_per_client"] == [len(part) for part in parts]
    assert facts["test_images"] == 30
    assert facts["shot_groups"]["rule"] == "rank"
    assert run.teacher is not None
    assert facts["teacher"]["fingerprint"] == run.teacher.fingerprint
    features = run.teacher.image_features(dataset.test.load(np.arange(30)).images)
    texts = run.teacher.text_features(dataset.class_names)
    hits = (features @ texts.T).argmax(1).numpy() == dataset.test.labels
    assert facts["teacher"]["zero_shot"]["top1"] == pytest.approx(
        100 * hits.mean(), abs=1e-4
    )
    assert set(facts["versions"]) == {"python", "flwr", "torch", "numpy"}
    assert facts["shared_training"] is False
    assert facts["code"] == code_fingerprint()
    # A change of a method or of the server is a change, too.
    assert facts["all_code"] == code_fingerprint(packages=ALL_CODE)


def test_config_file_tells_of_shared_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SHARED_TRAINING_VARIABLE, str(tmp_path / "shared"))
    run = tiny_run(tmp_path / "run", method="fedavg")
    run.open(strategy(run))
    facts = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))
    assert facts["shared_training"] is True


@pytest.mark.parametrize("method", ["creff", "fedavg", "fedavgm"])
def test_only_clip2fl_loads_a_teacher(tmp_path: Path, method: str) -> None:
    """Other methods must run even if the teacher is not available."""
    run = tiny_run(tmp_path / "run", method=method, teacher__model="no-such-model")
    run.open(strategy(run))
    facts = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))
    assert run.teacher is None
    assert "teacher" not in facts


def test_initial_model_comes_from_the_seed(tmp_path: Path) -> None:
    """Earlier draws do not matter; torch's global generator does not change."""
    models = []
    for name, global_seed, seed in (("a", 1, 7), ("b", 2, 7), ("c", 1, 8)):
        torch.manual_seed(global_seed)
        state = torch.random.get_rng_state()
        run = tiny_run(tmp_path / name, method="fedavg", seed=seed)
        assert torch.equal(state, torch.random.get_rng_state())
        models.append(run.model.classifier.weight)
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


def test_round_is_written_with_all_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path / "run", method="creff", evaluation__max_images=10)
    creff = strategy(run)
    run.open(creff)
    capsys.readouterr()
    run.close_round(1, creff)
    text = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8")
    line = json.loads(text)
    assert line.pop("seconds").keys() == {"clients", "evaluation"}
    accuracy = line.pop("accuracy")
    assert list(accuracy) == ["retrained", "fedavg"]
    assert len(accuracy["fedavg"]["per_class"]) == 10
    assert line == {
        "round": 1,
        "clients": [0, 2],
        "dropped_replies": 1,
        "kept_model": False,
        "went_back_to": None,
        "left_out": [],
        "shortened": {"updates": 2, "class_gradients": 5},
        "test_images": 10,
        "losses": {"client": 1.5, "distillation": 0.25},
        "privacy": {},
        "unreadable_images": {"train": 4, "test": 0},
        "bytes": {
            "down": 3000,
            "up": 1000,
            "per_client": [400, 600],
            "class_gradients": [100, 200],
        },
    }
    assert '"clients": 1.2346' in text
    assert capsys.readouterr().out.startswith(
        "round 1/2: 2 clients; re-trained head balanced"
    )
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "artifacts.safetensors").exists()

    run.close_round(2, creff)
    last = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()[-1]
    assert json.loads(last)["test_images"] == 30
    run.close(creff)
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_artifacts_are_what_a_report_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Artifacts agree with accuracy and partition, and contain few features."""
    run = tiny_run(tmp_path / "run", method="creff", evaluation__max_images=10)
    features = torch.arange(10 * 300 * 2).reshape(10, 300, 2) / 7
    own = {"features": features, "text_features": torch.ones(10, 2)}
    creff = strategy(run)
    monkeypatch.setattr(creff, "artifacts", lambda: own)
    run.open(creff)
    run.close_round(2, creff)
    found = load_file(tmp_path / "run" / "artifacts.safetensors")
    assert set(found) == {
        *("features", "text_features", "clients_by_class"),
        *("confusion.retrained", "confusion.fedavg"),
    }
    assert torch.equal(found["features"], features[:, :200].bfloat16())
    assert torch.equal(found["text_features"], torch.ones(10, 2))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text("utf-8"))
    for head in ("retrained", "fedavg"):
        confusion = found[f"confusion.{head}"]
        assert confusion.sum(dim=1).tolist() == [3] * 10
        recall = 100 * confusion.diagonal() / 3
        assert line["accuracy"][head]["per_class"] == pytest.approx(
            recall.tolist(), abs=1e-4
        )
    config = run_config()
    labels = load_dataset(config.dataset).train.labels
    parts = partition_indices(config.dataset, config.partition, config.seed)
    for row, part in zip(found["clients_by_class"], parts, strict=True):
        assert row.tolist() == [(labels[part] == c).sum() for c in range(10)]


def test_parts_of_the_test_images_are_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of each class's 6 test images, 2 are for tuning; the teacher has parts too."""
    tuned: dict[str, Scalar] = {
        "evaluation__tuning_share": 1 / 3,
        "dataset__demo_test_per_class": 6,
    }
    run = tiny_run(tmp_path / "run", **tuned)
    clip2fl = strategy(run)
    run.open(clip2fl)
    facts = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))
    assert facts["test_images"] == 60
    assert (facts["test_images_tuning"], facts["test_images_held_out"]) == (20, 40)
    run.close_round(1, clip2fl)
    assert "; for tuning: re-trained head balanced " in capsys.readouterr().out
    run.close_round(2, clip2fl)
    run.close(clip2fl)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    teacher = facts["teacher"]
    accuracies = [
        (
            teacher["zero_shot"],
            teacher["zero_shot_tuning"],
            teacher["zero_shot_held_out"],
        )
    ]
    for line in map(json.loads, lines):
        assert list(line["accuracy"]) == ["retrained", "fedavg"]
        for head in line["accuracy"]:
            parts = (line["accuracy_tuning"][head], line["accuracy_held_out"][head])
            accuracies.append((line["accuracy"][head], *parts))
    assert len(accuracies) == 5
    for whole, tuning, held_out in accuracies:
        assert whole["balanced"] == pytest.approx(
            (tuning["balanced"] + 2 * held_out["balanced"]) / 3, abs=2e-4
        )
    table = capsys.readouterr().out
    rounds = [json.loads(line) for line in lines]
    for key, row in (
        ("accuracy", "clip2fl, model's own head  "),
        ("accuracy_held_out", "clip2fl, model's own head, held out"),
        ("accuracy_tuning", "clip2fl, model's own head, for tuning"),
    ):
        (found,) = [text for text in table.splitlines() if text.startswith(row)]
        values = found.removeprefix(row).split()
        mean = fmean(line[key]["fedavg"]["balanced"] for line in rounds)
        assert values[1] == f"{mean:.1f}"


def test_best_round_is_chosen_on_the_images_for_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(
        tmp_path / "run",
        method="fedavg",
        evaluation__tuning_share=0.3,
        federation__rounds=3,
    )
    fedavg = strategy(run)
    run.open(fedavg)
    real = run.evaluator.evaluate
    # By round: on all images, and on those for tuning.
    accuracies = iter([(90.0, 10.0), (10.0, 90.0), (50.0, 50.0)])

    def evaluate(*arguments: Any) -> dict[str, AccuracyReport]:
        (name,) = real(*arguments)
        whole, tuning = (
            AccuracyReport(v, v, v, v, v, (v,) * 10) for v in next(accuracies)
        )
        run.evaluator.parts = {"tuning": {name: tuning}}
        return {name: whole}

    monkeypatch.setattr(run.evaluator, "evaluate", evaluate)
    for number in (1, 2, 3):
        run.close_round(number, fedavg)
    assert run.state.best is not None and run.state.best.round == 2
