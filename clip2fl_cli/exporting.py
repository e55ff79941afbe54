"""Delivered models for use elsewhere: safetensors and ONNX, and what they cost."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.benchmark import Timer

from clip2fl_common.datasets import Normalization
from clip2fl_common.models import ImageClassifier
from clip2fl_common.teacher import Teacher, load_teacher
from server_app.checkpoint import ModelCard, load_model

# Seconds of measurement for each latency.
MEASURED_SECONDS = 2.0


class _FromPixels(nn.Module):
    """A model with its normalisation: uint8 pixels in, logits out.

    Parameters
    ----------
    model : ImageClassifier
        The delivered model.
    normalization : Normalization
        Of its input.
    """

    def __init__(self, model: ImageClassifier, normalization: Normalization) -> None:
        super().__init__()
        self.model = model
        self.normalization = normalization

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, C] of RGB images [N, 3, S, S] of uint8."""
        logits: torch.Tensor = self.model(self.normalization(pixels))
        return logits


@dataclass(frozen=True)
class Cost:
    """What a model takes.

    Attributes
    ----------
    name : str
        Which one.
    parameters : int
        Trained numbers.
    megabytes : float
        Of them and the buffers, as they lie in memory.
    milliseconds : float
        Median time for one image on this CPU with one thread.
    """

    name: str
    parameters: int
    megabytes: float
    milliseconds: float


def export(model: Path, folder: Path) -> tuple[Path, Path]:
    """Write a delivered model as safetensors and as ONNX.

    Both carry the class names and the preprocessing as JSON in their metadata. The
    ONNX graph holds the normalisation: its input ``pixels`` are RGB images
    [N, 3, S, S] of uint8, any number of them, and its output ``logits`` is [N, C].

    Parameters
    ----------
    model : Path
        A run's ``model.safetensors``.
    folder : Path
        Where ``model.safetensors`` and ``model.onnx`` go.

    Returns
    -------
    tuple of Path
        The two files.
    """
    import onnx

    network, card = load_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors_file = folder / "model.safetensors"
    if model.resolve() != safetensors_file.resolve():
        shutil.copyfile(model, safetensors_file)
    onnx_file = folder / "model.onnx"
    # Two images, because one would be taken for a constant.
    pixels = torch.zeros(2, 3, card.image_size, card.image_size, dtype=torch.uint8)
    program = torch.onnx.export(
        _FromPixels(network, card.normalization).eval(),
        (pixels,),
        input_names=["pixels"],
        output_names=["logits"],
        dynamic_shapes={"pixels": {0: torch.export.Dim("images")}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    exported = program.model_proto
    onnx.helper.set_model_props(
        exported,
        {
            "class_names": json.dumps(card.class_names),
            "preprocessing": json.dumps(preprocessing(card)),
            "provenance": json.dumps(dict(card.provenance)),
        },
    )
    onnx.checker.check_model(exported)
    onnx.save(exported, onnx_file)
    return safetensors_file, onnx_file


def preprocessing(card: ModelCard) -> dict[str, object]:
    """Return how an image becomes the input of the ONNX graph."""
    return {
        "colour": "RGB",
        "crop": "centre square",
        "size": card.image_size,
        "interpolation": "bicubic",
        "layout": "N, 3, height, width",
        "type": "uint8",
        "normalisation": "in the graph",
    }


def student_cost(model: Path) -> Cost:
    """Measure a delivered model."""
    network, card = load_model(model)
    image = torch.zeros(1, 3, card.image_size, card.image_size, dtype=torch.uint8)
    forward = _FromPixels(network, card.normalization).eval()
    return _cost(f"student {card.architecture}", network, lambda: forward(image))


def teacher_cost(teacher: Teacher, class_names: tuple[str, ...], size: int) -> Cost:
    """Measure a teacher's zero-shot classification of one image of this size."""
    prototypes = teacher.text_features(class_names)
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    return _cost(
        f"teacher {teacher.name}",
        teacher.network.model,
        lambda: teacher.image_features(image) @ prototypes.T,
    )


def _cost(name: str, network: nn.Module, forward: Callable[[], torch.Tensor]) -> Cost:
    held = [*network.parameters(), *network.buffers()]
    with torch.inference_mode():
        timer = Timer("forward()", globals={"forward": forward}, num_threads=1)
        measured = timer.blocked_autorange(min_run_time=MEASURED_SECONDS)
    return Cost(
        name,
        sum(parameter.numel() for parameter in network.parameters()),
        sum(tensor.nbytes for tensor in held) / 1e6,
        1000 * measured.median,
    )


def costs(model: Path) -> list[Cost]:
    """Measure a delivered model and, where a run lies beside it, the run's teacher.

    Parameters
    ----------
    model : Path
        A run's ``model.safetensors``.

    Returns
    -------
    list of Cost
        The student, then the teacher if the run had one.
    """
    measured = [student_cost(model)]
    facts_file = model.parent / "config.json"
    if facts_file.is_file():
        facts = json.loads(facts_file.read_text("utf-8"))
        if "teacher" in facts:
            config = facts["config"]
            teacher = load_teacher(
                config["teacher.model"],
                config["teacher.pretrained"],
                prompt=config["teacher.prompt"],
            )
            measured.append(
                teacher_cost(
                    teacher, facts["class_names"], config["dataset.image-size"]
                )
            )
    return measured
