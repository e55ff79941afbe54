"""Exported models give the logits that the training code gives."""

import json
import shutil
from collections.abc import Callable
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
from clip2fl_common.data.datasets import IMAGENET_NORMALIZATION, load_dataset
from clip2fl_common.models import build_model
from clip2fl_common.teacher import Teacher, load_teacher
from server_app.delivery import load_model
from tests.clip2fl_cli.commands import run
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
    """The ONNX graph takes pixels, for any number of images."""
    session = onnxruntime.InferenceSession(str(exported[1]))
    images = photographs()[:number]
    (logits,) = session.run(["logits"], {"pixels": images.numpy()})
    assert logits.shape == (number, 10)
    np.testing.assert_allclose(logits, expected(runs, images), atol=1e-4, rtol=0)
    assert logits.std() > 0.01


def test_safetensors_give_the_same_logits(
    exported: tuple[Path, Path], runs: dict[str, FinishedRun]
) -> None:
    """Only safetensors and the card in the metadata are needed to load the model."""
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
    # Cameras turn many photographs by a tag only.
    assert found["preprocessing"]["orientation"] == "upright (EXIF)"
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


FOREIGN = [
    {"teacher.model": "local-dir:/somewhere"},
    {"teacher.model": "hf-hub:somebody/something"},
    {"teacher.model": "ViT-B-32", "teacher.pretrained": "openai"},
]


@pytest.fixture
def foreign(runs: dict[str, FinishedRun], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a run's folder with another teacher."""

    def make(keys: dict[str, str]) -> Path:
        folder = tmp_path / "run"
        shutil.copytree(runs["clip2fl"].folder, folder)
        facts = json.loads((folder / "config.json").read_text())
        facts["config"] |= keys
        (folder / "config.json").write_text(json.dumps(facts))
        return folder

    return make


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return the list of loaded teachers; each load returns the built-in one."""
    asked: list[tuple[str, str]] = []

    def load(name: str, pretrained: str, *, prompt: str) -> Teacher:
        asked.append((name, pretrained))
        return load_teacher("demo", prompt=prompt)

    monkeypatch.setattr(exporting, "load_teacher", load)
    # Writing the files takes seconds, and other tests show it.
    monkeypatch.setattr(exporting, "export", lambda file, _: (file, file))
    monkeypatch.setattr(exporting, "MEASURED_SECONDS", 0.01)
    return asked


@pytest.mark.parametrize("keys", FOREIGN, ids=str)
def test_teacher_that_a_file_names_is_loaded_on_request_only(
    foreign: Callable[..., Path],
    loaded: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    keys: dict[str, str],
) -> None:
    folder = foreign(keys)
    arguments = ("export", "--json", "--model", folder, "--output", tmp_path / "out")
    assert run(monkeypatch, *arguments) == 0
    captured = capsys.readouterr()
    assert loaded == []
    assert len(json.loads(captured.out)["costs"]) == 1
    said = f"the run's teacher, {keys['teacher.model']!r}, is not measured"
    (line,) = (line for line in captured.err.splitlines() if "teacher" in line)
    assert line.startswith(said)
    assert "--teacher-cost loads and measures it" in line

    assert run(monkeypatch, *arguments, "--teacher-cost") == 0
    captured = capsys.readouterr()
    assert loaded == [(keys["teacher.model"], keys.get("teacher.pretrained", ""))]
    assert len(json.loads(captured.out)["costs"]) == 2
    assert "not measured" not in captured.err


def test_built_in_teacher_is_measured_without_being_asked_for(
    foreign: Callable[..., Path],
    loaded: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    folder = foreign({"teacher.model": "demo"})
    arguments = ("export", "--json", "--model", folder, "--output", tmp_path / "out")
    assert run(monkeypatch, *arguments) == 0
    assert len(json.loads(capsys.readouterr().out)["costs"]) == 2
    assert run(monkeypatch, *arguments, "--no-costs") == 0
    assert json.loads(capsys.readouterr().out)["costs"] == []
    assert loaded == [("demo", "")]


def test_without_costs_the_runs_configuration_is_not_read(
    foreign: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = foreign({})
    (folder / "config.json").write_text("not JSON")
    arguments = ("export", "--model", folder, "--output", tmp_path / "out")
    assert run(monkeypatch, *arguments, "--no-costs") == 0
