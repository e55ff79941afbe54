"""Export delivered models as safetensors and ONNX, and measure their costs."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.benchmark import Timer

from clip2fl_cli.output import OutputFolder
from clip2fl_cli.run_schema import MAX_FACTS_BYTES, Facts
from clip2fl_cli.runs import DAMAGED, RunError
from clip2fl_common.teacher import DEMO, Teacher, load_teacher
from server_app.delivery import load_model
from server_app.foreign_files import ForeignFileError, opened, read_json
from server_app.onnx_model import ONNX_FILE, FromPixels, onnx_bytes
from server_app.run_folder import CONFIG, MODEL

# Seconds of measurement for each latency.
MEASURED_SECONDS = 2.0


@dataclass(frozen=True)
class Cost:
    """Size and latency of a model.

    Attributes
    ----------
    name : str
        Name of the model.
    parameters : int
        Number of trained parameters.
    megabytes : float
        Size of parameters and buffers in memory.
    milliseconds : float
        Median time for one image on this CPU with one thread.
    """

    name: str
    parameters: int
    megabytes: float
    milliseconds: float


def export(model: Path, folder: Path) -> tuple[Path, Path]:
    """Write a delivered model as safetensors and as ONNX.

    Both files contain the class names and the preprocessing as JSON in their metadata.
    `onnx_bytes` describes the ONNX graph.

    Parameters
    ----------
    model : Path
        A run's ``model.safetensors``.
    folder : Path
        Folder for ``model.safetensors`` and ``model.onnx``.

    Returns
    -------
    tuple of Path
        The two files.

    Raises
    ------
    ForeignFileError
        If the file is not a delivered model.
    OutputError
        If a file cannot be written. Existing links of these names are replaced.
    """
    content = onnx_bytes(*load_model(model))
    with OutputFolder.open(folder) as place:
        if not _is_same_file(model, folder / MODEL):
            with opened(model) as source, place.replacing(MODEL) as copy:
                shutil.copyfileobj(source, copy)
        place.write(ONNX_FILE, content)
    return folder / MODEL, folder / ONNX_FILE


def _is_same_file(model: Path, target: Path) -> bool:
    """Return whether a model would overwrite itself; a link to it is another file."""
    return (
        target.exists() and not target.is_symlink() and os.path.samefile(model, target)
    )


def student_cost(model: Path) -> Cost:
    """Measure a delivered model."""
    network, card = load_model(model)
    image = torch.zeros(1, 3, card.image_size, card.image_size, dtype=torch.uint8)
    forward = FromPixels(network, card.normalization).eval()
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


@dataclass(frozen=True)
class RunTeacher:
    """The teacher that a run's ``config.json`` names, not yet loaded.

    Attributes
    ----------
    name, pretrained, prompt : str
        As in the configuration.
    """

    name: str
    pretrained: str
    prompt: str

    @property
    def is_built_in(self) -> bool:
        """Whether the teacher comes with the program.

        A different teacher is loaded only on request, because a foreign file chose its
        folder or hub.
        """
        return self.name == DEMO

    def load(self) -> Teacher:
        """Load the teacher.

        Raises
        ------
        TeacherError
            If the teacher cannot be loaded.
        """
        return load_teacher(self.name, self.pretrained, prompt=self.prompt)


def run_teacher(model: Path) -> RunTeacher | None:
    """Return the teacher of the run to which a model belongs.

    Parameters
    ----------
    model : Path
        A run's ``model.safetensors``.

    Returns
    -------
    RunTeacher or None
        None if the model is not in a run's folder, or the run had no teacher.

    Raises
    ------
    RunError
        If the run's ``config.json`` has not the form that a run writes.
    """
    file = model.parent / CONFIG
    if not os.path.lexists(file):
        return None
    try:
        facts = read_json(file, Facts, MAX_FACTS_BYTES)
    except ForeignFileError as error:
        raise RunError(f"{error}; {DAMAGED}; --no-costs does without it") from None
    if not facts.get("teacher"):
        return None
    config = facts["config"]
    return RunTeacher(
        config["teacher.model"], config["teacher.pretrained"], config["teacher.prompt"]
    )


def costs(model: Path, teacher: RunTeacher | None = None) -> list[Cost]:
    """Measure a delivered model and, if wanted, a teacher.

    Parameters
    ----------
    model : Path
        A run's ``model.safetensors``.
    teacher : RunTeacher or None
        The run's teacher, which is loaded as its configuration says.

    Returns
    -------
    list of Cost
        The student, then the teacher.
    """
    measured = [student_cost(model)]
    if teacher is not None:
        _, card = load_model(model)
        measured.append(teacher_cost(teacher.load(), card.class_names, card.image_size))
    return measured
