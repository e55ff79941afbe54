"""Test that local models common to several runs are trained once, and are the same."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from client_app import shared_training
from client_app.chosen_views import ChosenViews, Mixing
from client_app.optimizers import PLAIN_SGD, OptimizerSettings
from client_app.shared_training import train_or_reuse
from client_app.training import LocalObjective, PixelImages, train_locally
from client_app.views import ViewRecipe
from clip2fl_common.choices import TF32
from clip2fl_common.data.datasets import CIFAR10_NORMALIZATION
from clip2fl_common.devices import tensor_cores
from clip2fl_common.models import ImageClassifier, build_model
from clip2fl_common.provenance import SHARED_TRAINING_VARIABLE
from tests.federation import federate, metrics


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Turn on sharing of local training, in a folder."""
    monkeypatch.setenv(SHARED_TRAINING_VARIABLE, str(tmp_path / "shared"))
    return tmp_path / "shared"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the keys of all trainings that are computed."""
    keys: list[str] = []
    train = shared_training._train

    def noted(key: str, training: Any) -> Any:
        keys.append(key)
        return train(key, training)

    monkeypatch.setattr(shared_training, "_train", noted)
    return keys


def training(model: ImageClassifier, **changes: Any) -> Any:
    """Return the training of a model on a few random images."""
    drawing = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (8, 3, 32, 32), generator=drawing, dtype=torch.uint8)
    arguments: dict[str, Any] = {
        "images": PixelImages(pixels, CIFAR10_NORMALIZATION, torch.device("cpu")),
        "labels": torch.arange(8) % 3,
        "teacher_logits": torch.randn(8, 3, generator=drawing),
        "objective": LocalObjective(1.0, 3.0),
        "epochs": 1,
        "batch_size": 4,
        "learning_rate": 0.1,
        "crop_padding": 4,
        "generator": torch.Generator().manual_seed(2),
        "offsets": None,
        "augment_per_image": False,
        "precision": torch.float32,
        "optimizer": PLAIN_SGD,
        "views": None,
        **changes,
    }
    first = ("images", "labels", "teacher_logits", "objective")
    rest = {name: value for name, value in arguments.items() if name not in first}
    return partial(train_locally, model, *(arguments[name] for name in first), **rest)


def slim(seed: int = 0) -> ImageClassifier:
    """Return a seeded model."""
    torch.manual_seed(seed)
    return build_model("resnet8-slim", 3, 16)


def test_recalled_model_and_losses_are_the_trained_ones(
    folder: Path, trained: list[str]
) -> None:
    plain, first, again = slim(), slim(), slim()
    losses = training(plain)()
    assert train_or_reuse(training(first)) == losses
    assert train_or_reuse(training(again)) == losses
    assert len(trained) == 1
    for other in (first, again):
        for name, tensor in plain.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name
            assert other.state_dict()[name].dtype == tensor.dtype


MIXING = Mixing(
    places=torch.arange(8).flip(0),
    numbers=torch.zeros(8, 8),
    chances=torch.zeros(8, 8),
    shares=torch.full((8,), 0.75),
)
OTHERS: dict[str, Any] = {
    "images": PixelImages(
        torch.zeros(8, 3, 32, 32, dtype=torch.uint8),
        CIFAR10_NORMALIZATION,
        torch.device("cpu"),
    ),
    "labels": torch.zeros(8, dtype=torch.int64),
    "teacher_logits": torch.zeros(8, 3),
    "objective": LocalObjective(2.0, 3.0),
    "epochs": 2,
    "batch_size": 5,
    "learning_rate": 0.2,
    "crop_padding": 3,
    "generator": torch.Generator().manual_seed(3),
    "offsets": torch.zeros(3),
    "augment_per_image": True,
    "precision": torch.bfloat16,
    "optimizer": OptimizerSettings(weight_decay=0.1),
    "views": ChosenViews(
        PixelImages(
            torch.zeros(8, 3, 32, 32, dtype=torch.uint8),
            CIFAR10_NORMALIZATION,
            torch.device("cpu"),
        ),
        ViewRecipe(1, "crop-flip", 4, "mixup"),
        places=torch.arange(8),
        numbers=torch.zeros(8, 8, dtype=torch.float64),
        rows=torch.arange(8)[None],
        logits=torch.zeros(8, 3),
        mixing=MIXING,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_argument_is_another_training(
    folder: Path, trained: list[str], name: str
) -> None:
    train_or_reuse(training(slim()))
    train_or_reuse(training(slim(), **{name: OTHERS[name]}))
    assert len(trained) == 2


def test_other_precision_of_products_is_another_training(
    folder: Path, trained: list[str]
) -> None:
    """A GPU's last digits depend on it."""
    allowed: tuple[TF32, ...] = get_args(TF32)
    for products in allowed:
        with tensor_cores(products):
            train_or_reuse(training(slim()))
    assert len(trained) == len(allowed) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": ViewRecipe(1, "crop-flip", 3, "mixup")},
        {"recipe": ViewRecipe(1, "resized-crop", 4, "mixup")},
        {"recipe": ViewRecipe(1, "crop-flip", 4, "cutmix")},
        {"mixing": None},
        {"mixing": replace(MIXING, places=torch.arange(8))},
        {"mixing": replace(MIXING, numbers=torch.ones(8, 8) / 2)},
        {"mixing": replace(MIXING, chances=torch.ones(8, 8) / 2)},
        {"mixing": replace(MIXING, shares=torch.ones(8))},
        {"places": torch.arange(8).flip(0)},
        {"numbers": torch.ones(8, 8, dtype=torch.float64) / 2},
        {"rows": torch.arange(8).flip(0)[None]},
        {"logits": torch.ones(8, 3)},
    ],
)
def test_other_views_are_another_training(
    folder: Path, trained: list[str], change: dict[str, Any]
) -> None:
    for views in (OTHERS["views"], replace(OTHERS["views"], **change)):
        train_or_reuse(training(slim(), views=views))
    assert len(trained) == 2


def test_another_model_code_or_number_of_threads_is_another_training(
    folder: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_or_reuse(training(slim()))
    train_or_reuse(training(slim(seed=1)))
    assert len(trained) == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    train_or_reuse(training(slim()))
    assert len(trained) == 3
    monkeypatch.setattr(shared_training, "code_fingerprint", lambda: "other")
    train_or_reuse(training(slim()))
    assert len(trained) == 4


def test_damaged_file_is_trained_again(folder: Path, trained: list[str]) -> None:
    losses = train_or_reuse(training(slim()))
    for file in folder.rglob("output.pkl"):
        file.write_bytes(file.read_bytes()[:100])
    assert train_or_reuse(training(slim())) == losses
    assert len(trained) == 2


def test_nothing_is_kept_where_no_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[str]
) -> None:
    monkeypatch.delenv(SHARED_TRAINING_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    train_or_reuse(training(slim()))
    assert trained == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("federation_process")
def test_variants_at_the_server_train_once_and_their_metrics_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[str]
) -> None:
    variants: dict[str, tuple[str, dict[str, Any]]] = {
        "creff": ("creff", {}),
        "fedavg": ("fedavg", {}),
        "few-features": ("creff", {"synthesis__features_per_class": 3}),
    }
    for name, (method, changes) in variants.items():
        federate(tmp_path / f"{name}-alone", method, **changes)
    assert trained == []
    monkeypatch.setenv(SHARED_TRAINING_VARIABLE, str(tmp_path / "shared"))
    for name, (method, changes) in variants.items():
        federate(tmp_path / name, method, **changes)
        assert metrics(tmp_path / name) == metrics(tmp_path / f"{name}-alone")
    clients = sum(len(line["clients"]) for line in metrics(tmp_path / "fedavg"))
    assert len(trained) == len(set(trained)) == clients
    # Distillation is part of the training, so CLIP2FL trains again.
    federate(tmp_path / "clip2fl")
    assert len(trained) == 2 * clients
