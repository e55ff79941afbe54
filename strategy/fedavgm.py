"""FedAvgM (Hsu et al. 2019): Flower's own, on seeded partitions."""

from collections.abc import Iterable, Mapping
from logging import WARNING
from typing import Any, Self

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp.strategy import FedAvgM as FlowerFedAvgM

from clip2fl_common.config import ConfigError
from strategy.base import ClientPlan, PartitionedTraining, Setting
from strategy.clients import SitePlan

# Names in a strategy's state begin so.
MOMENTUM = "momentum."
BUFFERS = (".running_mean", ".running_var")


class FedAvgM(PartitionedTraining, FlowerFedAvgM):
    """FedAvg whose server goes on in the direction of earlier rounds.

    BatchNorm's running statistics take no momentum, since a step beyond the clients'
    average could make a variance negative: they move straight towards it.

    Parameters
    ----------
    plan : ClientPlan or SitePlan
        Who trains when and where.
    momentum : float
        In [0, 1).
    learning_rate : float
        Of the server, in (0, 1].
    **common_settings : Any
        Settings of `PartitionedTraining`.

    Raises
    ------
    ConfigError
        If ``aggregation.rule`` is not the mean.
    """

    def __init__(
        self,
        plan: ClientPlan | SitePlan,
        *,
        momentum: float,
        learning_rate: float,
        **common_settings: Any,
    ) -> None:
        super().__init__(
            plan,
            server_momentum=momentum,
            server_learning_rate=learning_rate,
            **common_settings,
        )
        if self.aggregation.rule != "mean":
            raise ConfigError(
                f"aggregation.rule = {self.aggregation.rule!r}, but the server's "
                "momentum steps from the clients' mean; set aggregation.rule = 'mean' "
                "or choose another method"
            )
        if momentum == 0 and learning_rate == 1:
            log(
                WARNING,
                "fedavgm.momentum = 0 and fedavgm.learning-rate = 1: this makes the "
                "strategy equivalent to one without server momentum",
            )

    @classmethod
    def build(cls, setting: Setting) -> Self:
        """Return the method as a run's configuration wants it."""
        return cls(setting.plan, **cls.settings(setting))

    @staticmethod
    def settings(setting: Setting) -> dict[str, Any]:
        """Return the keyword arguments that a run's configuration decides."""
        fedavgm = setting.config.fedavgm
        return {
            "momentum": fedavgm.momentum,
            "learning_rate": fedavgm.learning_rate,
            **setting.safeguards,
        }

    def state(self) -> dict[str, torch.Tensor]:
        """Return the server's momentum, array by array, once there is one."""
        return {
            **super().state(),
            **self._momentum(),
        }

    def _momentum(self) -> dict[str, torch.Tensor]:
        return {
            f"{MOMENTUM}{n:05}": torch.from_numpy(step)
            for n, step in enumerate(self.momentum_vector or [])
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back the server's momentum."""
        super().load_state(state)
        steps = sorted(name for name in state if name.startswith(MOMENTUM))
        self.momentum_vector = [state[name].numpy() for name in steps] or None

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take the server's step, then forget the momentum of running statistics."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None and self.momentum_vector is not None:
            self.momentum_vector = [
                np.zeros_like(step) if name.endswith(BUFFERS) else step
                for name, step in zip(arrays, self.momentum_vector, strict=True)
            ]
        return arrays, metrics
