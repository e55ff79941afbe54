"""What a client computes for a method besides training: one class for each field."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from flwr.app import ArrayRecord

from client_app.images import gradient_images
from client_app.own_site import OwnSite
from client_app.training import PixelImages
from clip2fl_common.config import RunConfig
from clip2fl_common.data.datasets import ImageDataset, LoadedImages
from clip2fl_common.messages import TrainRequest, array_fields
from clip2fl_common.models import ImageClassifier
from clip2fl_common.randomness import generator, secret_generator


@dataclass(frozen=True)
class ClientRound:
    """All that a client has in one round.

    Attributes
    ----------
    config : RunConfig
        The run's configuration, as this client follows it.
    request : TrainRequest
        What the server asks for.
    site : OwnSite or None
        This node, if it has images of its own.
    dataset : ImageDataset
        The data set.
    loaded : LoadedImages
        This client's training images as they were read.
    images : PixelImages, N of them
        The same, normalised batch by batch on the device.
    labels : Tensor of int64, shape [N]
        Their classes, on the device.
    model : ImageClassifier
        The global model before local training, the local one after it.
    """

    config: RunConfig
    request: TrainRequest
    site: OwnSite | None
    dataset: ImageDataset
    loaded: LoadedImages
    images: PixelImages
    labels: torch.Tensor
    model: ImageClassifier

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.dataset.class_names)

    @property
    def precision(self) -> torch.dtype:
        """Type of forward and backward passes: float32 or bfloat16."""
        precision: torch.dtype = getattr(torch, self.config.client.precision)
        return precision

    def random(self, purpose: str) -> torch.Generator:
        """Return the random numbers of this client and round for one purpose."""
        request = self.request
        return generator(
            self.config.seed, purpose, request.server_round, request.stream
        )

    def noise_source(self) -> torch.Generator:
        """Return the source of noise: the run's seed only for simulated clients."""
        return self.random("privacy") if self.site is None else secret_generator()

    def fixed_images(self) -> dict[int, torch.Tensor] | None:
        """Return which images statistics may be made of, where a site fixes them.

        Returns
        -------
        dict of int to Tensor of int64, or None
            Class to places among the N images; None where the run's seed chooses.
        """
        return gradient_images(self.config, self.site, self.dataset, self.loaded)

    def encode(self, field: str, tensors: Mapping[str, torch.Tensor]) -> ArrayRecord:
        """Return a declared field's arrays.

        Parameters
        ----------
        field : str
            Name of a field of fixed shapes (`ArrayFields`).
        tensors : mapping of str to Tensor
            Of the declared shapes.
        """
        return array_fields(field, self.config, self.num_classes).encode(tensors)


class ClientPart:
    """Computes one declared field of a reply; override one of the two hooks.

    Attributes
    ----------
    field : str
        The field's name in `clip2fl_common.messages.REPLY_FIELDS`, where server and
        client find how its arrays look.
    """

    field: ClassVar[str]

    def before_training(self, client: ClientRound) -> ArrayRecord | None:
        """Return the field's arrays, computed with the global model."""
        return None

    def after_training(self, client: ClientRound) -> ArrayRecord | None:
        """Return the field's arrays, computed with the local model."""
        return None
