"""FedAvg (McMahan et al. 2017)."""

from strategy.base import Method


class FedAvg(Method):
    """Federated averaging weighted by number of images; no teacher, one classifier."""
