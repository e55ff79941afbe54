"""CCVR's mathematics: merge clients' class statistics and draw virtual features.

Luo et al., NeurIPS 2021, Section 4.2.
"""

from collections.abc import Sequence

import torch

from clip2fl_common.messages import ClassStatistics, symmetric, upper_triangle


def merged_statistics(statistics: Sequence[ClassStatistics]) -> ClassStatistics:
    """Return the statistics of all clients' features together.

    With N_k, mu_k and S_k client k's count, mean and covariance of a class, and
    N = sum_k N_k, the class has over all clients (Eq. 4 and 5)::

        mu = sum_k N_k / N mu_k
        S = sum_k (N_k - 1) / (N - 1) S_k
            + sum_k N_k / (N - 1) (mu_k - mu) (mu_k - mu)^T

    The second sum is the paper's ``sum_k N_k / (N - 1) mu_k mu_k^T - N / (N - 1) mu
    mu^T`` without the difference of two large numbers.

    Parameters
    ----------
    statistics : sequence of ClassStatistics
        At least one; the same width D.

    Returns
    -------
    ClassStatistics
        One row for each class that any client has, in ascending order, in float64.
    """
    classes, counts, means, covariances = (
        torch.cat([getattr(of_client, name) for of_client in statistics])
        for name in ("classes", "counts", "means", "covariances")
    )
    held = classes.unique()
    merged_counts = counts.new_empty(len(held))
    merged_means = means.new_empty(len(held), means.shape[1], dtype=torch.float64)
    merged = covariances.new_empty(len(held), covariances.shape[1], dtype=torch.float64)
    for row, c in enumerate(held):
        chosen = classes == c
        count, mean = counts[chosen].double(), means[chosen].double()
        total = count.sum()
        merged_counts[row] = counts[chosen].sum()
        merged_means[row] = count @ mean / total
        shift = mean - merged_means[row]
        between = upper_triangle(shift.T @ (count[:, None] * shift))
        within = (count - 1) @ covariances[chosen].double()
        merged[row] = (within + between) / max(1.0, float(total) - 1)
    return ClassStatistics(held, merged_counts, merged_means, merged)


def draw_features(
    statistics: ClassStatistics,
    num_classes: int,
    per_class: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return virtual features from each class's normal distribution.

    Rounding, or a client, may make a covariance indefinite. Its negative eigenvalues
    are replaced by zero. A feature is ``mu + S^(1/2) z`` with standard normal z. The
    symmetric root is unique, so it does not depend on the signs and the order of
    computed eigenvectors.

    Parameters
    ----------
    statistics : ClassStatistics
        Statistics of K classes, of width D.
    num_classes : int
        Number of classes C. A class's z do not depend on which other classes there are.
    per_class : int
        Features of each class, m.
    generator : torch.Generator
        CPU generator of z.

    Returns
    -------
    Tensor, shape [K, m, D]
        In float32.
    """
    width = statistics.means.shape[1]
    normal = torch.randn(num_classes, per_class, width, generator=generator)
    drawn = []
    for c, mean, triangle in zip(
        statistics.classes.tolist(),
        statistics.means.double(),
        statistics.covariances.double(),
        strict=True,
    ):
        values, vectors = torch.linalg.eigh(symmetric(triangle, width))
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        drawn.append((mean + normal[c].double() @ root).float())
    return torch.stack(drawn)
