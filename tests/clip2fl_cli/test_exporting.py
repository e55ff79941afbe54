"""Exported models give the logits that the training code gives."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from clip2fl_cli import exporting
from clip2fl_cli.exporting import costs, export, run_teacher
from clip2fl_cli.runs import FinishedRun
from clip2fl_common.datasets import IMAGENET_NORMALIZATION, load_dataset
from clip2fl_common.models import build_model
from server_app.checkpoint import load_model
from tests.defaults import run_config


@pytest.fixture(scope="module")
def exported(
    runs: dict[str, FinishedRun], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Return the files of an exported model."""
    model = runs["clip2fl"].folder / "model.safetensors"
    return export(model, tmp_path_factory.mktemp("exported"))


def photographs() -> torch.Tensor:
    """Return the test images as uint8 [30, 3, 32, 32]."""
    test = load_dataset(run_config().dataset).test
    return test.load(np.arange(len(test.labels))).images


def expected(runs: dict[str, FinishedRun], images: torch.Tensor) -> torch.Tensor:
    """Return the logits of the run's model, as its evaluation computes them."""
    model, _ = load_model(runs["clip2fl"].folder / "model.safetensors")
    with torch.no_grad():
        features = model.features(IMAGENET_NORMALIZATION(images))
        logits: torch.Tensor = model.classifier(features)
    return logits


@pytest.mark.parametrize("number", [1, 2, 30])
def test_onnx_gives_the_same_logits(
    exported: tuple[Path, Path], runs: dict[str, FinishedRun], number: int
) -> None:
    """From pixels, for any number of images."""
    session = onnxruntime.InferenceSession(str(exported[1]))
    images = photographs()[:number]
    (logits,) = session.run(["logits"], {"pixels": images.numpy()})
    assert logits.shape == (number, 10)
    np.testing.assert_allclose(logits, expected(runs, images), atol=1e-4, rtol=0)
    assert logits.std() > 0.01


def test_safetensors_give_the_same_logits(
    exported: tuple[Path, Path], runs: dict[str, FinishedRun]
) -> None:
    """Loaded by nothing but safetensors and the card in its metadata."""
    with safe_open(exported[0], framework="pt") as file:
        card = json.loads(file.metadata()["card"])
    model = build_model(
        card["architecture"], len(card["class_names"]), card["feature_dim"]
    ).eval()
    model.load_state_dict(load_file(exported[0]))
    images = photographs()
    mean = torch.tensor(card["normalization"]["mean"])[:, None, None]
    std = torch.tensor(card["normalization"]["std"])[:, None, None]
    with torch.no_grad():
        logits = model((images / 255 - mean) / std)
    torch.testing.assert_close(logits, expected(runs, images), atol=1e-4, rtol=0)


def test_onnx_carries_class_names_and_preprocessing(
    exported: tuple[Path, Path], runs: dict[str, FinishedRun]
) -> None:
    model = onnx.load(exported[1])
    found = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert found["class_names"] == runs["clip2fl"].class_names
    assert found["preprocessing"]["size"] == 32
    assert found["preprocessing"]["type"] == "uint8"
    assert found["provenance"]["method"] == "clip2fl"
    (pixels,) = model.graph.input
    assert pixels.type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_costs_of_student_and_teacher(
    runs: dict[str, FinishedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "MEASURED_SECONDS", 0.01)
    model = runs["clip2fl"].folder / "model.safetensors"
    student, teacher = costs(model, run_teacher(model))
    assert (student.name, teacher.name) == ("student resnet8-slim", "teacher demo")
    state = load_file(runs["clip2fl"].folder / "model.safetensors")
    # BatchNorm's three buffers are no parameters, but take memory.
    weights = [
        tensor
        for name, tensor in state.items()
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    ]
    assert student.parameters == sum(tensor.numel() for tensor in weights)
    assert student.megabytes == pytest.approx(
        sum(tensor.nbytes for tensor in state.values()) / 1e6
    )
    assert teacher.parameters > student.parameters
    assert student.milliseconds > 0 and teacher.milliseconds > 0


def test_run_without_a_teacher_has_the_students_costs_only(
    runs: dict[str, FinishedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "MEASURED_SECONDS", 0.01)
    model = runs["fedavg"].folder / "model.safetensors"
    assert run_teacher(model) is None
    assert len(costs(model)) == 1
