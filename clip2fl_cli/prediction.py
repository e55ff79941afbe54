"""Classes of image files, by a delivered model."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from clip2fl_cli.runs import RunError
from clip2fl_common.data.image_reading import UnreadableImageError, read_image
from clip2fl_common.shown import shown
from server_app.delivery import load_model
from server_app.foreign_files import refuse_unless_regular
from server_app.run_folder import MODEL

# Images in one forward pass: fewer of large ones, whose activations take the memory.
BATCH = 64
BATCH_PIXELS = 2**20


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
    file = path / MODEL if path.is_dir() else path
    # What is there but is no file is told by reading it.
    if not os.path.lexists(file):
        raise RunError(
            f"{shown(file)} does not exist; give a {MODEL} or a complete run's folder"
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
        If the model is not there, an image cannot be read, or the model's weights
        give no finite numbers for one.
    ForeignFileError
        If the model is no delivered one, or an image is no file.
    """
    network, card = load_model(model_file(model))
    for file in images:
        refuse_unless_regular(file)
    batch = min(BATCH, max(1, BATCH_PIXELS // card.image_size**2))
    found = []
    for start in range(0, len(images), batch):
        files = images[start : start + batch]
        pixels = np.stack([_read(file, card.image_size) for file in files])
        with torch.inference_mode():
            logits = network(card.normalization(torch.from_numpy(pixels)))
        for file, row in zip(files, logits, strict=True):
            if not bool(row.isfinite().all()):
                raise RunError(
                    f"{shown(model)} gives no finite numbers for {shown(file)}: its "
                    "weights are damaged, or training went astray"
                )
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
