"""FedLDA: FedAvg with a balanced linear discriminant in place of its classifier."""

from clip2fl_common.config import ConfigError
from strategy.fedavg import FedAvg
from strategy.setting import Setting


class FedLDA(FedAvg):
    """FedAvg that delivers the closed-form discriminant of the clients' features.

    Training is FedAvg's. Clients also send class moments, and the server solves the
    discriminant (`strategy.discriminant`): neither a teacher nor synthetic features nor
    gradient descent at the server is needed. ``head.delivered = "discriminant"`` does
    the same with the other methods.

    Raises
    ------
    ConfigError
        If the run computes no discriminant: a method of another name, built on this
        one, needs ``head.delivered = "discriminant"``.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if self.discriminant is None:
            raise ConfigError(
                f"method = {setting.config.method!r} is built on FedLDA, but the run "
                "computes no discriminant; set head.delivered = 'discriminant'"
            )
