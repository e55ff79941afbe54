"""The optimizers of local training, made of torch's own and of slow loops."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from client_app.optimizers import OptimizerSettings
from clip2fl_common.models import ImageClassifier

Steps = Callable[[], None]


def expected_steps(
    settings: OptimizerSettings, model: ImageClassifier, learning_rate: float
) -> Steps:
    """Return a function that moves a model by its parameters' gradients.

    torch's Muon computes in bfloat16: give `torch.bfloat16` another value before.
    """
    parameters = list(model.parameters())
    decay, momentum = settings.weight_decay, settings.momentum
    if settings.name == "sgd":
        return torch.optim.SGD(parameters, learning_rate, weight_decay=decay).step
    if settings.name == "momentum":
        optimizer = torch.optim.SGD(parameters, learning_rate, momentum=momentum)

        def decoupled() -> None:
            with torch.no_grad():
                for parameter in parameters:
                    parameter.sub_(learning_rate * decay * parameter)
            optimizer.step()

        return decoupled
    if settings.name == "adam":
        return torch.optim.AdamW(
            parameters, learning_rate, betas=(momentum, 0.999), weight_decay=decay
        ).step
    matrices = [
        parameter
        for name, parameter in model.named_parameters()
        if "conv" in name or "downsample.0" in name or name == "projection.weight"
    ]
    others = [p for p in parameters if all(p is not m for m in matrices)]
    first = _muon(matrices, settings, learning_rate)
    second = _mean_descent(others, settings)

    def both() -> None:
        first()
        second()

    return both


def _muon(
    weights: Iterable[nn.Parameter], settings: OptimizerSettings, learning_rate: float
) -> Steps:
    """Return steps of torch's Muon on weights of any shape, as [out, rest]."""
    pairs = [(w, nn.Parameter(w.detach().reshape(len(w), -1).clone())) for w in weights]
    optimizer = torch.optim.Muon(
        [matrix for _, matrix in pairs],
        learning_rate,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
    )

    def step() -> None:
        for weight, matrix in pairs:
            assert weight.grad is not None
            matrix.grad = weight.grad.reshape(matrix.shape)
        optimizer.step()
        with torch.no_grad():
            for weight, matrix in pairs:
                weight.copy_(matrix.view_as(weight))

    return step


def _mean_descent(
    parameters: Iterable[nn.Parameter], settings: OptimizerSettings
) -> Steps:
    """Return steps along the looked-ahead running mean of the gradients."""
    share, size = settings.momentum, settings.other_learning_rate
    means = [(parameter, torch.zeros_like(parameter)) for parameter in parameters]

    @torch.no_grad()
    def step() -> None:
        for parameter, mean in means:
            gradient = parameter.grad
            assert gradient is not None
            mean.copy_(share * mean + (1 - share) * gradient)
            ahead = share * mean + (1 - share) * gradient
            parameter.sub_(size * (settings.weight_decay * parameter + ahead))

    return step
