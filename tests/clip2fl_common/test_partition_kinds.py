"""Shards, quantity skew and natural clients divide the long tail as documented."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_common.partition import (
    IndexArray,
    PartitionError,
    long_tail,
    long_tail_partition,
    natural_partition,
    quantity_partition,
    shard_partition,
)

SEEDS = st.integers(0, 2**32 - 1)


def tail(classes: int, per_class: int, factor: float, seed: int) -> list[IndexArray]:
    labels = np.random.RandomState(seed % 1000).permutation(
        np.repeat(np.arange(classes), per_class)
    )
    return long_tail(labels, classes, factor, seed)


def flat(parts: Sequence[IndexArray]) -> list[int]:
    return sorted(np.concatenate(parts).tolist())


@given(
    classes=st.integers(2, 5),
    factor=st.sampled_from([1.0, 4.0, 20.0]),
    clients=st.integers(1, 12),
    shards=st.integers(1, 3),
    alpha=st.sampled_from([1e-3, 0.1, 1.0, 1e6]),
    seed=SEEDS,
)
def test_every_sample_of_the_tail_has_one_client(
    classes: int, factor: float, clients: int, shards: int, alpha: float, seed: int
) -> None:
    kept = tail(classes, 40, factor, seed)
    divide: list[Callable[[], list[IndexArray]]] = [
        lambda: shard_partition(kept, clients, shards, seed),
        lambda: quantity_partition(kept, clients, alpha, seed),
    ]
    for parts in divide:
        found = parts()
        assert len(found) == clients
        assert flat(found) == flat(kept)
        assert all(len(part) > 0 and part.dtype == np.int64 for part in found)
        assert [p.tolist() for p in parts()] == [p.tolist() for p in found]


def test_all_kinds_divide_the_same_samples() -> None:
    labels = np.repeat(np.arange(3), 60)
    kept = long_tail(labels, 3, 10.0, 5)
    published = long_tail_partition(labels, 3, 10.0, 4, 1.0, 5)
    assert flat(published) == flat(kept) != list(range(180))


@given(clients=st.integers(1, 8), shards=st.integers(1, 3), seed=SEEDS)
def test_shards_are_runs_of_the_samples_sorted_by_class(
    clients: int, shards: int, seed: int
) -> None:
    """A slow deal: every client has whole shards, each of them dealt once."""
    kept = tail(4, 30, 1.0, seed)
    place = {index: n for n, index in enumerate(np.concatenate(kept).tolist())}
    total, number = len(place), clients * shards
    bounds, start = [], 0
    for n in range(number):
        start_of_next = start + total // number + (n < total % number)
        bounds.append(range(start, start_of_next))
        start = start_of_next
    dealt = []
    for part in shard_partition(kept, clients, shards, seed):
        places = [place[index] for index in part.tolist()]
        hand = []
        while places:
            (shard,) = (s for s in bounds if places[0] in s)
            assert places[: len(shard)] == list(shard)
            places = places[len(shard) :]
            hand.append(shard)
        assert len(hand) == shards
        dealt += hand
    assert sorted(s.start for s in dealt) == [s.start for s in bounds]


def test_two_shards_are_two_classes_for_most() -> None:
    """In the paper's setting: 10 classes of 60, 100 clients with 2 shards of 3."""
    labels = np.repeat(np.arange(10), 60)
    parts = shard_partition(long_tail(labels, 10, 1.0, 1), 100, 2, 1)
    held = [len(set(labels[part].tolist())) for part in parts]
    assert max(held) == 2 and np.mean(held) > 1.7
    another = shard_partition(long_tail(labels, 10, 1.0, 1), 100, 2, 2)
    assert [p.tolist() for p in another] != [p.tolist() for p in parts]


def test_sizes_follow_the_dirichlet_distribution() -> None:
    """Shares have mean 1/K and variance (K-1)/(K^2 (K alpha + 1))."""
    labels = np.repeat(np.arange(2), 5000)
    kept = long_tail(labels, 2, 1.0, 0)
    for alpha in (0.5, 5.0):
        shares = np.array(
            [
                [len(part) / 10_000 for part in quantity_partition(kept, 4, alpha, s)]
                for s in range(400)
            ]
        )
        variance = 3 / (16 * (4 * alpha + 1))
        # The standard error of the variance is about its tenth.
        assert shares.var() == pytest.approx(variance, rel=0.2)
        assert shares.mean(axis=0) == pytest.approx(0.25, abs=0.05)


def test_clients_of_all_sizes_have_the_classes_of_the_whole() -> None:
    labels = np.repeat(np.arange(2), [9000, 1000])
    kept = long_tail(labels, 2, 1.0, 0)
    large = [p for p in quantity_partition(kept, 5, 1.0, 3) if len(p) > 500]
    assert len(large) >= 2
    for part in large:
        assert np.mean(labels[part]) == pytest.approx(0.1, abs=0.05)


@given(
    owners=st.lists(st.sampled_from(["10", "9", "2"]), min_size=12, max_size=40),
    seed=SEEDS,
)
def test_natural_clients_keep_their_own(owners: list[str], seed: int) -> None:
    """Clients with numbers as names are in the order of the numbers."""
    owners = ["2", "9", "10", *owners]
    labels = np.arange(len(owners)) % 2
    parts = natural_partition(long_tail(labels, 2, 1.0, seed), owners, 3)
    for name, part in zip(["2", "9", "10"], parts, strict=True):
        assert part.tolist() == [n for n, owner in enumerate(owners) if owner == name]


def test_natural_clients_lose_what_the_tail_leaves_out() -> None:
    labels = np.repeat(np.arange(2), 50)
    owners = ["b", "a"] * 50
    kept = long_tail(labels, 2, 10.0, 3)
    parts = natural_partition(kept, owners, 2)
    assert flat(parts) == flat(kept)
    assert all(
        owners[n] == name for name, p in zip("ab", parts, strict=True) for n in p
    )


def test_impossible_partitions_say_what_to_change() -> None:
    kept = long_tail(np.repeat(np.arange(2), 5), 2, 1.0, 0)
    with pytest.raises(PartitionError, match=r"shards = 3 need 12 samples.*only 10"):
        shard_partition(kept, 4, 3, 0)
    with pytest.raises(PartitionError, match=r"partition\.clients = 11.*only 10"):
        quantity_partition(kept, 11, 1.0, 0)
    owners = ["x"] * 5 + ["y"] * 5
    with pytest.raises(PartitionError, match=r"come from 2 .* partition\.clients=2"):
        natural_partition(kept, owners, 3)
    lost = long_tail(np.repeat(np.arange(2), 50), 2, 50.0, 0)
    rare = ["x"] * 99 + ["y"]
    with pytest.raises(PartitionError, match=r"1 clients .*\(y\).*imbalance-factor"):
        natural_partition(lost, rare, 2)
