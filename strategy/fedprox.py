"""FedProx (Li et al. 2020)."""

from collections.abc import Iterable
from logging import INFO, WARNING

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from clip2fl_common import messages
from strategy.base import Method
from strategy.log import log
from strategy.setting import Setting


class FedProx(Method):
    """FedAvg with a proximal term at the clients (Eq. 2).

    Attributes
    ----------
    proximal_mu : float
        Weight of half the squared distance to the global model.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.proximal_mu = setting.config.fedprox.mu
        if self.proximal_mu == 0:
            log(
                WARNING,
                "fedprox.mu = 0: this makes the strategy equivalent to FedAvg",
            )

    def summary(self) -> None:
        """Log the weight of the proximal term, then the other settings."""
        log(INFO, "\t├──> FedProx:")
        log(INFO, "\t│\t└── Proximal mu: %g", self.proximal_mu)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Switch the proximal term on at the clients."""
        config[messages.PROXIMAL_MU] = self.proximal_mu
        return super().configure_train(server_round, arrays, config, grid)
