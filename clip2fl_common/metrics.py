"""Accuracy of long-tailed classification: per class, balanced, many/medium/few-shot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Literal

import numpy as np
import numpy.typing as npt

MANY_SHOT_ABOVE = 100
FEW_SHOT_BELOW = 20
# Names of the heads (classifiers): the averaged model's own, the re-trained classifier,
# the closed-form discriminant, and the teacher's zero-shot classification.
FEDAVG_HEAD = "fedavg"
RETRAINED_HEAD = "retrained"
DISCRIMINANT_HEAD = "discriminant"
TEACHER_HEAD = "teacher"
# Parts of the test images: those on which settings are chosen, and all others.
TUNING = "tuning"
HELD_OUT = "held_out"

# Shares of the classes by frequency rank, used if the counts leave a group empty.
MANY_SHARE, MEDIUM_SHARE = 0.3, 0.4


@dataclass(frozen=True)
class ShotGroups:
    """Classes grouped by their number of training images.

    Attributes
    ----------
    rule : {"count", "rank", "listed"}
        "count": more than 100 / 20 to 100 / fewer than 20 training images (Liu et al.
        2019). "rank": split 30/40/30 % by frequency, since "count" would leave a group
        empty. "listed": split 30/40/30 % in the order in which the classes are listed,
        since their counts are unknown.
    many, medium, few : tuple of int
        Class indices, ascending. Never empty with three classes or more.
    """

    rule: Literal["count", "rank", "listed"]
    many: tuple[int, ...]
    medium: tuple[int, ...]
    few: tuple[int, ...]


@dataclass(frozen=True)
class AccuracyReport:
    """Accuracy in percent, from 0 to 100; None without test images for it.

    Attributes
    ----------
    top1 : float or None
        Share of test images classified correctly; None if class counts, on which it
        depends, are unknown.
    balanced : float
        Mean of the per-class accuracies.
    many, medium, few : float or None
        Mean per-class accuracy in each shot group.
    per_class : tuple of (float or None)
        Accuracy of each class.
    """

    top1: float | None
    balanced: float
    many: float | None
    medium: float | None
    few: float | None
    per_class: tuple[float | None, ...]


def shot_groups(train_counts: Sequence[int]) -> ShotGroups:
    """Return the classes grouped by their number of training images.

    Parameters
    ----------
    train_counts : sequence of int, length C
        Training images of each class over all clients.

    Returns
    -------
    ShotGroups
    """
    counts = np.asarray(train_counts)
    groups = (
        np.flatnonzero(counts > MANY_SHOT_ABOVE),
        np.flatnonzero((counts >= FEW_SHOT_BELOW) & (counts <= MANY_SHOT_ABOVE)),
        np.flatnonzero(counts < FEW_SHOT_BELOW),
    )
    if any(len(group) == 0 for group in groups):
        return _grouped("rank", *_split(np.argsort(-counts, kind="stable")))
    return _grouped("count", *groups)


def listed_groups(num_classes: int) -> ShotGroups:
    """Return the classes grouped by their place in the list, from frequent to rare.

    Parameters
    ----------
    num_classes : int
        Number of classes C.

    Returns
    -------
    ShotGroups
    """
    return _grouped("listed", *_split(np.arange(num_classes)))


def _split(order: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
    """Split classes in order of their frequency into 30/40/30 %."""
    first = max(1, round(MANY_SHARE * len(order)))
    second = max(first + 1, round((MANY_SHARE + MEDIUM_SHARE) * len(order)))
    return order[:first], order[first:second], order[second:]


def _grouped(
    rule: Literal["count", "rank", "listed"], *groups: npt.NDArray[np.int64]
) -> ShotGroups:
    many, medium, few = (tuple(sorted(int(c) for c in group)) for group in groups)
    return ShotGroups(rule, many, medium, few)


def confusion_matrix(
    labels: npt.NDArray[np.int64], predictions: npt.NDArray[np.int64], num_classes: int
) -> npt.NDArray[np.int64]:
    """Return the number of test images by true and predicted class.

    Parameters
    ----------
    labels, predictions : ndarray of int64, shape [N]
        True and predicted classes in [0, C).
    num_classes : int
        Number of classes C.

    Returns
    -------
    ndarray of int64, shape [C, C]
        Rows are true classes, columns are predicted classes.
    """
    pairs = labels * num_classes + predictions
    counted = np.bincount(pairs, minlength=num_classes**2)
    return counted.reshape(num_classes, num_classes).astype(np.int64)


def accuracy_report(
    confusion: npt.NDArray[np.int64],
    groups: ShotGroups,
    class_counts: npt.NDArray[np.int64] | None = None,
) -> AccuracyReport:
    """Return the accuracies that a confusion matrix shows.

    Parameters
    ----------
    confusion : ndarray of int64, shape [C, C]
        As returned by `confusion_matrix`, with at least one test image.
    groups : ShotGroups
        Shot groups of the training data.
    class_counts : ndarray of int64, shape [C], or None
        Images of each class in the set from which the test images were drawn, maybe
        evenly over the classes: the top-1 accuracy is that of the set. None: of the
        test images themselves.

    Returns
    -------
    AccuracyReport
        A class without test images is left out of every mean.
    """
    correct = np.diag(confusion)
    per_true_class = confusion.sum(axis=1)
    recall = [
        100.0 * float(hit) / float(total) if total else None
        for hit, total in zip(correct, per_true_class, strict=True)
    ]
    top1 = 100.0 * float(correct.sum()) / float(per_true_class.sum())
    if class_counts is not None and not _proportional(class_counts, per_true_class):
        found = [
            (count, part)
            for count, part in zip(class_counts.tolist(), recall, strict=True)
            if part is not None
        ]
        top1 = sum(c * part for c, part in found) / sum(c for c, _ in found)
    return recall_report(recall, groups, top1)


def _proportional(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> bool:
    return bool((one * other.sum() == other * one.sum()).all())


def recall_report(
    recall: Sequence[float | None], groups: ShotGroups, top1: float | None = None
) -> AccuracyReport:
    """Return the accuracies that the accuracy of each class determines.

    Parameters
    ----------
    recall : sequence of float or None, length C
        Accuracy of each class in percent; None for a class without images. At least
        one is not None.
    groups : ShotGroups
        Shot groups of the training data.
    top1 : float or None
        Share of all images classified correctly in percent, if known.

    Returns
    -------
    AccuracyReport
        A class without test images is left out of every mean.
    """

    def mean_of(classes: Sequence[int]) -> float | None:
        values = [value for c in classes if (value := recall[c]) is not None]
        return sum(values) / len(values) if values else None

    balanced = mean_of(range(len(recall)))
    assert balanced is not None, "an empty test set has no accuracy"
    return AccuracyReport(
        top1=top1,
        balanced=balanced,
        many=mean_of(groups.many),
        medium=mean_of(groups.medium),
        few=mean_of(groups.few),
        per_class=tuple(recall),
    )


def median_site_reports(
    sites: Sequence[Mapping[str, Mapping[int, float]]], groups: ShotGroups
) -> dict[str, AccuracyReport]:
    """Return for each head the median of the sites' reports.

    A site may claim any accuracy. In a mean, one site that claims 100 % raises all
    rounds alike, or one round of its choice. The median over sites (the lower one of
    two) stays within the honest sites' values as long as most sites are honest.

    Parameters
    ----------
    sites : sequence of mapping
        For each site the accuracy in percent, by head and class.
    groups : ShotGroups
        Shot groups of the classes.

    Returns
    -------
    dict of str to AccuracyReport
        By head. Each site gives a mean over the classes that it holds: of all classes,
        of each group and of each class. The report has the medians over sites.
    """
    found = {}
    classes = sorted({*groups.many, *groups.medium, *groups.few})
    for head in dict.fromkeys(head for site in sites for head in site):
        recalls = [site[head] for site in sites if site.get(head)]

        def median_of(
            wanted: Sequence[int], of: Sequence[Mapping[int, float]]
        ) -> float | None:
            means = [
                sum(values) / len(values)
                for recall in of
                if (values := [recall[c] for c in wanted if c in recall])
            ]
            return median_low(means) if means else None

        balanced = median_of(classes, recalls)
        if balanced is None:
            continue
        found[head] = AccuracyReport(
            top1=None,
            balanced=balanced,
            many=median_of(groups.many, recalls),
            medium=median_of(groups.medium, recalls),
            few=median_of(groups.few, recalls),
            per_class=tuple(median_of([c], recalls) for c in classes),
        )
    return found
