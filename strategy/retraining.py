"""Re-training of a balanced classifier on federated features (CReFF, Sec. 3.4)."""

from contextlib import nullcontext

import torch
from torch import nn

from clip2fl_common.parallel import single_threaded_kernels

# Below this many multiply-adds in one product a second thread does not pay off. A batch
# of 32 reaches it at C = 250 and d = 512.
THREADING_THRESHOLD = 4_000_000


@torch.no_grad()
def retrain_classifier(
    features: torch.Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    initial: nn.Linear | None = None,
    classes: torch.Tensor | None = None,
    num_classes: int | None = None,
) -> nn.Linear:
    """Train a linear classifier on the federated features.

    Plain SGD on shuffled mini-batches of mean cross-entropy. As in the released code,
    the classifier starts afresh each round (the paper's text continues the old one).
    The gradient of a linear classifier is written out, so neither a data loader nor
    automatic differentiation is needed, and the features stay in memory.

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
        CPU generator of the initial weights and the shuffling. torch's global
        generator is not used.
    initial : torch.nn.Linear or None
        Classifier to start from, not changed; None starts from a new one.
    classes : Tensor of int64, shape [K], or None
        If there are features of some classes only, [K, m, d]: the class of each row.
    num_classes : int or None
        Number of classes C, if there are features of some classes only.

    Returns
    -------
    torch.nn.Linear
        With d inputs and C outputs, on the features' device.
    """
    rows, per_class, dim = features.shape
    num_classes = num_classes or rows
    classifier = new_classifier(dim, num_classes, generator)
    classifier.to(features.device, features.dtype)
    if initial is not None:
        classifier.load_state_dict(initial.state_dict())
    # The bias is the weight of an additional feature, which is always 1.
    samples = torch.cat(
        [features.flatten(0, 1), features.new_ones(rows * per_class, 1)], dim=1
    )
    weight = torch.cat([classifier.weight, classifier.bias[:, None]], dim=1)
    minus_one = -features.new_ones(1, batch_size)
    small = batch_size * dim * num_classes < THREADING_THRESHOLD
    with single_threaded_kernels() if small else nullcontext():
        for _ in range(epochs):
            order = torch.randperm(len(samples), generator=generator)
            order = order.to(features.device)
            labels = (order // per_class)[None]
            if classes is not None:
                labels = classes[labels]
            for chosen, targets in zip(
                order.split(batch_size), labels.split(batch_size, dim=1), strict=True
            ):
                batch = samples.index_select(0, chosen)
                # Shape [C, batch]: with few classes a softmax along the outer axis is
                # several times faster.
                residual = weight.mm(batch.T).softmax(0)
                residual.scatter_add_(0, targets, minus_one)
                weight.addmm_(residual, batch, alpha=-learning_rate / len(batch))
    classifier.weight.copy_(weight[:, :dim])
    classifier.bias.copy_(weight[:, dim])
    return classifier


def new_classifier(
    feature_dim: int, num_classes: int, generator: torch.Generator
) -> nn.Linear:
    """Return a linear classifier with torch's default initialisation.

    ``nn.Linear`` draws weight and bias from U(-1/sqrt(d), 1/sqrt(d)) too, but only
    from the global generator.

    Parameters
    ----------
    feature_dim : int
        Number of inputs d.
    num_classes : int
        Number of outputs C.
    generator : torch.Generator
        CPU generator of the initial values.

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
