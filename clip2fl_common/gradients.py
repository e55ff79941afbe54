"""The class gradient: what a client says about one class it holds."""

from typing import NamedTuple

import torch


class ClassGradient(NamedTuple):
    """Gradient of a linear classifier's mean cross-entropy over one class.

    Attributes
    ----------
    weight : Tensor, shape [C, d]
        Gradient with respect to the classifier's weight.
    bias : Tensor, shape [C]
        Gradient with respect to the classifier's bias.
    """

    weight: torch.Tensor
    bias: torch.Tensor
