"""The weighted mean of the re-trained classifier and the model's own."""

import copy
from collections.abc import Mapping

import torch
from torch import nn


def mean_head(
    retrained: nn.Linear, model: Mapping[str, torch.Tensor], own_share: float
) -> nn.Linear:
    """Return ``(1 - s) (W', b') + s (W, b)``.

    The re-trained classifier (W', b') comes from balanced federated features, the
    model's own (W, b) from real images with a long tail, so they err on different
    images. The classifiers are linear functions of the same features: the mean of their
    weights gives the mean of their logits, so it is an ensemble at the cost of one
    (Wortsman et al., CVPR 2022, average a zero-shot and a fine-tuned model alike).

    Parameters
    ----------
    retrained : nn.Linear
        The re-trained classifier, with d inputs and C outputs; not changed.
    model : mapping of str to Tensor
        State of an `ImageClassifier` with the model's own classifier.
    own_share : float
        s in [0, 1).

    Returns
    -------
    nn.Linear
        On the re-trained classifier's device.
    """
    mean = copy.deepcopy(retrained)
    with torch.no_grad():
        for name, value in mean.named_parameters():
            value.lerp_(model[f"classifier.{name}"].to(value), own_share)
    return mean
