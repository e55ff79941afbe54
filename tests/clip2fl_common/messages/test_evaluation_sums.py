"""Test what is summed of sites' evaluations."""

from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_common.messages import Evaluation, ReplyError
from clip2fl_common.messages.evaluation_sums import EvaluationSums
from clip2fl_common.secure.masks import Vector

HEADS = ("retrained", "fedavg")
CLASSES = 4

percents = st.dictionaries(
    st.integers(0, CLASSES - 1), st.tuples(*[st.floats(0, 100)] * len(HEADS))
)


def evaluation(
    by_class: dict[int, tuple[float, ...]], images: int = 9, matrix: bool = False
) -> Evaluation:
    """Return a site's evaluation."""
    confusion = np.eye(CLASSES, dtype=np.int64) if matrix else None
    recalls = {
        head: {c: values[i] for c, values in by_class.items()}
        for i, head in enumerate(HEADS)
    }
    return Evaluation(images, recalls, 2, confusion=confusion)


def names(number: int) -> list[str]:
    return [f"site-{n}" for n in range(number)]


def total(sums: EvaluationSums, sites: list[Evaluation], parties: int) -> Vector:
    """Return the sum of the sites' vectors."""
    added = sums.zeros()
    for site in sites:
        added.add(sums.encode(sums.values_of(site), parties))
    return added


@given(sites=st.lists(percents, min_size=1, max_size=20))
def test_sum_is_the_mean_over_the_sites_that_evaluate_a_class(
    sites: list[dict[int, tuple[float, ...]]],
) -> None:
    """In the steps in which sites tell their accuracies without secure sums."""
    sums = EvaluationSums(HEADS, CLASSES, confusion=False)
    # The client knows its heads in another order than the server.
    client = EvaluationSums(HEADS[::-1], CLASSES, confusion=False)
    evaluations = [evaluation(own, images=n) for n, own in enumerate(sites)]
    added = total(client, evaluations, 20)
    found = sums.evaluation_of(added, 20, names(len(sites)))
    for i, head in enumerate(HEADS):
        for c in range(CLASSES):
            told = [5 * round(own[c][i] / 5) for own in sites if c in own]
            expected = fmean(told) if told else None
            assert found.recalls[head][c] == (
                None if expected is None else pytest.approx(expected)
            )
    assert list(found.recalls) == list(HEADS)
    assert found.images == sum(range(len(sites))) and len(found.sites) == len(sites)
    assert found.unreadable == 2 * len(sites) and found.confusion is None


def test_matrices_of_the_sites_that_allow_it_are_summed() -> None:
    sums = EvaluationSums(HEADS, CLASSES, confusion=True)
    sites = [evaluation({}, matrix=matrix) for matrix in (True, False, True)]
    found = sums.evaluation_of(total(sums, sites, 3), 3, names(3))
    assert found.confusion is not None
    np.testing.assert_array_equal(found.confusion, 2 * np.eye(CLASSES))
    nobody = sums.evaluation_of(total(sums, [evaluation({})] * 3, 3), 3, names(3))
    assert nobody.confusion is None
    # A matrix goes only into a sum of matrices.
    others = EvaluationSums(HEADS, CLASSES, confusion=False)
    assert others.evaluation_of(total(others, sites, 3), 3, names(3)).confusion is None


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("held", [4, 0, 0, 0], "held are no counts of 3 sites"),
        ("held", [-1, 0, 0, 0], "held are no counts of 3 sites"),
        ("held", [0.5, 0, 0, 0], "held are no counts of 3 sites"),
        ("counts", [2.0**39 + 0.5, 0], "counts are no counts"),
        ("accuracy.fedavg", [301, 0, 0, 0], "above 100 %"),
        ("accuracy.fedavg", [0, 5, 0, 0], "above 100 %"),
        ("confusion", np.eye(CLASSES) * 10, "confusion matrices of over 27 images"),
    ],
)
def test_impossible_sum_is_refused(name: str, values: list[float], text: str) -> None:
    sums = EvaluationSums(HEADS, CLASSES, confusion=True)
    good = sums.values_of(evaluation({0: (100, 100)}))
    bad = {**good, name: np.asarray(values, np.float64) - 2 * good[name]}
    added = sums.zeros()
    for part in (good, good, bad):
        added.add(sums.encode(part, 3))
    with pytest.raises(ReplyError, match=text):
        sums.evaluation_of(added, 3, names(3))
