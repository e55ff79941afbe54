"""Computations of a client besides training: one class for each reply field."""

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
from clip2fl_common.randomness import Noise, generator, secret_noise, seeded_noise


@dataclass(frozen=True)
class ClientRound:
    """The inputs of a client in one round.

    Attributes
    ----------
    config : RunConfig
        The run's configuration, as this client follows it.
    request : TrainRequest
        The server's request.
    site : OwnSite or None
        This node, if it has images of its own.
    dataset : ImageDataset
        The data set.
    loaded : LoadedImages
        This client's training images as they were read.
    images : PixelImages, N of them
        The same images, normalised batch by batch on the device.
    labels : Tensor of int64, shape [N]
        Their classes, on the device.
    model : ImageClassifier
        The global model before local training, the local model after it.
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
        """Return the number of classes C."""
        return len(self.dataset.class_names)

    @property
    def precision(self) -> torch.dtype:
        """Return the type of forward and backward passes: float32 or bfloat16."""
        precision: torch.dtype = getattr(torch, self.config.client.precision)
        return precision

    def random(self, purpose: str) -> torch.Generator:
        """Return the generator of this client and round for one purpose."""
        request = self.request
        return generator(
            self.config.seed, purpose, request.server_round, request.stream
        )

    def noise_source(self, purpose: str = "privacy") -> Noise:
        """Return the source of noise; only simulated clients use the run's seed."""
        if self.site is not None:
            return secret_noise
        return seeded_noise(self.random(purpose))

    def fixed_images(self) -> dict[int, torch.Tensor] | None:
        """Return which images statistics may be computed from, if the site fixes them.

        Returns
        -------
        dict of int to Tensor of int64, or None
            By class, positions among the N images; None if the run's seed selects them.
        """
        return gradient_images(self.config, self.site, self.dataset, self.loaded)

    def encode(self, field: str, tensors: Mapping[str, torch.Tensor]) -> ArrayRecord:
        """Return the arrays of a declared field.

        Parameters
        ----------
        field : str
            Name of a field with fixed shapes (`ArrayFields`).
        tensors : mapping of str to Tensor
            Tensors of the declared shapes.
        """
        return array_fields(field, self.config, self.num_classes).encode(tensors)


class ClientPart:
    """Compute one declared field of a reply; override one of the two hooks.

    Attributes
    ----------
    field : str
        The field's name in `clip2fl_common.messages.REPLY_FIELDS`, which declares its
        arrays for server and client. A site whose rules require clipping or noise
        sends only fields with keys for them (`clip2fl_common.protection`), and the part
        follows these keys.
    """

    field: ClassVar[str]

    def before_training(self, client: ClientRound) -> ArrayRecord | None:
        """Return the field's arrays, computed from the global model."""
        return None

    def after_training(self, client: ClientRound) -> ArrayRecord | None:
        """Return the field's arrays, computed from the local model."""
        return None
