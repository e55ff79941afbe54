"""A delivered model is loaded exactly as saved, and is complete or absent."""

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from clip2fl_common.data.datasets import Normalization
from clip2fl_common.limits import MAX_FEATURE_DIM, MAX_IMAGE_SIZE, MIN_IMAGE_SIZE
from clip2fl_common.models import ImageClassifier, build_model
from server_app.delivery import ModelCard, load_model, save_model
from server_app.foreign_files import ForeignFileError
from server_app.tensor_files import save_tensors

CLASSES, DIM = 3, 16


def card(architecture: str = "resnet8-slim") -> ModelCard:
    """Return the card of a model with three classes."""
    return ModelCard(
        architecture=architecture,
        feature_dim=DIM,
        class_names=("star", "Größe", "oak tree"),
        image_size=32,
        normalization=Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        provenance={"method": "clip2fl", "seed": 7, "lr": 0.5, "teacher": None},
    )


def trained(architecture: str = "resnet8-slim", seed: int = 0) -> ImageClassifier:
    """Return a model whose BatchNorm statistics are not the initial ones."""
    torch.manual_seed(seed)
    model = build_model(architecture, CLASSES, DIM)
    model.train()
    with torch.no_grad():
        model(2 + 3 * torch.randn(4, 3, 32, 32))
    return model.eval()


@pytest.mark.parametrize(
    "architecture", ["resnet8-slim", "resnet8", "resnet18", "resnet50"]
)
def test_loaded_model_gives_the_same_logits(tmp_path: Path, architecture: str) -> None:
    """The logits come from the given classifier, not from the model's own."""
    model, classifier = trained(architecture), nn.Linear(DIM, CLASSES)
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = classifier(model.features(images))
        own = model(images)
    save_model(tmp_path / "model.safetensors", model, classifier, card(architecture))
    loaded, _ = load_model(tmp_path / "model.safetensors")
    with torch.no_grad():
        logits = loaded(images)
    assert torch.equal(logits, expected)
    assert not torch.allclose(logits, own)
    assert not loaded.training


def test_saving_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classifier = nn.Linear(DIM, CLASSES)
    save_model(tmp_path / "model.safetensors", model, classifier, card())
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_card_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, trained(), nn.Linear(DIM, CLASSES), card())
    _, loaded = load_model(path)
    assert loaded == card()


def test_file_needs_no_code_of_ours(tmp_path: Path) -> None:
    """The header has names and normalisation as JSON; tensors have their names."""
    path = tmp_path / "model.safetensors"
    classifier = nn.Linear(DIM, CLASSES)
    save_model(path, trained(), classifier, card())
    with safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()["card"])
        weight = file.get_tensor("classifier.weight")
    assert fields["class_names"] == ["star", "Größe", "oak tree"]
    assert fields["normalization"] == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    assert fields["provenance"]["method"] == "clip2fl"
    assert torch.equal(weight, classifier.weight)


def disk_full(_: int) -> None:
    """Replace ``os.fsync`` by a failure for lack of space on the disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("there_before", [True, False])
def test_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there_before: bool
) -> None:
    path = tmp_path / "model.safetensors"
    classifier = nn.Linear(DIM, CLASSES)
    if there_before:
        save_model(path, trained(seed=1), classifier, card())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left on device"):
        save_model(path, trained(seed=2), classifier, card())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert len(before) == there_before


def test_later_model_replaces_the_earlier(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    images = torch.randn(2, 3, 32, 32)
    classifier = nn.Linear(DIM, CLASSES)
    for seed in (1, 2):
        save_model(path, trained(seed=seed), classifier, card())
    with torch.no_grad():
        expected = classifier(trained(seed=2).features(images))
        assert torch.equal(load_model(path)[0](images), expected)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_model_can_be_read_by_whom_other_files_can(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    modes = {(tmp_path / n).stat().st_mode for n in ("other", "x.safetensors")}
    assert len(modes) == 1


def saved_card(path: Path, **changes: Any) -> None:
    """Save a model with a card in which some fields are changed."""
    changed = dataclasses.replace(card(), **changes)
    classes, width = len(changed.class_names), changed.feature_dim
    network = build_model(changed.architecture, classes, width)
    save_model(path, network, network.classifier, changed)


@pytest.mark.parametrize("size", [MIN_IMAGE_SIZE, MAX_IMAGE_SIZE])
def test_sizes_up_to_the_bounds_are_loaded(tmp_path: Path, size: int) -> None:
    saved_card(tmp_path / "x", image_size=size)
    assert load_model(tmp_path / "x")[1].image_size == size


@pytest.mark.parametrize("size", [MIN_IMAGE_SIZE - 1, MAX_IMAGE_SIZE + 1, 10**6])
def test_sizes_beyond_the_bounds_are_refused(tmp_path: Path, size: int) -> None:
    saved_card(tmp_path / "x", image_size=size)
    with pytest.raises(ForeignFileError, match=f"x: its card: image_size = {size}"):
        load_model(tmp_path / "x")


def test_class_names_of_imagenet_are_loaded(tmp_path: Path) -> None:
    """Two of its classes are called "missile", and two "sunglasses"."""
    from open_clip import IMAGENET_CLASSNAMES

    names = tuple(IMAGENET_CLASSNAMES)
    assert len(set(names)) < len(names)
    saved_card(tmp_path / "x", class_names=names)
    assert load_model(tmp_path / "x")[1].class_names == names


@pytest.mark.parametrize(
    "changes",
    [
        {"feature_dim": MAX_FEATURE_DIM + 1},
        {"normalization": Normalization((0.1, 0.2, 0.3), (0.4, 0.0, 0.6))},
        {"normalization": Normalization((0.1, 0.2, 0.3), (0.4, -0.5, 0.6))},
        {"normalization": Normalization((0.1, float("nan"), 0.3), (0.4, 0.5, 0.6))},
        {"normalization": Normalization((0.1, float("inf"), 0.3), (0.4, 0.5, 0.6))},
        {"class_names": ("a", "", "c")},
        {"class_names": ("a", "b" * 501, "c")},
    ],
    ids=str,
)
def test_card_that_is_not_sound_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    saved_card(tmp_path / "x", **changes)
    with pytest.raises(ForeignFileError, match="x: its card"):
        load_model(tmp_path / "x")
