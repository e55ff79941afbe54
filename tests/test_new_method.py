"""The how-to's two methods, added to a copy of the program as the page says."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clip2fl_common import messages
from clip2fl_common.messages import ArrayFields, fields
from strategy.base import Method
from strategy.fedavg import FedAvg
from tests.defaults import ROOT, run_config
from tests.flower_private import act_as_flower_process
from tests.strategy.messages import (
    client_plan,
    configure,
    global_model,
    made,
    random_model,
    safeguards,
    train_reply,
)

PACKAGES = (
    "client_app",
    "server_app",
    "strategy",
    "clip2fl_common",
    "clip2fl_cli",
    "tests",
)
REGISTRIES = {
    "strategy/registry.py",
    "client_app/registry.py",
    "clip2fl_common/messages/fields.py",
}
RUN = """
import sys
from pathlib import Path
import pytest
from tests.conftest import be_flower
from tests.federation import federate
with pytest.MonkeyPatch.context() as patch:
    be_flower(Path(sys.argv[1]) / "cache", patch)
    federate(
        Path(sys.argv[1]) / sys.argv[2],
        sys.argv[2],
        federation__rounds=3,
        federation__clients_per_round=4,
        partition__clients=4,
        client__batch_size=19,
    )
"""


def blocks() -> Iterator[tuple[str, str, str]]:
    """Yield kind, file and text of each block of code; a file is named before it."""
    page = (ROOT / "docs" / "new-method.md").read_text("utf-8")
    place = ""
    for part in re.split(r"(```(?:python|diff)\n.*?```)", page, flags=re.DOTALL):
        if block := re.fullmatch(r"```(python|diff)\n(.*?)```", part, re.DOTALL):
            yield block[1], place, block[2]
        elif named := re.findall(r"`([a-z_0-9/]+\.py)`", part):
            place = named[-1]


def apply(diff: str, text: str) -> str:
    """Apply a diff without line numbers: each line's context stands before it."""
    end = 0
    for line in diff.splitlines():
        if line.startswith("+"):
            text = text[:end] + line[1:] + "\n" + text[end:]
            end += len(line)
            continue
        assert line.startswith(" ")
        end = text.index(f"\n{line[1:]}\n") + len(line) + 1
    return text


def example(name: str) -> Any:
    """Return the module of a file that the page shows."""
    source = next(text for _, place, text in blocks() if place.endswith(f"/{name}.py"))
    spec = importlib.util.spec_from_loader(name, None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    exec(compile(source, name, "exec"), module.__dict__)
    return module


@pytest.fixture(autouse=True)
def flower_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be what Flower takes for one of its processes, which messages ask for."""
    act_as_flower_process(monkeypatch.setattr)


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Declare the field of the second example."""
    monkeypatch.setitem(
        fields.REPLY_FIELDS,
        "class-sums",
        lambda config, classes: ArrayFields(
            "class-sums",
            {"count": (classes,), "sum": (classes, config.model.feature_dim)},
        ),
    )


def round_of(strategy: Method, images: list[int]) -> dict[str, Any]:
    """Return the model after a round of clients with so many images."""
    arrays = global_model()
    replies = [
        train_reply(request, random_model(arrays, seed), images[seed])
        for seed, request in enumerate(configure(strategy, arrays))
    ]
    result, _ = strategy.aggregate_train(1, replies)
    assert result is not None
    return messages.arrays_to_numpy(result)


def test_fednova_is_its_equation_and_fedavg_for_equal_steps() -> None:
    fednova = example("fednova").FedNova
    images, batch, epochs = [10, 30, 90], 8, 2
    settings = {**safeguards(), "client__batch_size": batch, "client__epochs": epochs}
    found = round_of(made(fednova, client_plan(), **settings), images)
    sent = messages.arrays_to_numpy(global_model())
    models = [random_model(global_model(), seed) for seed in range(3)]
    steps = [2 * 2, 2 * 4, 2 * 12]
    shares = [n / 130 for n in images]
    for name, old in sent.items():
        old64 = old.astype(np.float64)
        if "running" in name:
            wanted = sum(p * m[name] for p, m in zip(shares, models, strict=True))
        else:
            direction = sum(
                p * (old64 - m[name]) / tau
                for p, m, tau in zip(shares, models, steps, strict=True)
            )
            wanted = old64 - np.dot(shares, steps) * direction
        np.testing.assert_allclose(found[name], wanted, atol=1e-5)
    same = [10, 12, 14]  # two batches each
    equal = round_of(made(fednova, client_plan(), **settings), same)
    plain = round_of(made(FedAvg, client_plan(), **settings), same)
    for name in sent:
        np.testing.assert_allclose(equal[name], plain[name], atol=1e-5)


@pytest.mark.usefixtures("declared")
def test_fedmeans_chooses_the_nearest_mean_of_all_features_together() -> None:
    """Sums of clients are added; class 2 is held by nobody and keeps its zeros."""
    means_of = example("fedmeans")
    shape = classes, dim = 3, 5
    rng = np.random.default_rng(0)
    strategy = made(means_of.FedMeans, client_plan(2, 2), shape, None, **safeguards())
    arrays = global_model()
    replies, everything = [], []
    for seed, request in enumerate(configure(strategy, arrays)):
        labels = rng.integers(0, 2, 40)
        features = rng.normal(size=(40, dim)) + labels[:, None]
        everything.append((features, labels))
        member = np.eye(classes)[labels]
        sums = {"count": member.sum(0), "sum": member.T @ features}
        reply = train_reply(request, random_model(arrays, seed), 40)
        declared = messages.array_fields("class-sums", run_small(dim), classes)
        reply.content["class-sums"] = declared.encode(
            {name: torch.from_numpy(values) for name, values in sums.items()}
        )
        replies.append(reply)
    assert strategy.aggregate_train(1, replies)[0] is not None
    features, labels = (np.concatenate(part) for part in zip(*everything, strict=True))
    means = np.stack([features[labels == c].mean(0) for c in range(2)])
    distances = np.square(features[:, None] - means).sum(2)
    assert strategy.classifier is not None
    weight, bias = (p.detach().numpy() for p in strategy.classifier.parameters())
    logits = features @ weight.T + bias
    np.testing.assert_allclose(
        logits[:, 0] - logits[:, 1], (distances[:, 1] - distances[:, 0]) / 2, atol=1e-4
    )
    assert not weight[2].any()


def run_small(dim: int) -> Any:
    """Return a configuration of features of this width."""
    return run_config(model__feature_dim=dim)


@pytest.mark.usefixtures("declared")
@pytest.mark.parametrize("damage", ["shape", "name", "nan", "negative"])
def test_declared_field_is_checked(
    damage: str, flower_log: pytest.LogCaptureFixture
) -> None:
    """A reply whose sums are not as declared is dropped, the others are used."""
    shape = classes, dim = 3, 5
    strategy = made(
        example("fedmeans").FedMeans, client_plan(2, 2), shape, None, **safeguards()
    )
    arrays = global_model()
    replies = []
    for seed, request in enumerate(configure(strategy, arrays)):
        tensors = {
            "count": torch.full((classes,), 9.0),
            "sum": torch.ones(classes, dim),
        }
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        if seed == 0 and damage == "shape":
            tensors["sum"] = torch.ones(classes, dim + 1)
            shapes["sum"] = (classes, dim + 1)
        if seed == 0 and damage == "name":
            tensors["other"] = tensors.pop("sum")
            shapes["other"] = shapes.pop("sum")
        if seed == 0 and damage == "nan":
            tensors["sum"][0, 0] = torch.nan
        if seed == 0 and damage == "negative":
            tensors["count"][0] = -1.0
        reply = train_reply(request, random_model(arrays, seed), 40)
        reply.content["class-sums"] = ArrayFields("class-sums", shapes).encode(tensors)
        replies.append(reply)
    strategy.aggregate_train(1, replies)
    assert strategy.round.clients == [1]
    (line,) = [m for m in flower_log.messages if "dropped the reply" in m]
    assert ("negative" if damage == "negative" else "class-sums") in line


def test_page_touches_new_files_and_registries_only() -> None:
    for kind, place, _ in blocks():
        if kind == "diff":
            assert place in REGISTRIES
        else:
            assert not (ROOT / place).exists()


def test_both_examples_train_in_a_copy_of_the_program(tmp_path: Path) -> None:
    copy = tmp_path / "program"
    skipped = shutil.ignore_patterns("__pycache__")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=skipped)
    shutil.copy(ROOT / "pyproject.toml", copy)
    for kind, place, text in blocks():
        path = copy / place
        if kind == "diff":
            text = apply(text, path.read_text("utf-8"))
        path.write_text(text, "utf-8")
    rounds = {}
    for method in ("fednova", "fedmeans", "fedavg"):
        subprocess.run(
            [sys.executable, "-c", RUN, str(tmp_path), method],
            cwd=copy,
            check=True,
            capture_output=True,
            timeout=300,
        )
        lines = (tmp_path / method / "metrics.jsonl").read_text("utf-8").splitlines()
        rounds[method] = [json.loads(line) for line in lines]
    for line in rounds["fedmeans"]:
        assert line["dropped_replies"] == 0
    assert set(rounds["fedmeans"][-1]["accuracy"]) == {"fedavg", "retrained"}
    # Parts of 20 and 19 images take two steps and one, so both averages differ at once.
    losses = {m: [line["losses"]["client"] for line in r] for m, r in rounds.items()}
    assert losses["fednova"][0] == losses["fedavg"][0]
    assert abs(losses["fednova"][1] / losses["fedavg"][1] - 1) > 1e-3
    # FedMeans trains as FedAvg does and only delivers another classifier.
    assert losses["fedmeans"] == losses["fedavg"]
