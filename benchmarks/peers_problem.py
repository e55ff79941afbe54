"""The one problem that all peers solve: model, clients, batches and step size.

Each peer gets the very pictures of each batch, so that all must average the same model.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from client_app.augmentation import random_crop_flip
from client_app.training import PixelImages
from clip2fl_common.config import RunConfig
from clip2fl_common.data.datasets import load_dataset, partition_indices
from clip2fl_common.models import ImageClassifier, build_model
from clip2fl_common.randomness import generator

CONFIG, MODEL, TIMES = "config.json", "model.pt", "times.json"
"""Files of a peer's folder: the run configuration, the model after the first round, and
the times at which the rounds ended, in seconds since the epoch."""
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """FedAvg on the clients of a run; all of them take part in every round.

    Attributes
    ----------
    config : RunConfig
        The run's configuration.
    """

    config: RunConfig

    @classmethod
    def read(cls, folder: Path) -> "Problem":
        """Read the configuration in a peer's folder."""
        flat = json.loads((folder / CONFIG).read_text("utf-8"))
        return cls(RunConfig.from_run_config(flat))

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return self.config.federation.rounds

    @property
    def clients(self) -> int:
        """Number of clients."""
        return self.config.partition.clients

    def model(self) -> ImageClassifier:
        """Return the initial global model."""
        torch.manual_seed(generator(self.config.seed, "model").initial_seed())
        settings = self.config.model
        classes = len(load_dataset(self.config.dataset).class_names)
        return build_model(settings.name, classes, settings.feature_dim)

    @cached_property
    def held(self) -> list[tuple[PixelImages, torch.Tensor]]:
        """Images and labels of each client."""
        config = self.config
        dataset = load_dataset(config.dataset)
        parts = partition_indices(config.dataset, config.partition, config.seed)
        loaded = [dataset.train.load(part) for part in parts]
        cpu = torch.device("cpu")
        return [
            (PixelImages(one.images, dataset.normalization, cpu), one.labels)
            for one in loaded
        ]

    def batches(self, server_round: int, client: int) -> Iterator[Batch]:
        """Yield a client's batches of one round: pictures [n, 3, H, W], labels [n]."""
        settings = self.config.client
        images, labels = self.held[client]
        random = generator(self.config.seed, "batches", server_round, client)
        for _ in range(settings.epochs):
            order = torch.randperm(len(images), generator=random)
            for chosen in order.split(settings.batch_size):
                pictures = random_crop_flip(
                    images[chosen], settings.crop_padding, random
                )
                yield pictures, labels[chosen]


def write_times(folder: Path, ends: list[float]) -> None:
    """Write when the rounds ended."""
    (folder / TIMES).write_text(json.dumps(ends), "utf-8")


def write_model(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of the model after the first round."""
    torch.save(
        {name: torch.as_tensor(value) for name, value in state.items()}, folder / MODEL
    )
