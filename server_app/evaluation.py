"""Central evaluation: one pass over the test images evaluates every classifier."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from clip2fl_common.data.datasets import ImageDataset, LoadedImages
from clip2fl_common.metrics import (
    HELD_OUT,
    TUNING,
    AccuracyReport,
    ShotGroups,
    accuracy_report,
    confusion_matrix,
)
from clip2fl_common.models import ImageClassifier, folded
from clip2fl_common.parallel import map_pieces
from clip2fl_common.randomness import generator
from clip2fl_common.teacher import Teacher

# Decoded test images are cached up to this many bytes; larger sets are read each time.
KEEP_BYTES = 2**30
# Test images are read in blocks of this many at a time.
BLOCK = 1024
# The images for tuning are the same for every seed of a run.
TUNING_SEED = 0


@dataclass
class Evaluator:
    """Accuracy of classifiers on a data set's test images.

    Attributes
    ----------
    dataset : ImageDataset
        Data set with the test images.
    groups : ShotGroups
        Shot groups of the training data.
    max_images : int
        Test images in all evaluations but the final one, drawn once and evenly
        over the classes; 0: all.
    batch_size : int
        Images in one forward pass.
    device : torch.device
        Where the model runs.
    seed : int
        Seed of the drawn test images.
    tuning_share : float
        Share of each class's test images on which settings are chosen. They are the
        same in all runs; 0: none.
    confusion : dict of str to ndarray of int64, shape [C, C]
        Test images by true and predicted class: each head's last evaluation.
    parts : dict of str to dict of str to AccuracyReport
        Each head's accuracy on the two parts of the test images, `TUNING` and
        `HELD_OUT`, in the last evaluation; empty without a tuning share.
    """

    dataset: ImageDataset
    groups: ShotGroups
    max_images: int
    batch_size: int
    device: torch.device
    seed: int
    tuning_share: float = 0.0

    def __post_init__(self) -> None:
        """Draw the images for tuning, and for all evaluations but the final one."""
        self._all = np.arange(len(self.dataset.test.labels))
        self._tuning = self._draw_tuning()
        self._subset = self._draw_subset()
        self._kept: dict[tuple[bool, int], LoadedImages] = {}
        self.unreadable = 0
        self.confusion: dict[str, npt.NDArray[np.int64]] = {}
        self.parts: dict[str, dict[str, AccuracyReport]] = {}

    def indices(self, final: bool) -> npt.NDArray[np.int64]:
        """Return the indices of the test images that an evaluation uses."""
        return self._all if final else self._subset

    def evaluate(
        self,
        model: ImageClassifier,
        heads: Mapping[str, nn.Linear],
        final: bool,
    ) -> dict[str, AccuracyReport]:
        """Return the accuracy of every head on the model's features.

        Parameters
        ----------
        model : ImageClassifier
            Backbone and projection.
        heads : mapping of str to nn.Linear
            Classifiers by name.
        final : bool
            Use all test images, regardless of ``max_images``.

        Returns
        -------
        dict of str to AccuracyReport
            The attributes ``confusion`` and ``parts`` hold the confusion matrices of
            these reports, and the reports on parts of the test images.
        """
        network = folded(model.to(self.device))
        labels: list[torch.Tensor] = []

        def batches() -> Iterator[torch.Tensor]:
            for block in self._blocks(final):
                labels.append(block.labels)
                yield from block.images.split(self.batch_size)

        def predict(images: torch.Tensor) -> torch.Tensor:
            normalized = self.dataset.normalization(images.to(self.device))
            features = network.features(normalized)
            return torch.stack([head(features).argmax(1) for head in heads.values()])

        predictions = torch.cat(
            list(map_pieces(predict, batches(), self.device)), dim=1
        ).cpu()
        truth = torch.cat(labels)
        by_head = dict(zip(heads, predictions, strict=True))
        self.confusion = {
            name: self._confusion(truth, predicted)
            for name, predicted in by_head.items()
        }
        self.parts = {}
        if self.tuning_share > 0:
            tuning = torch.from_numpy(self._tuning[self.indices(final)])
            for part, chosen in ((TUNING, tuning), (HELD_OUT, ~tuning)):
                self.parts[part] = {
                    name: self._report(truth[chosen], predicted[chosen])
                    for name, predicted in by_head.items()
                }
        return {
            name: accuracy_report(confusion, self.groups)
            for name, confusion in self.confusion.items()
        }

    def teacher_accuracy(self, teacher: Teacher) -> AccuracyReport:
        """Return the teacher's zero-shot accuracy on all test images."""
        prototypes = teacher.text_features(self.dataset.class_names)
        labels, predictions = [], []
        for block in self._blocks(final=True):
            labels.append(block.labels)
            features = teacher.cached_image_features(block.images)
            predictions.append((features @ prototypes.T).argmax(1))
        return self._report(torch.cat(labels), torch.cat(predictions))

    def _report(
        self, labels: torch.Tensor, predictions: torch.Tensor
    ) -> AccuracyReport:
        return accuracy_report(self._confusion(labels, predictions), self.groups)

    def _confusion(
        self, labels: torch.Tensor, predictions: torch.Tensor
    ) -> npt.NDArray[np.int64]:
        return confusion_matrix(
            labels.numpy(), predictions.numpy(), len(self.dataset.class_names)
        )

    def _blocks(self, final: bool) -> Iterator[LoadedImages]:
        """Yield the test images in blocks, from memory if they fit into it."""
        indices = self.indices(final)
        size = self.dataset.image_size
        keep = 3 * size * size * len(self._all) <= KEEP_BYTES
        unreadable = 0
        for start in range(0, len(indices), BLOCK):
            key = (final, start)
            block = self._kept.get(key)
            if block is None:
                block = self.dataset.test.load(indices[start : start + BLOCK])
            if keep:
                self._kept[key] = block
            unreadable += len(block.unreadable)
            yield block
        self.unreadable = unreadable

    def _draw_subset(self) -> npt.NDArray[np.int64]:
        classes = len(self.dataset.class_names)
        if not 0 < self.max_images < len(self._all):
            return self._all
        share = -(-self.max_images // classes)
        drawn = [places[:share] for places in self._shuffled(self.seed, "evaluation")]
        return np.sort(np.concatenate(drawn))

    def _draw_tuning(self) -> npt.NDArray[np.bool_]:
        labels, classes = self.dataset.test.labels, len(self.dataset.class_names)
        return tuning_images(labels, classes, self.tuning_share)

    def _shuffled(self, seed: int, purpose: str) -> list[npt.NDArray[np.int64]]:
        labels, classes = self.dataset.test.labels, len(self.dataset.class_names)
        return _shuffled_places(labels, classes, seed, purpose)


def tuning_images(
    labels: npt.NDArray[np.int64], num_classes: int, share: float
) -> npt.NDArray[np.bool_]:
    """Return which test images are for tuning; a run's seed does not change them.

    Parameters
    ----------
    labels : ndarray of int64, shape [N]
        Classes of the test images.
    num_classes : int
        Number of classes C.
    share : float
        Share of each class's images.

    Returns
    -------
    ndarray of bool, shape [N]
    """
    tuning = np.zeros(len(labels), dtype=bool)
    for places in _shuffled_places(labels, num_classes, TUNING_SEED, "tuning"):
        tuning[places[: round(share * len(places))]] = True
    return tuning


def _shuffled_places(
    labels: npt.NDArray[np.int64], num_classes: int, seed: int, purpose: str
) -> list[npt.NDArray[np.int64]]:
    """Return the shuffled places of each class's images."""
    order = torch.randperm(len(labels), generator=generator(seed, purpose)).numpy()
    return [order[labels[order] == c] for c in range(num_classes)]
