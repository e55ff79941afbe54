"""Long-tailed sampling of a labelled data set, and its partition among clients.

The index lists of the Dirichlet partition match the released CLIP2FL and CReFF code for
the same seed, order included, because published results depend on them. All kinds of
partition divide the same images of the long tail. They draw from numpy's RandomState,
whose numbers never change with numpy's version.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from clip2fl_common.shown import listed

IndexArray = npt.NDArray[np.int64]

# The released code splits the clients into groups of ten, each with a contiguous slice
# of the shuffled samples, and draws a Dirichlet partition within each group.
GROUP_SIZE = 10
# The released code repeats the draw without limit. The paper's settings need a few
# draws, alpha = 0.1 some hundreds. An impossible setting stops after half a minute.
MAX_ATTEMPTS = 20_000


class PartitionError(ValueError):
    """The data cannot be divided among the clients as requested."""


def long_tail_counts(
    max_per_class: int, num_classes: int, imbalance_factor: float
) -> list[int]:
    """Return the number of samples of each class in an exponential long tail.

    Class k keeps ``int(max_per_class * (1 / imbalance_factor) ** (k / (C - 1)))``
    samples (Cao et al. 2019, LDAM, as used by CReFF and CLIP2FL).

    Parameters
    ----------
    max_per_class : int
        Samples of the most frequent class (class 0).
    num_classes : int
        Number of classes C, at least 2.
    imbalance_factor : float
        Ratio IF >= 1 of the most to the least frequent class; 1 is balanced.

    Returns
    -------
    list of int
        C counts, not increasing.

    Raises
    ------
    PartitionError
        If ``num_classes`` < 2 or ``imbalance_factor`` < 1.
    """
    if num_classes < 2:
        raise PartitionError(
            f"a long tail needs at least two classes, found {num_classes}"
        )
    if not imbalance_factor >= 1:
        raise PartitionError(
            f"dataset.imbalance-factor = {imbalance_factor} must be at least 1 "
            "(1 keeps every sample, 100 keeps a hundredth of the rarest class)"
        )
    ratio = 1 / imbalance_factor
    return [
        int(max_per_class * ratio ** (k / (num_classes - 1)))
        for k in range(num_classes)
    ]


def long_tail(
    labels: npt.NDArray[np.integer],
    num_classes: int,
    imbalance_factor: float,
    seed: int,
) -> list[IndexArray]:
    """Return the samples of each class that a long tail keeps, drawn at random.

    Parameters
    ----------
    labels : ndarray of int, shape [N]
        Class of each sample.
    num_classes : int
        Number of classes C, at least 2.
    imbalance_factor : float
        As in `long_tail_partition`.
    seed : int
        Seed of the draw, in [0, 2**32).

    Returns
    -------
    list of ndarray of int64, length C
        For each class the indices into ``labels`` of its samples.

    Raises
    ------
    PartitionError
        If a parameter is out of range, or a class keeps no sample.
    """
    members = [np.flatnonzero(labels == c) for c in range(num_classes)]
    sizes = [len(m) for m in members]
    counts = long_tail_counts(max(sizes, default=0), num_classes, imbalance_factor)
    rng = np.random.RandomState(seed)
    kept = []
    for c, (indices, count) in enumerate(zip(members, counts, strict=True)):
        if min(count, len(indices)) == 0:
            raise PartitionError(
                f"no client would hold class {c}: it has {len(indices)} samples "
                f"and keeps {count} at dataset.imbalance-factor = {imbalance_factor}; "
                "use a smaller imbalance factor or add samples"
            )
        order = list(indices)
        rng.shuffle(order)
        kept.append(np.asarray(order[:count], dtype=np.int64))
    return kept


def long_tail_partition(
    labels: npt.NDArray[np.integer],
    num_classes: int,
    imbalance_factor: float,
    num_clients: int,
    alpha: float,
    seed: int,
) -> list[IndexArray]:
    """Return each client's samples of a long tail drawn from ``labels``.

    Reproduces the released code's index lists exactly. numpy's global random state is
    neither read nor changed.

    Parameters
    ----------
    labels : ndarray of int, shape [N]
        Class of each sample.
    num_classes : int
        Number of classes C, at least 2.
    imbalance_factor : float
        Ratio IF >= 1 of the most to the least frequent class. The tail starts at the
        size of the largest class. (The released code starts at the mean class size,
        which is the same for its balanced data sets.) A class with fewer samples than
        its place in the tail allows keeps all of them.
    num_clients : int
        Number of clients.
    alpha : float
        Concentration of the Dirichlet distribution, > 0; smaller is more non-IID.
    seed : int
        Seed of every random draw, in [0, 2**32).

    Returns
    -------
    list of ndarray of int64
        For each client the indices into ``labels`` of its samples. Sizes differ by at
        most one.

    Raises
    ------
    PartitionError
        If a parameter is out of range, a class keeps no sample, there are fewer
        samples than clients, or no draw gives every client half its fair share.
    """
    if not alpha > 0:
        raise PartitionError(f"partition.alpha = {alpha} must be greater than 0")
    if num_clients < 1:
        raise PartitionError(f"partition.clients = {num_clients} must be at least 1")
    kept = long_tail(labels, num_classes, imbalance_factor, seed)
    _check_enough(kept, num_clients)

    shuffled = list(np.concatenate(kept))
    rng = np.random.RandomState(seed)
    rng.shuffle(shuffled)
    total = len(shuffled)

    slice_length = int(GROUP_SIZE / num_clients * total)
    ordered: list[IndexArray] = []
    for start in range(0, num_clients, GROUP_SIZE):
        group = min(GROUP_SIZE, num_clients - start)
        begin = start // GROUP_SIZE * slice_length
        last = start + GROUP_SIZE >= num_clients
        end = total if last else begin + slice_length
        indices = np.asarray(shuffled[begin:end], dtype=np.int64)
        ordered += _dirichlet_group(
            indices, labels[indices], num_classes, group, alpha, rng
        )
    return np.array_split(np.concatenate(ordered), num_clients)


def shard_partition(
    kept: Sequence[IndexArray], num_clients: int, shards: int, seed: int
) -> list[IndexArray]:
    """Divide samples by class: each client gets a few shards of the sorted samples.

    The samples, sorted by class, are cut into ``num_clients * shards`` shards, which
    are dealt to the clients at random (McMahan et al. 2017, section 3). With two shards
    most clients have samples of two classes.

    Parameters
    ----------
    kept : sequence of ndarray of int64
        Indices of each class's samples: see `long_tail`.
    num_clients : int
        Number of clients.
    shards : int
        Number of shards of each client.
    seed : int
        Seed of the deal, in [0, 2**32).

    Returns
    -------
    list of ndarray of int64
        Each client's indices. The sizes of two shards differ by at most one.

    Raises
    ------
    PartitionError
        If there are fewer samples than shards.
    """
    total = sum(map(len, kept))
    if total < num_clients * shards:
        raise PartitionError(
            f"partition.clients = {num_clients} with partition.shards = {shards} need "
            f"{num_clients * shards} samples, but the long tail has only {total}: use "
            "fewer clients or shards, or a smaller dataset.imbalance-factor"
        )
    pieces = np.array_split(np.concatenate(kept), num_clients * shards)
    deal = _stream(seed).permutation(len(pieces)).reshape(num_clients, shards)
    return [np.concatenate([pieces[shard] for shard in hand]) for hand in deal]


def quantity_partition(
    kept: Sequence[IndexArray], num_clients: int, alpha: float, seed: int
) -> list[IndexArray]:
    """Divide samples by number: clients differ in size, and have the same classes.

    The clients' shares of the shuffled samples follow a symmetric Dirichlet
    distribution (Li et al. 2022, "Federated learning on non-IID data silos", quantity
    skew). Each client has at least one sample.

    Parameters
    ----------
    kept : sequence of ndarray of int64
        Indices of each class's samples: see `long_tail`.
    num_clients : int
        Number of clients.
    alpha : float
        Concentration of the Dirichlet distribution, > 0; smaller is more skewed.
    seed : int
        Seed of every random draw, in [0, 2**32).

    Returns
    -------
    list of ndarray of int64
        Each client's indices.

    Raises
    ------
    PartitionError
        If there are fewer samples than clients.
    """
    _check_enough(kept, num_clients)
    rng = _stream(seed)
    shuffled = rng.permutation(np.concatenate(kept))
    share = np.full(num_clients, np.nan)
    # With a tiny alpha all gamma variates of a draw can be zero.
    while not np.isfinite(share).all():
        share = rng.dirichlet(np.repeat(alpha, num_clients))
    spare = len(shuffled) - num_clients
    cuts = (np.cumsum(share)[:-1] * spare).astype(np.int64)
    return np.split(shuffled, cuts + np.arange(1, num_clients))


def natural_partition(
    kept: Sequence[IndexArray], owners: Sequence[str], num_clients: int
) -> list[IndexArray]:
    """Divide samples by the clients that they come from.

    Parameters
    ----------
    kept : sequence of ndarray of int64
        Indices of each class's samples: see `long_tail`.
    owners : sequence of str, length N
        Client of each sample of the whole data set.
    num_clients : int
        Number of clients, which must be the number of different owners.

    Returns
    -------
    list of ndarray of int64
        Each client's indices, ascending. The clients are ordered by their names, or by
        their numbers if all names are numbers.

    Raises
    ------
    PartitionError
        If the number of clients is another, or a client keeps no sample.
    """
    names = sorted(set(owners))
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    if len(names) != num_clients:
        raise PartitionError(
            f"partition.clients = {num_clients}, but the training images come from "
            f"{len(names)} clients: set partition.clients={len(names)}"
        )
    members: dict[str, list[int]] = {name: [] for name in names}
    for index in np.sort(np.concatenate(kept)).tolist():
        members[owners[index]].append(index)
    if empty := [name for name in names if not members[name]]:
        raise PartitionError(
            f"{len(empty)} clients have no sample in the long tail ({listed(empty)}): "
            "use a smaller dataset.imbalance-factor, or 1 to keep every sample"
        )
    return [np.asarray(members[name], dtype=np.int64) for name in names]


def _stream(seed: int) -> np.random.RandomState:
    """Return numbers for dividing that are independent of those for the long tail."""
    return np.random.RandomState([seed, 1])


def _check_enough(kept: Sequence[IndexArray], num_clients: int) -> None:
    total = sum(map(len, kept))
    if total < num_clients:
        raise PartitionError(
            f"partition.clients = {num_clients}, but the long tail has only {total} "
            "samples, so a client would have none: use fewer clients or a smaller "
            "dataset.imbalance-factor"
        )


def class_counts(
    parts: Sequence[npt.NDArray[np.integer]],
    labels: npt.NDArray[np.integer],
    num_classes: int,
) -> npt.NDArray[np.int64]:
    """Return the number of each client's samples of each class.

    Parameters
    ----------
    parts : sequence of ndarray of int, length K
        Each client's indices into ``labels``.
    labels : ndarray of int, shape [N]
        Class of each sample.
    num_classes : int
        Number of classes C.

    Returns
    -------
    ndarray of int64, shape [K, C]
    """
    return np.stack(
        [np.bincount(labels[part], minlength=num_classes) for part in parts]
    ).astype(np.int64)


def _dirichlet_group(
    indices: IndexArray,
    classes: npt.NDArray[np.integer],
    num_classes: int,
    num_clients: int,
    alpha: float,
    rng: np.random.RandomState,
) -> list[IndexArray]:
    """Divide one group's slice; every client gets at least half its fair share."""
    fair_share = len(indices) / num_clients
    smallest_allowed = int(0.5 * fair_share)
    smallest = 0
    for _ in range(MAX_ATTEMPTS):
        parts: list[list[IndexArray]] = [[] for _ in range(num_clients)]
        sizes = np.zeros(num_clients, dtype=np.int64)
        for c in range(num_classes):
            share = rng.dirichlet(np.repeat(alpha, num_clients))
            of_class = indices[classes == c]
            share = share * (sizes < fair_share)
            if len(of_class) == 0 or not share.sum() > 0:
                continue
            share = share / share.sum()
            cuts = (np.cumsum(share) * len(of_class)).astype(int)[:-1]
            for client, piece in enumerate(np.split(of_class, cuts)):
                parts[client].append(piece)
                sizes[client] += len(piece)
        smallest = max(smallest, int(sizes.min()))
        if sizes.min() >= smallest_allowed and sizes.sum() == len(indices):
            return [np.concatenate(p) if p else indices[:0] for p in parts]
    raise PartitionError(
        f"no Dirichlet partition found in {MAX_ATTEMPTS} draws at partition.alpha = "
        f"{alpha}: every client should hold at least {smallest_allowed} of "
        f"{len(indices)} samples, the best draw left one with {smallest}; use a larger "
        "partition.alpha or fewer partition.clients"
    )
