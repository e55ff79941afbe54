"""The delivered model: its weights and all facts needed to use it, in one file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import nn

from clip2fl_common.data.datasets import Normalization
from clip2fl_common.limits import (
    MAX_CLASSES,
    MAX_FEATURE_DIM,
    MAX_IMAGE_SIZE,
    MAX_NAME_LENGTH,
    MIN_IMAGE_SIZE,
)
from clip2fl_common.models import MODELS, ImageClassifier, build_model
from clip2fl_common.shown import shown
from server_app.foreign_files import ForeignFileError, check, parse_json
from server_app.tensor_files import Declared, TensorFile, save_tensors


@dataclass(frozen=True)
class ModelCard:
    """Describes a delivered model and how its input is prepared.

    Attributes
    ----------
    architecture : str
        Name of the architecture, for `build_model`.
    feature_dim : int
        Width of the features.
    class_names : tuple of str
        Names of the outputs, in their order.
    image_size : int
        Side of the input in pixels.
    normalization : Normalization
        Normalization of the input.
    provenance : Mapping
        Method, data set, teacher, seed and rounds, as information for people.
    """

    architecture: str
    feature_dim: int
    class_names: tuple[str, ...]
    image_size: int
    normalization: Normalization
    provenance: Mapping[str, str | int | float | None]


def save_model(
    path: Path, model: ImageClassifier, classifier: nn.Linear, card: ModelCard
) -> None:
    """Write backbone, projection and the given classifier as one safetensors file.

    Parameters
    ----------
    path : Path
        File to write; it appears complete or not at all.
    model : ImageClassifier
        Global model; its own classifier is not saved.
    classifier : nn.Linear
        The classifier to save with it.
    card : ModelCard
        The model's description, stored as JSON in the file's metadata.
    """
    state = dict(model.state_dict())
    state |= {f"classifier.{name}": t for name, t in classifier.state_dict().items()}
    save_tensors(path, state, {"card": json.dumps(asdict(card))})


def _known_architecture(name: str) -> str:
    if name not in MODELS:
        raise ValueError(f"{name!r:.60} is none of {', '.join(MODELS)}")
    return name


_Text = Annotated[str, Field(max_length=10 * MAX_NAME_LENGTH)]
# Wide bounds that still keep every pixel within the range of float32.
_Mean = Annotated[float, Field(ge=-1e6, le=1e6)]
_Deviation = Annotated[float, Field(ge=1e-6, le=1e6)]


class _NormalizationFields(BaseModel):
    """Mean and deviation of the three colour channels."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    mean: Annotated[list[_Mean], Field(min_length=3, max_length=3)]
    std: Annotated[list[_Deviation], Field(min_length=3, max_length=3)]


class _CardFields(BaseModel):
    """The fields that a model card in a file must have.

    Class names may repeat: ImageNet has two classes called "missile".
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    architecture: Annotated[str, AfterValidator(_known_architecture)]
    feature_dim: Annotated[int, Field(ge=1, le=MAX_FEATURE_DIM)]
    class_names: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH)]],
        Field(min_length=1, max_length=MAX_CLASSES),
    ]
    image_size: Annotated[int, Field(ge=MIN_IMAGE_SIZE, le=MAX_IMAGE_SIZE)]
    normalization: _NormalizationFields
    provenance: Annotated[
        dict[_Text, _Text | int | float | None], Field(max_length=100)
    ]


def _read_card(file: TensorFile) -> ModelCard:
    where = f"{shown(file.path)}: its card"
    if "card" not in file.metadata:
        raise ForeignFileError(f"{where} is missing, so it is no delivered model")
    fields = parse_json(file.metadata["card"], _CardFields, where)
    card = check(fields, _CardFields, where)
    return ModelCard(
        card.architecture,
        card.feature_dim,
        tuple(card.class_names),
        card.image_size,
        _normalization(card.normalization),
        card.provenance,
    )


def _normalization(fields: _NormalizationFields) -> Normalization:
    (a, b, c), (d, e, f) = fields.mean, fields.std
    return Normalization((a, b, c), (d, e, f))


def load_model(path: Path) -> tuple[ImageClassifier, ModelCard]:
    """Load a delivered model, ready to predict.

    The file may come from an untrusted source. Memory is allocated only after the card
    is valid and the tensors have the types and shapes of the card's architecture.

    Parameters
    ----------
    path : Path
        A run's ``model.safetensors``.

    Returns
    -------
    ImageClassifier
        In evaluation mode, on the CPU.
    ModelCard

    Raises
    ------
    ForeignFileError
        If the file is no delivered model; names the file, the field or tensor, and its
        value.
    """
    try:
        file = TensorFile.read(path)
        card = _read_card(file)
        size = card.architecture, len(card.class_names), card.feature_dim
        with torch.device("meta"):  # shapes without memory
            expected = build_model(*size).state_dict()
        file.require({name: Declared.of(tensor) for name, tensor in expected.items()})
        state = file.load(expected)
        for name, tensor in state.items():
            if name.endswith("running_var") and bool((tensor < 0).any()):
                raise ForeignFileError(
                    f"{shown(path)}: the tensor {name} holds negative variances"
                )
    except ForeignFileError as error:
        raise ForeignFileError(
            f"{error}; give a model.safetensors that a run delivered"
        ) from None
    model = build_model(*size)
    model.load_state_dict(state)
    return model.eval(), card
