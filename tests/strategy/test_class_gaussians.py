"""Test CCVR's merging and sampling against numpy on the pooled features."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client_app.class_statistics import class_statistics
from clip2fl_common.messages import ClassStatistics, symmetric, upper_triangle
from strategy.class_gaussians import draw_features, merged_statistics

WIDTH = 3


def statistics_of(
    mean: list[float], covariance: npt.NDArray[np.float64], c: int = 0, count: int = 9
) -> ClassStatistics:
    """Return the statistics of one class."""
    return ClassStatistics(
        torch.tensor([c]),
        torch.tensor([count]),
        torch.tensor([mean]),
        upper_triangle(torch.from_numpy(covariance))[None],
    )


@given(data=st.data())
def test_merged_statistics_are_those_of_the_pooled_features(
    data: st.DataObject,
) -> None:
    """However the images are divided among clients, far from the origin or not."""
    images = data.draw(st.integers(1, 40), label="images")
    clients = data.draw(st.integers(1, 5), label="clients")
    seed = data.draw(st.integers(0, 2**32 - 1), label="seed")
    offset = data.draw(st.sampled_from([0.0, 1.0, 1000.0]), label="offset")
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, images)
    features = rng.normal(size=(images, WIDTH)) * rng.uniform(0.1, 3) + labels[:, None]
    features += offset
    owner = rng.integers(0, clients, images)
    merged = merged_statistics(
        [
            class_statistics(
                torch.from_numpy(features[owner == client]),
                torch.from_numpy(labels[owner == client]),
            )
            for client in range(clients)
        ]
    )
    assert merged.classes.tolist() == np.unique(labels).tolist()
    for c, count, mean, triangle in zip(
        merged.classes.tolist(),
        merged.counts.tolist(),
        merged.means.numpy(),
        merged.covariances,
        strict=True,
    ):
        pooled = features[labels == c]
        assert count == len(pooled)
        np.testing.assert_allclose(mean, pooled.mean(0), rtol=1e-10, atol=1e-10)
        expected = np.zeros((WIDTH, WIDTH))
        if count > 1:
            expected = np.cov(pooled, rowvar=False, ddof=1)
        found = symmetric(triangle, WIDTH).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)


def test_merging_equals_the_formula_of_the_paper() -> None:
    """Eq. 5 as it is printed, with its difference of squares."""
    rng = np.random.default_rng(3)
    counts, means = [4, 9, 1], rng.normal(size=(3, WIDTH))
    covariances = [np.cov(rng.normal(size=(WIDTH, 8))) for _ in range(3)]
    total = sum(counts)
    mean = sum(n / total * m for n, m in zip(counts, means, strict=True))
    expected = sum(
        (n - 1) / (total - 1) * s + n / (total - 1) * np.outer(m, m)
        for n, m, s in zip(counts, means, covariances, strict=True)
    ) - total / (total - 1) * np.outer(mean, mean)
    merged = merged_statistics(
        [
            statistics_of(m.tolist(), s, count=n)
            for n, m, s in zip(counts, means, covariances, strict=True)
        ]
    )
    found = symmetric(merged.covariances[0], WIDTH).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_virtual_features_have_the_moments_of_their_class() -> None:
    covariance = np.array([[2.0, 0.6, 0.0], [0.6, 0.5, -0.2], [0.0, -0.2, 1.0]])
    (drawn,) = draw_features(
        statistics_of([5.0, -1.0, 0.0], covariance),
        1,
        40_000,
        torch.Generator().manual_seed(1),
    ).numpy()
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(drawn.mean(0), [5.0, -1.0, 0.0], atol=0.03)
    np.testing.assert_allclose(np.cov(drawn, rowvar=False), covariance, atol=0.04)


def test_negative_eigenvalues_count_as_zero() -> None:
    """The eigenvectors (1, 1) and (1, -1) have the eigenvalues 3 and -1."""
    indefinite = np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    (drawn,) = draw_features(
        statistics_of([0.0, 0.0, 7.0], indefinite),
        1,
        20_000,
        torch.Generator().manual_seed(1),
    )
    torch.testing.assert_close(drawn[:, 0], drawn[:, 1], atol=1e-5, rtol=0)
    assert (drawn[:, 2] == 7).all()
    assert float(drawn[:, 0].var()) == pytest.approx(1.5, rel=0.03)


def test_features_of_a_class_do_not_depend_on_other_classes() -> None:
    """A class's features change only with its own statistics and the generator."""
    first, second = (
        statistics_of([float(c)] * WIDTH, np.eye(WIDTH) * (1 + c), c) for c in (0, 2)
    )
    both = merged_statistics([second, first])
    of_both = draw_features(both, 3, 5, torch.Generator().manual_seed(4))
    alone = draw_features(second, 3, 5, torch.Generator().manual_seed(4))
    other = draw_features(second, 3, 5, torch.Generator().manual_seed(5))
    torch.testing.assert_close(of_both[1], alone[0])
    assert not torch.equal(alone, other)
