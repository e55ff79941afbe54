"""FedProx (Li et al. 2020): Flower's own, on seeded partitions."""

from flwr.serverapp.strategy import FedProx as FlowerFedProx

from strategy.partitioned import PartitionedTraining


class FedProx(PartitionedTraining, FlowerFedProx):
    """FedAvg with a proximal term at the clients (Eq. 2), weight ``proximal_mu``."""
