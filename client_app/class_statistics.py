"""The client's part of CCVR: count, mean and covariance of each class's features."""

from typing import ClassVar

import torch
from flwr.app import ArrayRecord

from client_app.narrow_features import narrow_features
from client_app.part import ClientPart, ClientRound
from clip2fl_common.messages import (
    CLASS_STATISTICS,
    ClassStatistics,
    StatisticsFormat,
    triangle_size,
    upper_triangle,
)


class ClassStatisticsPart(ClientPart):
    """Statistics of the global model's features, of images without augmentation."""

    field: ClassVar[str] = CLASS_STATISTICS

    def before_training(self, client: ClientRound) -> ArrayRecord:
        """Return the statistics of every class with enough images."""
        statistics = class_statistics(*narrow_features(client))
        return StatisticsFormat.of(client.config, client.num_classes).encode(statistics)


@torch.no_grad()
def class_statistics(features: torch.Tensor, labels: torch.Tensor) -> ClassStatistics:
    """Return count, mean and unbiased covariance of each class among the labels.

    Parameters
    ----------
    features : Tensor, shape [N, D]
        Features of a client's images.
    labels : Tensor of int64, shape [N]
        Their classes.

    Returns
    -------
    ClassStatistics
        In ascending order of class, computed in float64.
    """
    held, counts = labels.unique(return_counts=True)
    moments = [_moments(features[labels == c].double()) for c in held]
    nothing = features.new_empty(0, dtype=torch.float64)
    width = features.shape[1]
    return ClassStatistics(
        held,
        counts,
        torch.cat([nothing, *(mean for mean, _ in moments)]).view(len(held), width),
        torch.cat([nothing, *(covariance for _, covariance in moments)]).view(
            len(held), triangle_size(width)
        ),
    )


def _moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean [D] and the upper triangle of the covariance of features [n, D]."""
    mean = features.mean(0)
    centred = features - mean
    return mean, upper_triangle(centred.T @ centred) / max(1, len(features) - 1)
