"""A federated linear head on the teacher's features, against a slow federation."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks.teacher_head import ALL, LAST_ROUNDS, Federation, main
from clip2fl_common.data.datasets import load_dataset, partition_indices
from clip2fl_common.metrics import HELD_OUT, TUNING
from clip2fl_common.randomness import generator
from clip2fl_common.teacher import load_teacher
from tests.defaults import run_config

CONFIG = run_config(seed=5, dataset__demo_test_per_class=10)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the teacher's features out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def federation() -> Federation:
    """Return the demo's federation with three clients."""
    return Federation.load(CONFIG, load_teacher("demo"))


@pytest.mark.parametrize("adjustment", [0.0, 1.0])
def test_heads_equal_those_of_a_slow_federation(
    federation: Federation, adjustment: float
) -> None:
    """Two clients of three train a matrix by autograd; their mean is weighted."""
    dataset = load_dataset(CONFIG.dataset)
    teacher = load_teacher("demo")
    text = teacher.text_features(dataset.class_names)
    parts = partition_indices(CONFIG.dataset, CONFIG.partition, 5)
    weight, bias = torch.zeros_like(text), torch.zeros(len(text))
    heads = federation.rounds("zero", adjustment, 0.02)
    for server_round in (1, 2):
        order = torch.randperm(3, generator=generator(5, "sampling", server_round))
        models = []
        for client in sorted(order[:2].tolist()):
            loaded = dataset.train.load(parts[client])
            x = teacher.image_features(loaded.images) * math.sqrt(text.shape[1])
            y = loaded.labels
            w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
            drawn = generator(5, "batches", server_round, client)
            for batch in torch.randperm(len(y), generator=drawn).split(32):
                # The crop and the flip of each batch draw three numbers.
                for _ in range(2):
                    torch.randint(0, 1, (), generator=drawn)
                torch.rand((), generator=drawn)
                logits = x[batch] @ w.T + b
                if adjustment:
                    held = torch.bincount(y, minlength=len(text)) / len(y)
                    logits = logits + held.log()
                functional.cross_entropy(logits, y[batch]).backward()
                with torch.no_grad():
                    for tensor in (w, b):
                        assert tensor.grad is not None
                        tensor -= 0.02 * tensor.grad
                        tensor.grad = None
            models.append((len(y), w.detach(), b.detach()))
        total = sum(size for size, _, _ in models)
        weight = sum((size / total * w for size, w, _ in models), torch.zeros(()))
        bias = sum((size / total * b for size, _, b in models), torch.zeros(()))
        head = next(heads)
        torch.testing.assert_close(head.classifier.weight.detach(), weight)
        torch.testing.assert_close(head.classifier.bias.detach(), bias)
    assert next(heads, None) is None


def test_accuracy_is_that_of_the_part(federation: Federation) -> None:
    """Zero-shot accuracy by hand; the tuning images are two of ten of each class."""
    dataset = load_dataset(CONFIG.dataset)
    teacher = load_teacher("demo")
    test = dataset.test.load(np.arange(len(dataset.test.labels)))
    similarity = (
        teacher.image_features(test.images)
        @ teacher.text_features(dataset.class_names).T
    )
    right = (similarity.argmax(1) == test.labels).numpy()
    found = federation.zero_shot()
    for part in (ALL, TUNING, HELD_OUT):
        chosen = federation.parts[part]
        per_class = np.bincount(test.labels.numpy()[chosen])
        assert set(per_class) == {{ALL: 10, TUNING: 2, HELD_OUT: 8}[part]}
        # All classes have equally many images, so this is the balanced accuracy.
        assert found[part, "balanced"] == pytest.approx(100 * right[chosen].mean())


def test_only_the_last_rounds_are_evaluated() -> None:
    config = run_config(federation__rounds=LAST_ROUNDS + 2)
    federation = Federation.load(config, load_teacher("demo"))
    found = federation.trained("text features", 0.0, 0.01)
    assert len(found) == LAST_ROUNDS
    heads = list(federation.rounds("text features", 0.0, 0.01))
    assert found[-1] == federation.accuracy(heads[-1])


def test_page_has_the_choice_and_a_row_for_each_head(tmp_path: Path) -> None:
    file = tmp_path / "tiny.toml"
    tiny = run_config(dataset__demo_test_per_class=10).to_flat()
    keys = ("dataset.", "partition.", "federation.", "client.epochs")
    file.write_text(
        "".join(
            f"{key} = {value!r}\n"
            for key, value in tiny.items()
            if key.startswith(keys) and not isinstance(value, bool | str)
        )
    )
    main(
        [str(file), "--seeds", "7", "8", "--step-sizes", "0.01", "0.1"]
        + ["--workers", "1", "--results", str(tmp_path / "results")]
    )
    (page,) = (tmp_path / "results").iterdir()
    lines = page.read_text("utf-8").splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    accuracies = [row for row in rows if len(row) == 12][2:]
    choices = [row for row in rows if len(row) == 4][2:]
    assert [row[:2] for row in accuracies] == [
        ["teacher", "zero-shot"],
        *(row[:2] for row in choices),
    ]
    for row, (_, _, small, large) in zip(accuracies[1:], choices, strict=True):
        better = ["0.01"] * (float(small) >= float(large)) + ["0.1"] * (
            float(large) >= float(small)
        )
        assert row[2] in better
        assert all("±" in cell for cell in row[3:])
