"""Optimizers of local training: plain SGD, momentum, Adam and Muon.

Creating one of torch's optimizers imports torch's compiler, which takes more than a
second, and a ClientApp starts a new process for every message. So the formulas are
here; the tests compare each of them with torch's.
"""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, assert_never

import torch
from torch import nn

from clip2fl_common.choices import OptimizerName
from clip2fl_common.models import ImageClassifier

# Adam (Kingma and Ba 2015): decay of the squared gradients, and what is added to the
# denominator.
SQUARES_DECAY = 0.999
EPSILON = 1e-8
# Muon (Jordan et al. 2024): a, b and c of a Newton-Schulz iteration, their number, and
# the least norm by which a matrix is divided.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
LEAST_NORM = 1e-7


Rate = float | torch.Tensor
"""A step size: a number, or a tensor without axes, which may change between steps."""


class Optimizer(Protocol):
    """An optimizer of one client's training in one round."""

    def step(self) -> None:
        """Move the parameters by their gradients; those without one stay."""

    def state(self) -> list[torch.Tensor]:
        """Return the tensors that steps change besides parameters; all start at 0."""


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer of local training and its numbers besides the step size.

    Attributes
    ----------
    name : str
        sgd, momentum, adam or muon.
    momentum : float
        Share of the earlier direction in the next one, from 0 to below 1: of momentum
        and muon, and beta_1 of adam. Plain SGD has none.
    weight_decay : float
        Each step first multiplies every parameter by 1 - weight_decay * step size
        (Loshchilov and Hutter 2019).
    other_learning_rate : float
        muon: step size of the parameters that are not orthogonalised.
    """

    name: OptimizerName = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    other_learning_rate: float = 0.1


PLAIN_SGD = OptimizerSettings()


def make_optimizer(
    settings: OptimizerSettings,
    model: ImageClassifier,
    learning_rate: Rate,
    other_learning_rate: torch.Tensor | None = None,
) -> Optimizer:
    """Return a new optimizer of a model, with its state at zero.

    Parameters
    ----------
    settings : OptimizerSettings
        Which one, and its numbers.
    model : ImageClassifier
        Its parameters are moved in place.
    learning_rate : float or Tensor
        Step size. With a tensor on the model's device, steps use no number of the
        host that changes from step to step, so that they can be recorded
        (`clip2fl_common.graphs`).
    other_learning_rate : Tensor or None
        Takes the place of the settings' ``other_learning_rate``.
    """
    momentum, decay = settings.momentum, settings.weight_decay
    other: Rate = settings.other_learning_rate
    if other_learning_rate is not None:
        other = other_learning_rate
    parameters = list(model.parameters())
    match settings.name:
        case "sgd":
            return SGD(parameters, learning_rate, decay)
        case "momentum":
            return Momentum(parameters, learning_rate, decay, momentum)
        case "adam":
            return Adam(parameters, learning_rate, decay, momentum)
        case "muon":
            hidden = [
                parameter
                for parameter in parameters
                if parameter.ndim >= 2 and parameter is not model.classifier.weight
            ]
            kept = set(hidden)
            others = [parameter for parameter in parameters if parameter not in kept]
            return Both(
                Muon(hidden, learning_rate, decay, momentum),
                NesterovMean(others, other, decay, momentum),
            )
        case _:
            assert_never(settings.name)


class Descent(ABC):
    """Steps along directions that subclasses make of the gradients.

    Parameters
    ----------
    parameters : iterable of Parameter
        Moved in place.
    learning_rate : float
        Step size.
    weight_decay : float
        See `OptimizerSettings`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: Rate,
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters = list(parameters)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay

    @torch.no_grad()
    def step(self) -> None:
        """Move each parameter that has a gradient."""
        moving, gradients = [], []
        for parameter in self.parameters:
            if parameter.grad is not None:
                moving.append(parameter)
                gradients.append(parameter.grad)
        directions = self.directions(moving, gradients)
        rate = self.learning_rate
        for parameter, direction in zip(moving, directions, strict=True):
            if self.weight_decay:
                parameter.mul_(1 - self.weight_decay * rate)
            if isinstance(rate, torch.Tensor):
                parameter.addcmul_(direction, rate, value=-1)
            else:
                parameter.add_(direction, alpha=-rate)

    def state(self) -> list[torch.Tensor]:
        """Return the tensors that `directions` changes; all start at zero."""
        return []

    @abstractmethod
    def directions(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Return the vectors that times the step size are subtracted.

        Parameters
        ----------
        parameters : sequence of Parameter
            The parameters that have a gradient.
        gradients : sequence of Tensor
            Their gradients; stay as they are.

        Returns
        -------
        sequence of Tensor
            One of each parameter's shape.
        """

    def _zeros(self) -> dict[nn.Parameter, torch.Tensor]:
        return {parameter: torch.zeros_like(parameter) for parameter in self.parameters}


class SGD(Descent):
    """Plain stochastic gradient descent, as published for CLIP2FL and its baselines."""

    def directions(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Return the gradients."""
        return gradients


class Momentum(Descent):
    """SGD along the decaying sum ``b <- momentum * b + g`` of the gradients.

    Polyak (1964), in the form of `torch.optim.SGD`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: Rate,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
    ) -> None:
        super().__init__(parameters, learning_rate, weight_decay)
        self.momentum = momentum
        self._kept = self._zeros()

    def state(self) -> list[torch.Tensor]:
        """Return the sums."""
        return list(self._kept.values())

    def directions(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Return the sums."""
        return [
            self._kept[parameter].mul_(self.momentum).add_(gradient)
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]


class Adam(Descent):
    """Adam (Kingma and Ba 2015, Algorithm 1), with decoupled weight decay (AdamW)."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: Rate,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
    ) -> None:
        super().__init__(parameters, learning_rate, weight_decay)
        self.momentum = momentum
        # With a tensor as the step size, steps are counted on its device, too,
        # and in double precision: the shares are differences from 1.
        self._steps: int | torch.Tensor = 0
        if isinstance(learning_rate, torch.Tensor):
            self._steps = learning_rate.new_zeros((), dtype=torch.float64)
        self._means = self._zeros()
        self._squares = self._zeros()

    def state(self) -> list[torch.Tensor]:
        """Return means, mean squares and, where it is a tensor, the number of steps."""
        kept = [*self._means.values(), *self._squares.values()]
        return [*kept, self._steps] if isinstance(self._steps, torch.Tensor) else kept

    def directions(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Return the mean gradients over the roots of the mean squared gradients."""
        self._steps += 1
        mean_share = 1 - self.momentum**self._steps
        square_share = 1 - SQUARES_DECAY**self._steps
        root_share = (
            square_share.sqrt()
            if isinstance(square_share, torch.Tensor)
            else math.sqrt(square_share)
        )
        found = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            mean = self._means[parameter].lerp_(gradient, 1 - self.momentum)
            square = self._squares[parameter].mul_(SQUARES_DECAY)
            square.addcmul_(gradient, gradient, value=1 - SQUARES_DECAY)
            root = square.sqrt().div_(root_share).add_(EPSILON)
            found.append((mean / mean_share).div_(root))
        return found


class NesterovMean(Momentum):
    """SGD along a running mean of the gradients, looked ahead (Nesterov 1983).

    The mean is ``m <- momentum * m + (1 - momentum) * g``, and the direction
    ``momentum * m + (1 - momentum) * g`` again. It starts at zero and has no
    correction, so the first steps are short.
    """

    def directions(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Return the means, looked ahead."""
        found = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            mean = self._kept[parameter].lerp_(gradient, 1 - self.momentum)
            found.append(gradient.lerp(mean, self.momentum))
        return found


class Muon(NesterovMean):
    """Muon (Jordan et al. 2024): steps along orthogonalised means of the gradients.

    The mean of a weight of shape [out, ...] becomes a matrix [out, rest]: a convolution
    has in * k * k columns. All singular values of the matrix are brought near 1, so
    that a step moves rare directions as far as frequent ones. A matrix with more rows
    than columns is multiplied by sqrt(rows / columns).
    """

    def directions(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Return the orthogonalised means; matrices of one shape are one product."""
        means = [mean.flatten(1) for mean in super().directions(parameters, gradients)]
        alike = defaultdict(list)
        for place, mean in enumerate(means):
            alike[mean.shape].append(place)
        found = list(means)
        for (rows, columns), places in alike.items():
            stacked = torch.stack([means[place] for place in places])
            scaled = orthogonalised(stacked) * math.sqrt(max(1, rows / columns))
            for place, direction in zip(places, scaled, strict=True):
                found[place] = direction.view_as(parameters[place])
        return found


class Both:
    """Two optimizers, each with parameters of its own."""

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        self.first, self.second = first, second

    def step(self) -> None:
        """Take a step of each."""
        self.first.step()
        self.second.step()

    def state(self) -> list[torch.Tensor]:
        """Return the state of both."""
        return [*self.first.state(), *self.second.state()]


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices with the same singular vectors and singular values near 1.

    Newton-Schulz iterations ``X <- a X + (b A + c A^2) X`` with ``A = X X^T`` start at
    X over its Frobenius norm. The coefficients are steep at zero: five iterations bring
    singular values from 0.002 on to between 0.68 and 1.21, but no number of them ends
    at 1.

    Parameters
    ----------
    matrices : Tensor, shape [n, rows, columns]
        Any matrices.

    Returns
    -------
    Tensor, shape [n, rows, columns]
    """
    if matrices.shape[-2] > matrices.shape[-1]:  # the smaller product X X^T
        return orthogonalised(matrices.mT).mT
    a, b, c = NEWTON_SCHULZ
    norms = torch.linalg.matrix_norm(matrices, keepdim=True)
    x: torch.Tensor = matrices / norms.clamp(min=LEAST_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        change = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, change, x, beta=a)
    return x
