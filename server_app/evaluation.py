"""Central evaluation: one pass over the test images evaluates every classifier."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from clip2fl_common.config import ConfigError
from clip2fl_common.data.datasets import DatasetError, ImageDataset, LoadedImages
from clip2fl_common.metrics import (
    HELD_OUT,
    TEACHER_HEAD,
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


def tuning_images(labels: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.bool_]:
    """Draw the test images on which settings are chosen; all others are held out.

    The drawing depends on the labels and the share alone, so that all runs on a data
    set have the same images for tuning.

    Parameters
    ----------
    labels : ndarray of int64, shape [N]
        Class of each test image.
    share : float
        Share of each class's images, rounded to whole images; 0: none.

    Returns
    -------
    ndarray of bool, shape [N]
        Whether each image is for tuning.
    """
    tuning = np.zeros(len(labels), dtype=bool)
    for places in _shuffled(labels, TUNING_SEED, "tuning"):
        tuning[places[: round(share * len(places))]] = True
    return tuning


def _shuffled(
    labels: npt.NDArray[np.int64], seed: int, purpose: str
) -> list[npt.NDArray[np.int64]]:
    """Return the shuffled places of each class's images."""
    order = torch.randperm(len(labels), generator=generator(seed, purpose)).numpy()
    return [order[labels[order] == c] for c in np.unique(labels)]


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

    Raises
    ------
    ConfigError
        If the tuning share leaves one of the two parts without an image.
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
        self._tuning = tuning_images(self.dataset.test.labels, self.tuning_share)
        self._subset = self._draw_subset()
        if self.tuning_share > 0:
            for used in (self._all, self._subset):
                self._for_tuning(used)
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
        # Copies: a method's own classifier stays on the method's device.
        heads = {name: deepcopy(head).to(self.device) for name, head in heads.items()}
        labels: list[torch.Tensor] = []
        places: list[npt.NDArray[np.int64]] = []

        def batches() -> Iterator[torch.Tensor]:
            for found, block in self._blocks(final):
                labels.append(block.labels)
                places.append(found)
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
        self.parts = self._part_reports(np.concatenate(places), truth, by_head, final)
        shares = self._class_counts(final, slice(None))
        return {
            name: accuracy_report(confusion, self.groups, shares)
            for name, confusion in self.confusion.items()
        }

    def teacher_accuracy(self, teacher: Teacher) -> AccuracyReport:
        """Return the teacher's zero-shot accuracy on all test images.

        The attribute ``parts`` holds its accuracy on parts of them.
        """
        prototypes = teacher.text_features(self.dataset.class_names)
        labels, predictions, places = [], [], []
        for found, block in self._blocks(final=True):
            labels.append(block.labels)
            places.append(found)
            features = teacher.cached_image_features(block.images)
            predictions.append((features @ prototypes.T).argmax(1))
        truth, predicted = torch.cat(labels), torch.cat(predictions)
        self.parts = self._part_reports(
            np.concatenate(places), truth, {TEACHER_HEAD: predicted}, final=True
        )
        return accuracy_report(self._confusion(truth, predicted), self.groups)

    def part_sizes(self) -> dict[str, int]:
        """Return the number of test images of each part; empty without a share."""
        if self.tuning_share == 0:
            return {}
        tuning = int(self._tuning.sum())
        return {TUNING: tuning, HELD_OUT: len(self._tuning) - tuning}

    def _part_reports(
        self,
        places: npt.NDArray[np.int64],
        truth: torch.Tensor,
        by_head: Mapping[str, torch.Tensor],
        final: bool,
    ) -> dict[str, dict[str, AccuracyReport]]:
        """Return each head's accuracy on the two parts of images at these places."""
        if self.tuning_share == 0:
            return {}
        tuning = torch.from_numpy(self._for_tuning(places))
        return {
            part: {
                name: accuracy_report(
                    self._confusion(truth[chosen], predicted[chosen]),
                    self.groups,
                    self._class_counts(final, whole),
                )
                for name, predicted in by_head.items()
            }
            for part, chosen, whole in (
                (TUNING, tuning, self._tuning),
                (HELD_OUT, ~tuning, ~self._tuning),
            )
        }

    def _class_counts(
        self, final: bool, part: slice | npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int64] | None:
        """Return the images of each class in a part, if drawn images stand for them."""
        if self.indices(final) is self._all:
            return None
        labels = self.dataset.test.labels[part]
        return np.bincount(labels, minlength=len(self.dataset.class_names))

    def _for_tuning(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return whether each of these test images is for tuning, not held out."""
        tuning = self._tuning[places]
        number = int(tuning.sum())
        if not 0 < number < len(places):
            raise ConfigError(
                f"evaluation.tuning-share = {self.tuning_share} leaves {number} of "
                f"{len(places)} test images (evaluation.max-images = "
                f"{self.max_images}) for choosing settings and {len(places) - number} "
                "held out, but both need some; choose another share or more images"
            )
        return tuning

    def _confusion(
        self, labels: torch.Tensor, predictions: torch.Tensor
    ) -> npt.NDArray[np.int64]:
        return confusion_matrix(
            labels.numpy(), predictions.numpy(), len(self.dataset.class_names)
        )

    def _blocks(
        self, final: bool
    ) -> Iterator[tuple[npt.NDArray[np.int64], LoadedImages]]:
        """Yield the test images and their indices, from memory if they fit into it."""
        indices = self.indices(final)
        size = self.dataset.image_size
        keep = 3 * size * size * len(indices) <= KEEP_BYTES
        whole = indices is self._all
        unreadable = 0
        for start in range(0, len(indices), BLOCK):
            key = (whole, start)
            block = self._kept.get(key)
            if block is None:
                block = self.dataset.test.load(indices[start : start + BLOCK])
            if keep:
                self._kept[key] = block
            unreadable += len(block.unreadable)
            yield np.delete(indices[start : start + BLOCK], block.left_out), block
        self.unreadable = unreadable
        if unreadable and unreadable == len(indices):
            raise DatasetError(f"none of {unreadable} test images can be read")

    def _draw_subset(self) -> npt.NDArray[np.int64]:
        classes = len(self.dataset.class_names)
        if not 0 < self.max_images < len(self._all):
            return self._all
        share = -(-self.max_images // classes)
        shuffled = _shuffled(self.dataset.test.labels, self.seed, "evaluation")
        drawn = [self._first(places, share) for places in shuffled]
        return np.sort(np.concatenate(drawn))

    def _first(
        self, places: npt.NDArray[np.int64], number: int
    ) -> npt.NDArray[np.int64]:
        """Return the first images of a class, with both parts in their proportion.

        Two images or more have both parts: otherwise accuracy on a part would leave
        out other classes for each seed.
        """
        tuning = places[self._tuning[places]]
        if not len(tuning):
            return places[:number]
        held_out = places[~self._tuning[places]]
        wanted = round(number * len(tuning) / len(places))
        wanted = min(max(wanted, 1), number - 1) if len(held_out) else number
        return np.concatenate([tuning[:wanted], held_out[: number - wanted]])
