"""FedAvgM (Hsu et al. 2019): federated averaging with server momentum."""

from collections.abc import Mapping
from logging import INFO, WARNING

import torch

from clip2fl_common.messages import RUNNING_STATISTICS
from strategy.base import Method
from strategy.log import log
from strategy.model_mean import Model
from strategy.robust import Arrays
from strategy.setting import Setting

# Names in a strategy's state begin so.
MOMENTUM = "momentum."


class FedAvgM(Method):
    """FedAvg whose server goes on in the direction of earlier rounds.

    With w the model that was sent and m the clients' mean, the pseudo-gradient is
    ``g = w - m``, the momentum ``v = beta * v + g`` and the new model ``w - eta * v``
    (Hsu et al. 2019, Section 4). BatchNorm's running statistics take no momentum: a
    step beyond the clients' mean could make a variance negative.

    Attributes
    ----------
    momentum : float
        beta in [0, 1).
    learning_rate : float
        eta in (0, 1].
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.momentum = setting.config.fedavgm.momentum
        self.learning_rate = setting.config.fedavgm.learning_rate
        self._velocity: Model = {}
        if not self._moves:
            log(
                WARNING,
                "fedavgm.momentum = 0 and fedavgm.learning-rate = 1: this makes the "
                "strategy equivalent to one without server momentum",
            )

    @property
    def _moves(self) -> bool:
        return self.momentum != 0 or self.learning_rate != 1

    def summary(self) -> None:
        """Log momentum and step size, then the other settings."""
        log(INFO, "\t├──> Server momentum:")
        log(
            INFO,
            "\t│\t└── Momentum %g, learning rate %g",
            self.momentum,
            self.learning_rate,
        )
        super().summary()

    def state(self) -> dict[str, torch.Tensor]:
        """Return the momentum, array by array, once there is one."""
        momentum = {
            f"{MOMENTUM}{name}": torch.from_numpy(step)
            for name, step in self._velocity.items()
        }
        return {**super().state(), **momentum}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back the momentum."""
        super().load_state(state)
        self._velocity = {
            name.removeprefix(MOMENTUM): step.numpy()
            for name, step in state.items()
            if name.startswith(MOMENTUM)
        }

    def step(self, sent: Arrays, mean: Model) -> Model:
        """Take the server's step from the model that was sent."""
        if not self._moves:
            return mean
        model = {}
        for name, old in sent.items():
            move = old - mean[name]
            if self.momentum > 0 and not name.endswith(RUNNING_STATISTICS):
                if name in self._velocity:
                    move = self.momentum * self._velocity[name] + move
                self._velocity[name] = move
            model[name] = old - self.learning_rate * move
        return model
