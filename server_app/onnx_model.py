"""A delivered model as ONNX: uint8 pixels in, logits out."""

import json

import torch
from torch import nn

from clip2fl_common.data.datasets import Normalization
from clip2fl_common.models import ImageClassifier
from server_app.delivery import ModelCard

ONNX_FILE = "model.onnx"


class FromPixels(nn.Module):
    """A model with its normalisation: uint8 pixels in, logits out.

    Parameters
    ----------
    model : ImageClassifier
        The delivered model.
    normalization : Normalization
        Normalization of the model's input.
    """

    def __init__(self, model: ImageClassifier, normalization: Normalization) -> None:
        super().__init__()
        self.model = model
        self.normalization = normalization

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, C] of RGB images [N, 3, S, S] of uint8."""
        logits: torch.Tensor = self.model(self.normalization(pixels))
        return logits


def onnx_bytes(network: ImageClassifier, card: ModelCard) -> bytes:
    """Return a delivered model as an ONNX file.

    The graph includes the normalisation: its input ``pixels`` are RGB images
    [N, 3, S, S] of uint8, for any N, and its output ``logits`` is [N, C]. The class
    names and the preprocessing are JSON in its metadata.

    Parameters
    ----------
    network : ImageClassifier
        The delivered model.
    card : ModelCard
        Its description.
    """
    import onnx

    # Two images, because torch would take a batch size of one as a constant.
    pixels = torch.zeros(2, 3, card.image_size, card.image_size, dtype=torch.uint8)
    program = torch.onnx.export(
        FromPixels(network, card.normalization).eval(),
        (pixels,),
        input_names=["pixels"],
        output_names=["logits"],
        dynamic_shapes={"pixels": {0: torch.export.Dim("images")}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    exported = program.model_proto
    # torch notes the line of code of each operation, with paths of this machine.
    for node in exported.graph.node:
        node.ClearField("metadata_props")
    onnx.helper.set_model_props(
        exported,
        {
            "class_names": json.dumps(card.class_names),
            "preprocessing": json.dumps(preprocessing(card)),
            "provenance": json.dumps(dict(card.provenance)),
        },
    )
    onnx.checker.check_model(exported)
    return bytes(exported.SerializeToString())


def preprocessing(card: ModelCard) -> dict[str, object]:
    """Return the steps that make an image the input of the ONNX graph."""
    return {
        "colour": "RGB",
        "orientation": "upright (EXIF)",
        "crop": "centre square",
        "size": card.image_size,
        "interpolation": "bicubic",
        "layout": "N, 3, height, width",
        "type": "uint8",
        "normalisation": "in the graph",
    }
