"""FedAvg (McMahan et al. 2017): Flower's own, on seeded partitions."""

from strategy.base import PartitionedTraining


class FedAvg(PartitionedTraining):
    """Federated averaging weighted by number of images; no teacher, one classifier."""
