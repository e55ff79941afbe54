"""Classification of a client's own images by several classifiers at once."""

from collections.abc import Mapping

import torch
from torch.nn import functional

from client_app.training import Images
from clip2fl_common.models import ImageClassifier, folded


@torch.no_grad()
def predictions(
    model: ImageClassifier,
    images: Images,
    classifiers: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    logits: Mapping[str, torch.Tensor],
    batch_size: int,
) -> dict[str, torch.Tensor]:
    """Return the class that each classifier gives each image.

    Parameters
    ----------
    model : ImageClassifier
        Gives backbone and projection.
    images : Images, N of them
        Normalised images.
    classifiers : mapping of str to tuple of Tensor, shapes [C, d] and [C]
        Weight and bias of each classifier on the model's features, by name.
    logits : mapping of str to Tensor, shape [N, C]
        Logits of other models for the same images, by name.
    batch_size : int
        Images in one forward pass.

    Returns
    -------
    dict of str to Tensor of int64, shape [N]
        By name, on the CPU.
    """
    network = folded(model)
    predicted: dict[str, list[torch.Tensor]] = {name: [] for name in classifiers}
    for batch in torch.arange(len(images)).split(batch_size):
        if not len(batch):
            continue
        features = network.features(images[batch])
        for name, (weight, bias) in classifiers.items():
            scores = functional.linear(features, weight, bias)
            predicted[name].append(scores.argmax(1).cpu())
    votes = {
        name: torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        for name, parts in predicted.items()
    }
    return votes | {name: scores.argmax(1).cpu() for name, scores in logits.items()}


def recalls(
    votes: Mapping[str, torch.Tensor], labels: torch.Tensor
) -> dict[str, dict[int, float]]:
    """Return each classifier's accuracy on each class in percent.

    Parameters
    ----------
    votes : mapping of str to Tensor of int64, shape [N]
        As returned by `predictions`.
    labels : Tensor of int64, shape [N]
        Classes of the images.

    Returns
    -------
    dict of str to dict of int to float
        By name and class, for the classes among the labels.
    """
    held = labels.unique().tolist()
    return {
        name: {c: 100 * (vote[labels == c] == c).double().mean().item() for c in held}
        for name, vote in votes.items()
    }
