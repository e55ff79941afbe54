"""The mean of the rounds' models, which may be delivered instead of the last one."""

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from strategy.robust import Arrays

# Names of weights in the average over rounds.
MODEL_WEIGHTS, CLASSIFIER_WEIGHTS = "model.", "classifier."

# Names in a strategy's state.
ROUNDS = "average-rounds"
MEAN = "average."

Module = TypeVar("Module", bound=nn.Module)


class ModelAverage:
    """Exponential moving average of some modules' weights over rounds.

    Every round trains other clients, each on classes of its own, so that the global
    model swings; in the middle of what it swings around it is more accurate
    (Izmailov et al., UAI 2018; in federations Caldarola et al., ECCV 2022). After
    round t

        mean_t = sum_i decay^(t - i) weights_i / sum_i decay^(t - i).

    The division leaves no trace of an initial value, so that early rounds are means of
    the models that there are. BatchNorm's running statistics are averaged as weights
    are, which is what FedAvg does with those of the clients.

    Parameters
    ----------
    decay : float
        Weight of a round in units of the next one's, in [0, 1); 0: no averaging.

    Attributes
    ----------
    rounds : int
        Rounds in the mean; modules stay as they are until there is one.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.rounds = 0
        self._mean: dict[str, torch.Tensor] = {}

    def add(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take a round's weights into the mean.

        Parameters
        ----------
        weights : mapping of str to Tensor
            The same names and shapes in each round.
        """
        self.rounds += 1
        share = (1 - self.decay) / (1 - self.decay**self.rounds)
        self._mean = {
            name: torch.lerp(self._mean.get(name, tensor), tensor, share)
            for name, tensor in weights.items()
        }

    def add_round(self, model: Arrays, classifier: nn.Linear | None) -> None:
        """Take a round's global model, and its re-trained classifier, into the mean.

        Parameters
        ----------
        model : mapping of str to ndarray
            Values of the global model.
        classifier : torch.nn.Linear or None
            In methods that have one.
        """
        named = {
            f"{MODEL_WEIGHTS}{name}": torch.from_numpy(values)
            for name, values in model.items()
        }
        retrained = classifier.state_dict() if classifier else {}
        self.add(
            named
            | {
                f"{CLASSIFIER_WEIGHTS}{name}": tensor.detach().cpu()
                for name, tensor in retrained.items()
            }
        )

    def mean(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the mean of the weights whose names begin so, without the prefix."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self._mean.items()
            if name.startswith(prefix)
        }

    def applied_to(self, module: Module, prefix: str) -> Module:
        """Return a copy of a module with the mean as its weights.

        Parameters
        ----------
        module : nn.Module
            Stays as it is.
        prefix : str
            Of its weights' names in the mean; what is not there keeps its value.

        Returns
        -------
        nn.Module
            The given one where there is no mean.
        """
        if self.rounds == 0:
            return module
        averaged = copy.deepcopy(module)
        averaged.load_state_dict(module.state_dict() | self.mean(prefix))
        return averaged

    def state(self) -> dict[str, torch.Tensor]:
        """Return the mean, and of how many rounds it is, by name; nothing without."""
        if self.decay == 0:
            return {}
        return {
            ROUNDS: torch.tensor(self.rounds),
            **{f"{MEAN}{name}": tensor for name, tensor in self._mean.items()},
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` returned."""
        if self.decay == 0:
            return
        self.rounds = int(state[ROUNDS])
        self._mean = {
            name.removeprefix(MEAN): tensor
            for name, tensor in state.items()
            if name.startswith(MEAN)
        }
