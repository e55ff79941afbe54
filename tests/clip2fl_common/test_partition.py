"""Partition, compared with the released code and a slow version; and its errors."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_common.partition import (
    PartitionError,
    long_tail_counts,
    long_tail_partition,
)
from tests.reference import PartitionCase, partition_cases

Labels = npt.NDArray[np.int64]

CASES = pytest.mark.parametrize(
    "case",
    partition_cases(),
    ids=lambda case: f"C{case['num_classes']}-IF{1 / case['imbalance']:.0f}",
)


def labels_of(num_classes: int, per_class: int, seed: int = 0) -> Labels:
    """Return shuffled labels with equally many samples of each class."""
    ordered = np.repeat(np.arange(num_classes), per_class)
    return np.random.RandomState(seed).permutation(ordered).astype(np.int64)


def slow_partition(
    labels: Labels,
    counts: Sequence[int],
    num_clients: int,
    alpha: float,
    seed: int,
) -> list[list[int]]:
    """Partition as the released code does, with plain lists (see data/README.md)."""
    rng = np.random.RandomState(seed)
    pairs: list[tuple[int, int]] = []
    for c, count in enumerate(counts):
        members = [i for i, label in enumerate(labels) if label == c]
        rng.shuffle(members)
        pairs += [(i, c) for i in members[:count]]
    order = list(range(len(pairs)))
    rng = np.random.RandomState(seed)
    rng.shuffle(order)
    pairs = [pairs[i] for i in order]

    slice_length = int(10 / num_clients * len(pairs))
    clients: list[list[int]] = []
    while len(clients) < num_clients:
        begin = len(clients) // 10 * slice_length
        size = min(10, num_clients - len(clients))
        last = len(clients) + size == num_clients
        group = pairs[begin:] if last else pairs[begin : begin + slice_length]
        while True:
            held: list[list[int]] = [[] for _ in range(size)]
            for c in range(len(counts)):
                share = rng.dirichlet([alpha] * size)
                for k in range(size):
                    if len(held[k]) >= len(group) / size:
                        share[k] = 0.0
                members = [i for i, label in group if label == c]
                if not members:
                    continue
                cuts = np.cumsum(share / share.sum()) * len(members)
                edges = [0, *(int(cut) for cut in cuts[:-1]), len(members)]
                for k in range(size):
                    held[k] += members[edges[k] : edges[k + 1]]
            if min(len(part) for part in held) >= int(0.5 * len(group) / size):
                break
        clients += held
    flat = [i for part in clients for i in part]
    small, larger = divmod(len(flat), num_clients)
    result = []
    for k in range(num_clients):
        size = small + (k < larger)
        result.append(flat[:size])
        flat = flat[size:]
    return result


@CASES
def test_counts_equal_the_reference(case: PartitionCase) -> None:
    """The long tail keeps exactly as many samples as the released code."""
    counts = long_tail_counts(
        case["samples_per_class"], case["num_classes"], 1 / case["imbalance"]
    )
    assert counts == case["class_counts"]


@CASES
def test_index_lists_equal_the_reference(case: PartitionCase) -> None:
    """Every client gets the same samples in the same order."""
    labels = labels_of(
        case["num_classes"], case["samples_per_class"], case["label_order_seed"]
    )
    parts = long_tail_partition(
        labels,
        case["num_classes"],
        1 / case["imbalance"],
        case["num_clients"],
        case["dirichlet_alpha"],
        case["seed"],
    )
    assert [part.tolist() for part in parts] == case["client_indices"]
    assert all(part.dtype == np.int64 for part in parts)


@given(
    num_classes=st.integers(2, 6),
    per_class=st.integers(20, 60),
    imbalance_factor=st.sampled_from([1.0, 2.0, 7.5, 20.0]),
    num_clients=st.integers(1, 25),
    alpha=st.floats(2.0, 20.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_slow_version(
    num_classes: int,
    per_class: int,
    imbalance_factor: float,
    num_clients: int,
    alpha: float,
    seed: int,
) -> None:
    """It agrees with the slow version and divides exactly the long tail."""
    labels = labels_of(num_classes, per_class, seed % 1000)
    settings = (num_classes, imbalance_factor, num_clients, alpha, seed)
    parts = long_tail_partition(labels, *settings)
    counts = long_tail_counts(per_class, num_classes, imbalance_factor)

    expected = slow_partition(labels, counts, num_clients, alpha, seed)
    assert [part.tolist() for part in parts] == expected
    again = long_tail_partition(labels, *settings)
    assert [part.tolist() for part in again] == expected

    everything = np.concatenate(parts)
    assert len(np.unique(everything)) == len(everything)
    assert np.bincount(labels[everything]).tolist() == counts
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_another_seed_gives_another_partition() -> None:
    """Another seed gives another partition."""
    labels = labels_of(4, 50)
    first, second = (long_tail_partition(labels, 4, 10, 4, 1.0, s) for s in (1, 2))
    assert [p.tolist() for p in first] != [p.tolist() for p in second]


def test_global_random_state_is_left_alone() -> None:
    """The global generator of numpy is neither read nor changed."""
    labels = labels_of(4, 50)
    np.random.seed(1)
    first = long_tail_partition(labels, 4, 10, 4, 1.0, 3)
    drawn = np.random.random(5)
    np.random.seed(1)
    np.testing.assert_array_equal(drawn, np.random.random(5))
    second = long_tail_partition(labels, 4, 10, 4, 1.0, 3)
    assert [p.tolist() for p in first] == [p.tolist() for p in second]


def test_balanced_keeps_everything() -> None:
    """With IF = 1 every sample belongs to one client."""
    assert long_tail_counts(7, 3, 1.0) == [7, 7, 7]
    parts = long_tail_partition(labels_of(3, 20), 3, 1.0, 4, 5.0, 0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(60))


def test_counts_by_hand() -> None:
    """100 * 0.01^(k/2) is 100, 10, 1; the ratio of the ends is IF."""
    assert long_tail_counts(1000, 3, 100.0) == [1000, 100, 10]
    assert long_tail_counts(5000, 10, 100.0)[0] == 5000
    assert long_tail_counts(5000, 10, 50.0)[-1] == 100


@pytest.mark.parametrize("value", [0.99, 0.0, -3.0, float("nan")])
def test_imbalance_factor_below_one_is_refused(value: float) -> None:
    """A likely mistake is 1/IF (0.01 for 100), which the released code expects."""
    with pytest.raises(PartitionError, match="imbalance-factor"):
        long_tail_counts(10, 3, value)
    with pytest.raises(PartitionError, match="imbalance-factor"):
        long_tail_partition(labels_of(3, 10), 3, value, 2, 1.0, 0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_alpha_must_be_positive(value: float) -> None:
    """A Dirichlet distribution needs a positive concentration."""
    with pytest.raises(PartitionError, match="alpha"):
        long_tail_partition(labels_of(3, 10), 3, 1.0, 2, value, 0)


@pytest.mark.parametrize("num_classes", [0, 1])
def test_one_class_is_refused(num_classes: int) -> None:
    """A long tail needs at least two classes."""
    with pytest.raises(PartitionError, match="two classes"):
        long_tail_counts(10, num_classes, 10.0)


def test_more_clients_than_samples_is_refused() -> None:
    """The message names both numbers."""
    with pytest.raises(PartitionError, match=r"7.*\b6\b"):
        long_tail_partition(labels_of(2, 3), 2, 1.0, 7, 1.0, 0)


@pytest.mark.parametrize("num_clients", [0, -1])
def test_no_client_is_refused(num_clients: int) -> None:
    """At least one client must hold the data."""
    with pytest.raises(PartitionError, match="clients"):
        long_tail_partition(labels_of(2, 3), 2, 1.0, num_clients, 1.0, 0)


def test_class_that_would_vanish_is_named() -> None:
    """Class 2 of 100 * 0.001^(k/2) keeps int(0.1) = 0 samples."""
    with pytest.raises(PartitionError, match=r"class 2\b"):
        long_tail_partition(labels_of(3, 100), 3, 1000.0, 2, 1.0, 0)


def test_class_without_samples_is_named() -> None:
    """Class 1 has no sample at all."""
    labels = np.array([0, 2] * 20, dtype=np.int64)
    with pytest.raises(PartitionError, match=r"class 1\b"):
        long_tail_partition(labels, 3, 1.0, 2, 1.0, 0)


def test_impossible_partition_stops_with_the_reason() -> None:
    """Two classes, each nearly whole at one client, cannot serve ten clients."""
    with pytest.raises(PartitionError, match="alpha") as caught:
        long_tail_partition(labels_of(2, 50), 2, 1.0, 10, 0.01, 0)
    assert "clients" in str(caught.value)
