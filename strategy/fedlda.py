"""FedLDA: FedAvg with a balanced linear discriminant in place of its classifier."""

from strategy.fedavg import FedAvg


class FedLDA(FedAvg):
    """FedAvg that delivers the closed-form discriminant of the clients' features.

    Training is FedAvg's. Clients also send class moments, and the server solves the
    discriminant (`strategy.discriminant`): neither a teacher nor synthetic features nor
    gradient descent at the server is needed. ``head.delivered = "discriminant"`` does
    the same with the other methods.
    """
