"""Classify images with a delivered model."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from clip2fl_cli.model_keys import check_signature
from clip2fl_cli.runs import RunError
from clip2fl_common.data.image_reading import (
    UnreadableImageError,
    read_image,
    square_pixels,
)
from clip2fl_common.data.regular_files import NotReadError
from clip2fl_common.models import ImageClassifier
from clip2fl_common.shown import shown
from server_app.delivery import ModelCard
from server_app.delivery import load_model as load_delivered
from server_app.foreign_files import refuse_unless_regular
from server_app.run_folder import MODEL

# Images in one forward pass: fewer if they are large, since activations take the
# memory.
BATCH = 64
BATCH_PIXELS = 2**20

Picture: TypeAlias = (
    str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8] | torch.Tensor
)
"""A file; an image of Pillow's; uint8 RGB: an array [H, W, 3] or a tensor [3, H, W]."""


@dataclass(frozen=True)
class Prediction:
    """The model's prediction for one image.

    Attributes
    ----------
    classes : tuple of (str, float)
        Class names with their probabilities, the most probable first.
    """

    classes: tuple[tuple[str, float], ...]

    @property
    def name(self) -> str:
        """The most probable class."""
        return self.classes[0][0]

    @property
    def probability(self) -> float:
        """Probability of the most probable class, from 0 to 1."""
        return self.classes[0][1]


@dataclass(frozen=True)
class Model:
    """A delivered model, ready to predict.

    Attributes
    ----------
    file : Path
        File of the model.
    network : ImageClassifier
        In evaluation mode, on the CPU.
    card : ModelCard
        The model's description and the preparation of its input.
    """

    file: Path
    network: ImageClassifier
    card: ModelCard

    @classmethod
    def load(cls, path: Path, public_key: str | None = None) -> "Model":
        """Load a ``model.safetensors``, or the one in a run's or a fetched folder.

        Parameters
        ----------
        path : Path
            The file or folder.
        public_key : str or None
            As `model_file`.

        Raises
        ------
        RunError, SignatureError
            As `model_file`.
        ForeignFileError
            If the file is not a delivered model.
        """
        file = model_file(path, public_key)
        return cls(file, *load_delivered(file))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.card.class_names

    def predict(
        self, images: Iterable[Picture], top: int | None = None
    ) -> list[Prediction]:
        """Classify images in the same way as evaluation.

        Parameters
        ----------
        images : iterable of Picture
            Files that Pillow reads, images of Pillow's, arrays of uint8 [H, W, 3] or
            tensors of uint8 [3, H, W], of any size: the centre square is brought to
            the model's input size.
        top : int or None
            Largest number of classes for each image, at least 1; None returns all.

        Returns
        -------
        list of Prediction
            One for each image.

        Raises
        ------
        TypeError
            If an item is no image, or a single image is given instead of several.
        ValueError
            If ``top`` is less than 1.
        RunError
            If an image cannot be read, or the model gives values that are not finite.
        ForeignFileError
            If a path is no regular file.
        """
        if isinstance(images, str | os.PathLike | Image.Image):
            raise TypeError("predict takes several images: put a single one in a list")
        if top is not None and top < 1:
            raise ValueError(f"top = {top}, but it must be at least 1, or None for all")
        images = list(images)
        for image in images:
            if isinstance(image, str | os.PathLike):
                refuse_unless_regular(Path(image))
        batch = min(BATCH, max(1, BATCH_PIXELS // self.card.image_size**2))
        found: list[Prediction] = []
        for start in range(0, len(images), batch):
            found += self._predict(images[start : start + batch], start, top)
        return found

    def _predict(
        self, images: Sequence[Picture], start: int, top: int | None
    ) -> list[Prediction]:
        names = [_named(image, n) for n, image in enumerate(images, start)]
        pixels = np.stack(
            [
                _read(image, self.card.image_size, name)
                for image, name in zip(images, names, strict=True)
            ]
        )
        with torch.inference_mode():
            logits = self.network(self.card.normalization(torch.from_numpy(pixels)))
        for name, row in zip(names, logits, strict=True):
            if not bool(row.isfinite().all()):
                raise RunError(
                    f"{shown(self.file)} gives no finite numbers for {name}: its "
                    "weights are damaged, or training went astray"
                )
        wanted = min(top or len(self.class_names), logits.shape[1])
        likeliest = logits.softmax(1).topk(wanted, dim=1)
        rows = zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
        return [
            Prediction(
                tuple(
                    (self.class_names[c], probability)
                    for probability, c in zip(values, classes, strict=True)
                )
            )
            for values, classes in rows
        ]


def model_file(path: Path, public_key: str | None = None) -> Path:
    """Return the model that a path names, after checking its folder's signature.

    Parameters
    ----------
    path : Path
        A safetensors file, a run's folder, or a folder that a server signed.
    public_key : str or None
        Key that must have signed the folder, or the key's file; None: a signed folder
        must be signed by a key that this user trusts.

    Raises
    ------
    RunError
        If there is no such file, or no key for a signed folder.
    SignatureError
        If the folder is not exactly what the server signed.
    """
    file = path / MODEL if path.is_dir() else path
    # Reading the file reports a path that exists but is no file.
    if not os.path.lexists(file):
        raise RunError(
            f"{shown(file)} does not exist; give a {MODEL} or a complete run's folder"
        )
    check_signature(file.parent, public_key)
    return file


def _named(image: Picture, number: int) -> str:
    """Return the name of an image for messages."""
    if isinstance(image, str | os.PathLike):
        return shown(Path(image))
    return f"image {number}"


def _read(image: Picture, size: int, name: str) -> npt.NDArray[np.uint8]:
    """Return an image's centre square. Shape [3, size, size]."""
    try:
        if isinstance(image, str | os.PathLike):
            return read_image(Path(image), size)
        return square_pixels(_opened(image, name), size)
    except UnreadableImageError as error:
        raise RunError(f"{name} cannot be read as an image: {error.reason}") from None
    except NotReadError as error:
        raise RunError(f"{name} cannot be used: {error}") from None


def _loaded(image: Image.Image, name: str) -> Image.Image:
    """Return an image of Pillow's whose pixels are read: Pillow reads a file late."""
    if 0 in image.size:
        raise TypeError(f"{name} is an image of Pillow's without pixels")
    try:
        image.load()
    # Pillow raises nearly every type of error for damaged files.
    except Exception as error:
        raise RunError(f"{name} cannot be read as an image: {shown(error)}") from error
    return image


def _opened(
    image: Image.Image | npt.NDArray[np.uint8] | torch.Tensor, name: str
) -> Image.Image:
    if isinstance(image, Image.Image):
        return _loaded(image, name)
    if isinstance(image, torch.Tensor):
        shape, array = "[3, H, W]", image.cpu().numpy()
        colours = array.transpose(1, 2, 0) if array.ndim == 3 else array
    else:
        shape, colours = "[H, W, 3]", image
    if (
        not isinstance(colours, np.ndarray)
        or colours.dtype != np.uint8
        or colours.ndim != 3
        or colours.shape[2] != 3
        or colours.size == 0
    ):
        found = (
            f"{image.dtype} {list(image.shape)}"
            if isinstance(image, torch.Tensor | np.ndarray)
            else type(image).__name__
        )
        raise TypeError(
            f"{name} is {found}, but it must be a file, an image of Pillow's or uint8 "
            f"RGB of shape {shape}"
        )
    return Image.fromarray(np.ascontiguousarray(colours))
