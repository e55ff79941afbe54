"""The delivered model: weights and all that is needed to use them, in one file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from clip2fl_common.datasets import Normalization
from clip2fl_common.models import ImageClassifier, build_model
from server_app.durable import replaced_whole


@dataclass(frozen=True)
class ModelCard:
    """What a delivered model is and how its input is made.

    Attributes
    ----------
    architecture : str
        Name for `build_model`.
    feature_dim : int
        Width of the features.
    class_names : tuple of str
        Names of the outputs, in their order.
    image_size : int
        Side of the input in pixels.
    normalization : Normalization
        Of the input.
    provenance : Mapping
        Method, data set, teacher, seed and rounds, for the reader.
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
        File to write; it appears whole or not at all.
    model : ImageClassifier
        Global model; its own classifier is not written.
    classifier : nn.Linear
        The classifier that belongs to the delivered model.
    card : ModelCard
        Goes into the file's metadata as JSON.
    """
    state = dict(model.state_dict())
    state |= {f"classifier.{name}": t for name, t in classifier.state_dict().items()}
    save_tensors(path, state, {"card": json.dumps(asdict(card))})


def save_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file so that it is there whole or not at all.

    Parameters
    ----------
    path : Path
        File to write; one that is there is replaced.
    tensors : mapping of str to Tensor
        Its content.
    metadata : mapping of str to str or None
        Goes along with it.
    """
    with replaced_whole(path) as temporary:
        # Readable for whom other files are: safetensors leaves it to the owner alone.
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata=None if metadata is None else dict(metadata),
        )
        temporary.chmod(mode)


def load_model(path: Path) -> tuple[ImageClassifier, ModelCard]:
    """Load a delivered model, ready to predict.

    Parameters
    ----------
    path : Path
        A run's ``model.safetensors``.

    Returns
    -------
    ImageClassifier
        In evaluation mode, on the CPU.
    ModelCard
    """
    with safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()["card"])
        state: dict[str, torch.Tensor] = {
            name: file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
        }
    norm = fields.pop("normalization")
    card = ModelCard(
        **{**fields, "class_names": tuple(fields["class_names"])},
        normalization=Normalization(tuple(norm["mean"]), tuple(norm["std"])),
    )
    model = build_model(card.architecture, len(card.class_names), card.feature_dim)
    model.load_state_dict(state)
    return model.eval(), card
