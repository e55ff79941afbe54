"""FedProx (Li et al. 2020): Flower's own, on seeded partitions."""

from typing import Self

from flwr.serverapp.strategy import FedProx as FlowerFedProx

from strategy.base import PartitionedTraining, Setting


class FedProx(PartitionedTraining, FlowerFedProx):
    """FedAvg with a proximal term at the clients (Eq. 2), weight ``proximal_mu``."""

    @classmethod
    def build(cls, setting: Setting) -> Self:
        """Return the method as a run's configuration wants it."""
        return cls(
            setting.plan,
            proximal_mu=setting.config.fedprox.mu,
            **setting.safeguards,
        )
