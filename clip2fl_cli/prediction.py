"""Classes of image files, by a delivered model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from clip2fl_cli.runs import MODEL_FILE, RunError
from clip2fl_common.image_reading import UnreadableImageError, read_image
from clip2fl_common.shown import shown
from server_app.checkpoint import load_model

BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes
    ----------
    file : Path
        The image.
    classes : tuple of (str, float)
        Class names and their probabilities, the likeliest first.
    """

    file: Path
    classes: tuple[tuple[str, float], ...]


def model_file(path: Path) -> Path:
    """Return the model that a path names: a safetensors file or a run's folder.

    Raises
    ------
    RunError
        If there is none.
    """
    file = path / MODEL_FILE if path.is_dir() else path
    if not file.is_file():
        raise RunError(
            f"{file} does not exist; give a {MODEL_FILE} or a complete run's folder"
        )
    return file


def predict(model: Path, images: Sequence[Path], top: int) -> list[Prediction]:
    """Classify image files as evaluation does.

    Parameters
    ----------
    model : Path
        A delivered model, or a run's folder.
    images : sequence of Path
        Files of any size that Pillow reads: the centre square is brought to the
        model's input size.
    top : int
        Classes to return for each, at most.

    Returns
    -------
    list of Prediction

    Raises
    ------
    RunError
        If the model is not there, or an image cannot be read.
    """
    network, card = load_model(model_file(model))
    found = []
    for start in range(0, len(images), BATCH):
        files = images[start : start + BATCH]
        pixels = np.stack([_read(file, card.image_size) for file in files])
        with torch.inference_mode():
            logits = network(card.normalization(torch.from_numpy(pixels)))
        likeliest = logits.softmax(1).topk(min(top, logits.shape[1]), dim=1)
        for file, values, classes in zip(
            files, likeliest.values.tolist(), likeliest.indices.tolist(), strict=True
        ):
            names = [card.class_names[c] for c in classes]
            found.append(Prediction(file, tuple(zip(names, values, strict=True))))
    return found


def _read(file: Path, size: int) -> npt.NDArray[np.uint8]:
    try:
        return read_image(file, size)
    except UnreadableImageError as error:
        raise RunError(
            f"{shown(file)} cannot be read as an image: {error.reason}"
        ) from None
