"""A run's data set and, with simulated clients, its partition among them."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clip2fl_common.config import RunConfig
from clip2fl_common.data.datasets import ImageDataset, load_dataset, partition_indices
from clip2fl_common.metrics import ShotGroups, listed_groups, shot_groups
from clip2fl_common.partition import class_counts


@dataclass(frozen=True)
class RunData:
    """A run's data set, and its partition among simulated clients.

    Attributes
    ----------
    dataset : ImageDataset
        Class names and test images; with simulated clients also the training images.
    groups : ShotGroups
        Many-, medium- and few-shot classes.
    parts : tuple of ndarray of int64
        Training images of each of the K simulated clients; empty with sites.
    held : ndarray of int64, shape [K, C], or None
        Training images by client and class. None with sites, which do not report them.
    """

    dataset: ImageDataset
    groups: ShotGroups
    parts: tuple[npt.NDArray[np.int64], ...] = ()
    held: npt.NDArray[np.int64] | None = None

    @classmethod
    def load(cls, config: RunConfig) -> "RunData":
        """Load a run's data set, and divide it among the simulated clients if any."""
        dataset = load_dataset(config.dataset)
        classes = len(dataset.class_names)
        if not config.simulated:
            return cls(dataset, listed_groups(classes))
        parts = partition_indices(config.dataset, config.partition, config.seed)
        held = class_counts(parts, dataset.train.labels, classes)
        return cls(dataset, shot_groups(held.sum(axis=0).tolist()), parts, held)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the C classes."""
        return self.dataset.class_names

    @property
    def images_per_client(self) -> tuple[int, ...]:
        """Training images of each simulated client."""
        return tuple(len(part) for part in self.parts)

    def fingerprint(self) -> str:
        """Return a hash of class names, labels and partition, without the images."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for labels in (self.dataset.train.labels, self.dataset.test.labels):
            digest.update(labels.astype("<i8").tobytes())
        for part in self.parts:
            digest.update(part.astype("<i8").tobytes())
        return digest.hexdigest()

    def counts(self) -> dict[str, Any]:
        """Return the image counts for ``config.json``; with sites, an empty mapping."""
        if self.held is None:
            return {}
        return {
            "train_images_per_class": self.held.sum(axis=0).tolist(),
            "train_images_per_client": self.images_per_client,
        }
