"""Accuracy, compared with hand-computed values and with slow loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_common.metrics import (
    ShotGroups,
    accuracy_report,
    confusion_matrix,
    listed_groups,
    median_site_reports,
    recall_report,
    shot_groups,
)


@given(
    pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=40),
    extra=st.integers(0, 3),
)
def test_confusion_matrix_equals_a_slow_loop(
    pairs: list[tuple[int, int]], extra: int
) -> None:
    """Rows are true classes; classes that never occur have empty rows and columns."""
    size = 5 + extra
    expected = [[0] * size for _ in range(size)]
    for label, prediction in pairs:
        expected[label][prediction] += 1
    labels = np.array([label for label, _ in pairs], dtype=np.int64)
    predictions = np.array([prediction for _, prediction in pairs], dtype=np.int64)
    confusion = confusion_matrix(labels, predictions, size)
    assert confusion.dtype == np.int64
    assert confusion.tolist() == expected


def test_borders_of_the_groups() -> None:
    """More than 100 is many, 20 to 100 medium, fewer than 20 few."""
    groups = shot_groups([101, 100, 20, 19, 5000, 0])
    assert groups == ShotGroups("count", many=(0, 4), medium=(1, 2), few=(3, 5))


def test_groups_do_not_need_sorted_counts() -> None:
    """With own images, the classes may have any order."""
    groups = shot_groups([3, 500, 50, 200])
    assert groups == ShotGroups("count", many=(1, 3), medium=(2,), few=(0,))


@pytest.mark.parametrize(
    ("counts", "many", "medium", "few"),
    [
        # No class below 20: CIFAR-10-LT at IF = 100 has 50 to 5000.
        (
            [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
            (0, 1, 2),
            (3, 4, 5, 6),
            (7, 8, 9),
        ),
        # No class above 100, and the frequent ones come last.
        (list(range(1, 11)), (7, 8, 9), (3, 4, 5, 6), (0, 1, 2)),
        # No class in between.
        ([500, 5, 400], (0,), (2,), (1,)),
        ([10, 5], (0,), (1,), ()),
    ],
)
def test_rank_where_counts_leave_a_group_empty(
    counts: list[int],
    many: tuple[int, ...],
    medium: tuple[int, ...],
    few: tuple[int, ...],
) -> None:
    """Then 30 % of the classes are many, 40 % medium and 30 % few."""
    assert shot_groups(counts) == ShotGroups("rank", many, medium, few)


@given(counts=st.lists(st.integers(0, 300), min_size=2, max_size=60))
def test_groups_divide_the_classes(counts: list[int]) -> None:
    """Every class is in one group; no group holds a rarer class than the next."""
    groups = shot_groups(counts)
    parts = (groups.many, groups.medium, groups.few)
    assert sorted(c for part in parts for c in part) == list(range(len(counts)))
    assert all(list(part) == sorted(part) for part in parts)
    if len(counts) >= 3:
        assert all(parts)
    filled = [[counts[c] for c in part] for part in parts if part]
    for upper, lower in zip(filled, filled[1:], strict=False):
        assert min(upper) >= max(lower)
    if groups.rule == "rank" and len(counts) >= 10:
        for part, share in zip(parts, (0.3, 0.4, 0.3), strict=True):
            assert abs(len(part) - share * len(counts)) <= 1


def test_report_by_hand() -> None:
    """Class accuracies 75, 50 and 0 %; class 3 has no test image and counts nowhere."""
    confusion = np.array(
        [[6, 2, 0, 0], [1, 2, 1, 0], [0, 3, 0, 1], [0, 0, 0, 0]], dtype=np.int64
    )
    report = accuracy_report(confusion, ShotGroups("count", (0,), (1, 2), (3,)))
    assert report.top1 == pytest.approx(100 * 8 / 16)
    assert report.balanced == pytest.approx((75 + 50 + 0) / 3)
    assert report.many == pytest.approx(75)
    assert report.medium == pytest.approx(25)
    assert report.few is None
    assert report.per_class == (75.0, 50.0, 0.0, None)


@given(
    pairs=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60
    )
)
def test_report_equals_slow_loops(pairs: list[tuple[int, int]]) -> None:
    """Accuracies are percentages; no figure is NaN, whichever classes are absent."""
    groups = ShotGroups("rank", (0,), (1, 2), (3, 4))
    labels = np.array([label for label, _ in pairs], dtype=np.int64)
    predictions = np.array([prediction for _, prediction in pairs], dtype=np.int64)
    report = accuracy_report(confusion_matrix(labels, predictions, 5), groups)

    accuracy: dict[int, float] = {}
    for c in range(5):
        hits = [label == prediction for label, prediction in pairs if label == c]
        if hits:
            accuracy[c] = 100 * sum(hits) / len(hits)

    def mean(classes: tuple[int, ...]) -> object:
        values = [accuracy[c] for c in classes if c in accuracy]
        return pytest.approx(sum(values) / len(values)) if values else None

    assert report.top1 == pytest.approx(
        100 * sum(a == b for a, b in pairs) / len(pairs)
    )
    assert report.balanced == mean((0, 1, 2, 3, 4))
    assert report.many == mean(groups.many)
    assert report.medium == mean(groups.medium)
    assert report.few == mean(groups.few)
    assert report.per_class == tuple(accuracy.get(c) for c in range(5))


def test_listed_groups_are_those_of_equal_counts() -> None:
    """Equal counts are ranked in the order of the list."""
    for classes in (3, 10, 101):
        ranked = shot_groups([1] * classes)
        listed = listed_groups(classes)
        assert listed.rule == "listed"
        assert (listed.many, listed.medium, listed.few) == (
            ranked.many,
            ranked.medium,
            ranked.few,
        )
    assert listed_groups(10).many == (0, 1, 2)
    assert listed_groups(10).few == (7, 8, 9)


def test_report_from_accuracies_alone_has_no_top1() -> None:
    report = recall_report([50.0, None, 100.0, 0.0], listed_groups(4))
    assert report.top1 is None
    assert report.balanced == pytest.approx(50.0)
    assert report.per_class == (50.0, None, 100.0, 0.0)
    assert (report.many, report.medium, report.few) == (50.0, 100.0, 0.0)


@pytest.mark.parametrize(
    ("sites", "balanced", "few", "per_class"),
    [
        # One site of three claims 100 % in all.
        (
            [{0: 40, 2: 20}, {0: 60, 1: 30}, {0: 100, 1: 100, 2: 100}],
            *(45, 20),
            (60, 30, 20),
        ),
        # Of two and of four sites the lower one in the middle.
        ([{0: 40}, {0: 60}], 40, None, (40, None, None)),
        ([{0: 90}, {0: 10}, {0: 50}, {0: 70, 2: 0}], 35, 0, (50, None, 0)),
    ],
)
def test_median_site_is_the_one_in_the_middle(
    sites: list[dict[int, float]],
    balanced: float,
    few: float | None,
    per_class: tuple[float | None, ...],
) -> None:
    groups = ShotGroups("count", (0,), (1,), (2,))
    found = median_site_reports([{"fedavg": site} for site in sites], groups)
    report = found["fedavg"]
    assert (report.balanced, report.few, report.per_class) == (balanced, few, per_class)
    # A site without the head has no say.
    more = [{"fedavg": site} for site in sites] + [{"retrained": {0: 1.0}}]
    assert median_site_reports(more, groups)["fedavg"] == report
