"""Accuracy of long-tailed classification: per class, balanced, many/medium/few-shot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Literal

import numpy as np
import numpy.typing as npt

MANY_SHOT_ABOVE = 100
FEW_SHOT_BELOW = 20
# How classifiers are called: the averaged model's own, the re-trained one, and the
# teacher's zero-shot classification.
FEDAVG_HEAD = "fedavg"
RETRAINED_HEAD = "retrained"
TEACHER_HEAD = "teacher"
HEADS = (RETRAINED_HEAD, FEDAVG_HEAD, TEACHER_HEAD)

# Shares of the classes, by frequency rank, where the counts leave a group empty.
MANY_SHARE, MEDIUM_SHARE = 0.3, 0.4


@dataclass(frozen=True)
class ShotGroups:
    """Classes grouped by how many training images there are of them.

    Attributes
    ----------
    rule : {"count", "rank", "listed"}
        "count": more than 100 / 20 to 100 / fewer than 20 training images (Liu et
        al. 2019). "rank": that would leave a group empty, so the classes are split
        30/40/30 % by frequency. "listed": the same shares of the classes in the
        order in which they are listed, since nobody knows their counts.
    many, medium, few : tuple of int
        Class indices, ascending. Never empty with three classes or more.
    """

    rule: Literal["count", "rank", "listed"]
    many: tuple[int, ...]
    medium: tuple[int, ...]
    few: tuple[int, ...]


@dataclass(frozen=True)
class AccuracyReport:
    """Accuracy in percent, from 0 to 100; None where no test image decides it.

    Attributes
    ----------
    top1 : float or None
        Share of test images classified correctly; None where class counts, which it
        depends on, are unknown.
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
    """Group the classes by their number of training images.

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
    """Group classes by their place in the list, from frequent to rare.

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
    """Count test images by true and predicted class.

    Parameters
    ----------
    labels, predictions : ndarray of int64, shape [N]
        True and predicted classes in [0, C).
    num_classes : int
        Number of classes C.

    Returns
    -------
    ndarray of int64, shape [C, C]
        Rows are true classes, columns predictions.
    """
    pairs = labels * num_classes + predictions
    counted = np.bincount(pairs, minlength=num_classes**2)
    return counted.reshape(num_classes, num_classes).astype(np.int64)


def accuracy_report(
    confusion: npt.NDArray[np.int64], groups: ShotGroups
) -> AccuracyReport:
    """Summarise a confusion matrix.

    Parameters
    ----------
    confusion : ndarray of int64, shape [C, C]
        As `confusion_matrix` returns it, with at least one test image.
    groups : ShotGroups
        Shot groups of the training data.

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
    return recall_report(recall, groups, top1)


def recall_report(
    recall: Sequence[float | None], groups: ShotGroups, top1: float | None = None
) -> AccuracyReport:
    """Summarise the accuracy of each class.

    Parameters
    ----------
    recall : sequence of float or None, length C
        Accuracy of each class in percent; None: no image of it. Not None throughout.
    groups : ShotGroups
        Shot groups of the training data.
    top1 : float or None
        Share of all images classified correctly in percent, where it is known.

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
    sites: Sequence[Mapping[str, Mapping[int, int]]], groups: ShotGroups
) -> dict[str, AccuracyReport]:
    """Return what the median site says of each head.

    A site's accuracy is what it claims, and in a mean one site that claims 100 % lifts
    all rounds alike or the round that it likes. The median over sites (of two, the
    lower) stays among what honest sites say as long as most are honest.

    Parameters
    ----------
    sites : sequence of mapping
        For each site, head to class to accuracy in percent.
    groups : ShotGroups
        Shot groups of the classes.

    Returns
    -------
    dict of str to AccuracyReport
        By head: the median over sites of each site's mean over the classes that it
        holds, of all classes, of each group's and of each class.
    """
    found = {}
    classes = sorted({*groups.many, *groups.medium, *groups.few})
    for head in dict.fromkeys(head for site in sites for head in site):
        recalls = [site[head] for site in sites if site.get(head)]

        def median_of(
            wanted: Sequence[int], of: Sequence[Mapping[int, int]]
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
