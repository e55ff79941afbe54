"""Average of the rounds' models, which may be delivered instead of the last one."""

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from strategy.robust import Arrays

# Prefixes of the weights' names in the average.
MODEL_WEIGHTS, CLASSIFIER_WEIGHTS = "model.", "classifier."

# Names of the entries in the strategy's state.
ROUNDS = "average-rounds"
MEAN = "average."

Module = TypeVar("Module", bound=nn.Module)


class ModelAverage:
    """Exponential moving average of some modules' weights over rounds.

    Every round trains other clients, each on other classes, so the global model
    oscillates. The average over rounds is more accurate (Izmailov et al., UAI 2018; in
    federated learning Caldarola et al., ECCV 2022). After round t

        mean_t = sum_i decay^(t - i) weights_i / sum_i decay^(t - i).

    The division removes the bias of an initial value, so early averages hold only the
    models seen so far. BatchNorm's running statistics are averaged like weights, as
    FedAvg averages the clients'.

    Parameters
    ----------
    decay : float
        Weight of a round relative to the next one, in [0, 1); 0 turns averaging off.

    Attributes
    ----------
    rounds : int
        Number of rounds in the average; with 0, modules are left as they are.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.rounds = 0
        self._mean: dict[str, torch.Tensor] = {}

    def add(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Add a round's weights to the average.

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
        """Add a round's global model, and its re-trained classifier, to the average.

        Parameters
        ----------
        model : mapping of str to ndarray
            Weights and buffers of the global model.
        classifier : torch.nn.Linear or None
            The re-trained classifier, in methods that have one.
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
        """Return the averages of weights with this prefix, by name without it."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self._mean.items()
            if name.startswith(prefix)
        }

    def applied_to(self, module: Module, prefix: str) -> Module:
        """Return a copy of a module with the average as its weights.

        Parameters
        ----------
        module : nn.Module
            Not changed.
        prefix : str
            Prefix of its weights' names in the average. Other weights keep their value.

        Returns
        -------
        nn.Module
            The given module itself if there is no average.
        """
        if self.rounds == 0:
            return module
        averaged = copy.deepcopy(module)
        averaged.load_state_dict(module.state_dict() | self.mean(prefix))
        return averaged

    def state(self) -> dict[str, torch.Tensor]:
        """Return the average and its number of rounds by name; empty without rounds."""
        if self.decay == 0:
            return {}
        return {
            ROUNDS: torch.tensor(self.rounds),
            **{f"{MEAN}{name}": tensor for name, tensor in self._mean.items()},
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore a state that `state` returned."""
        if self.decay == 0:
            return
        self.rounds = int(state[ROUNDS])
        self._mean = {
            name.removeprefix(MEAN): tensor
            for name, tensor in state.items()
            if name.startswith(MEAN)
        }
