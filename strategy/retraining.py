"""Re-training of a balanced classifier on federated features (CReFF, Sec. 3.4)."""

import torch
from torch import nn
from torch.nn import functional


@torch.no_grad()
def retrain_classifier(
    features: torch.Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
) -> nn.Linear:
    """Train a new linear classifier on the federated features.

    Plain SGD on shuffled mini-batches of mean cross-entropy. As in the released code
    the classifier starts afresh each round (the paper's text continues the old one).
    The gradient of a linear classifier is written out: the features stay in memory
    and neither a data loader nor automatic differentiation is involved.

    Parameters
    ----------
    features : Tensor, shape [C, m, d]
        Federated features; row c is labelled c, so classes are balanced.
    epochs : int
        Passes over all C * m features.
    batch_size : int
        Mini-batch size; the last batch of an epoch may be smaller.
    learning_rate : float
        Step size.
    generator : torch.Generator
        CPU source of the initial weights and of the shuffling; torch's global
        generator is left alone.

    Returns
    -------
    torch.nn.Linear
        d inputs, C outputs, on the features' device.
    """
    num_classes, per_class, dim = features.shape
    device = features.device
    samples = features.reshape(-1, dim)
    labels = torch.arange(num_classes, device=device).repeat_interleave(per_class)
    targets = functional.one_hot(labels, num_classes).to(features.dtype)
    classifier = new_classifier(dim, num_classes, generator).to(device, features.dtype)
    weight, bias = classifier.weight, classifier.bias
    for _ in range(epochs):
        order = torch.randperm(len(samples), generator=generator).to(device)
        shuffled, shuffled_targets = samples[order], targets[order]
        for batch, target in zip(
            shuffled.split(batch_size), shuffled_targets.split(batch_size), strict=True
        ):
            residual = torch.softmax(torch.addmm(bias, batch, weight.T), dim=1)
            residual -= target
            step = -learning_rate / len(batch)
            weight.addmm_(residual.T, batch, alpha=step)
            bias.add_(residual.sum(0), alpha=step)
    return classifier


def new_classifier(
    feature_dim: int, num_classes: int, generator: torch.Generator
) -> nn.Linear:
    """Return a linear classifier with torch's default initialisation.

    ``nn.Linear`` draws both weight and bias from U(-1/sqrt(d), 1/sqrt(d)), but from
    the global generator only.

    Parameters
    ----------
    feature_dim : int
        Number of inputs d.
    num_classes : int
        Number of outputs C.
    generator : torch.Generator
        CPU source of the initial values.

    Returns
    -------
    torch.nn.Linear
    """
    # The meta device keeps nn.Linear's own initialisation from drawing numbers.
    classifier = nn.Linear(feature_dim, num_classes, device="meta").to_empty(
        device="cpu"
    )
    bound = feature_dim**-0.5
    with torch.no_grad():
        classifier.weight.uniform_(-bound, bound, generator=generator)
        classifier.bias.uniform_(-bound, bound, generator=generator)
    return classifier
