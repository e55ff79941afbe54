"""The published code's loops, re-implemented plainly: the baseline of our speed.

They are written from the method's description: one class after another, automatic
differentiation through automatic differentiation, a data loader that collects samples
one by one, and the teacher on every batch of every epoch. Random numbers are drawn in
the same order as in the fast code, so that both compute the same result.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Sampler, TensorDataset

from client_app.augmentation import random_crop_flip, siamese_augment
from clip2fl_common.class_gradients import ClassGradient
from clip2fl_common.models import ImageClassifier

COSINE_EPSILON = 1e-6


class Shuffled(Sampler[int]):
    """Yield the samples in a new order each epoch, from a given generator.

    Parameters
    ----------
    size : int
        Number of samples.
    generator : torch.Generator
        CPU generator of the orders.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self._size = size
        self._generator = generator

    def __iter__(self) -> Iterator[int]:
        """Yield the sample numbers of an epoch."""
        yield from torch.randperm(self._size, generator=self._generator).tolist()

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._size


def class_gradients(
    model: ImageClassifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    draws: int,
    samples_per_class: int,
    generator: torch.Generator,
) -> dict[int, ClassGradient]:
    """Return a client's class gradients, with one forward pass per class and draw.

    Parameters
    ----------
    model : ImageClassifier
        Global model.
    images : Tensor, shape [N, 3, H, W]
        Normalised images.
    labels : Tensor of int64, shape [N]
        Their classes.
    weight, bias : Tensor, shapes [C, d] and [C]
        Re-trained classifier.
    draws, samples_per_class : int
        Number of augmented draws, and most images of a class in one draw.
    generator : torch.Generator
        CPU generator of selection and augmentation.

    Returns
    -------
    dict of int to ClassGradient
    """
    model.eval()
    classifier = nn.Linear(weight.shape[1], weight.shape[0]).to(weight.device)
    classifier.load_state_dict({"weight": weight, "bias": bias})
    parameters = list(classifier.parameters())
    sums: dict[int, list[torch.Tensor]] = {}
    for _ in range(draws):
        for c in labels.unique().tolist():
            members = torch.nonzero(labels == c).flatten().cpu()
            order = torch.randperm(len(members), generator=generator)
            chosen = images[members[order[:samples_per_class]].to(images.device)]
            augmented = siamese_augment(chosen, None, generator)
            target = torch.full((len(chosen),), c, device=images.device)
            loss = functional.cross_entropy(
                classifier(model.features(augmented)), target
            )
            gradient = [
                g.detach().clone() for g in torch.autograd.grad(loss, parameters)
            ]
            so_far = sums.setdefault(c, [torch.zeros_like(p) for p in parameters])
            sums[c] = [a + b for a, b in zip(so_far, gradient, strict=True)]
    return {c: ClassGradient(w / draws, b / draws) for c, (w, b) in sums.items()}


def train_epoch(
    model: nn.Module,
    images: torch.Tensor,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    teacher: Callable[[torch.Tensor], torch.Tensor],
    *,
    temperature: float,
    batch_size: int,
    learning_rate: float,
    crop_padding: int,
    generator: torch.Generator,
) -> None:
    """Train one local epoch with distillation; the teacher runs on every batch.

    Parameters
    ----------
    model : nn.Module
        Student, trained in place.
    images : Tensor, shape [N, 3, H, W]
        Normalised images.
    pixels : Tensor of uint8, shape [N, 3, H, W]
        The same images, for the teacher.
    labels : Tensor of int64, shape [N]
        Their classes.
    teacher : callable
        Maps pixels to the teacher's logits [N, C].
    temperature, batch_size, learning_rate, crop_padding : float or int
        See `client_app.training.train_locally`.
    generator : torch.Generator
        CPU generator of shuffling and augmentation.
    """
    model.train()
    loader = DataLoader(
        TensorDataset(images, pixels, labels),
        batch_size=batch_size,
        sampler=Shuffled(len(labels), generator),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    for batch, batch_pixels, targets in loader:
        with torch.no_grad():
            wanted = functional.softmax(teacher(batch_pixels) / temperature, dim=1)
        logits = model(random_crop_flip(batch, crop_padding, generator))
        loss = functional.cross_entropy(logits, targets)
        distillation = functional.kl_div(
            functional.log_softmax(logits / temperature, dim=1),
            wanted,
            reduction="batchmean",
        )
        loss = loss + temperature**2 * distillation
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def synthesize(
    features: torch.Tensor,
    gradients: Mapping[int, ClassGradient],
    weight: torch.Tensor,
    bias: torch.Tensor,
    text_features: torch.Tensor,
    *,
    steps: int,
    learning_rate: float,
    contrast_weight: float,
    temperature: float,
) -> torch.Tensor:
    """Return the federated features after gradient matching and prototype contrast.

    Parameters
    ----------
    features : Tensor, shape [C, m, d]
        Federated features.
    gradients : mapping of int to ClassGradient
        Mean class gradients.
    weight, bias : Tensor, shapes [C, d] and [C]
        Re-trained classifier.
    text_features : Tensor, shape [C, d]
        Unit text features.
    steps, learning_rate, contrast_weight, temperature : int or float
        See `strategy.synthesis.synthesize`.

    Returns
    -------
    Tensor, shape [C, m, d]
    """
    num_classes, per_class, dim = features.shape
    synthetic = features.flatten(0, 1).clone().requires_grad_()
    classifier = nn.Linear(dim, num_classes).to(features)
    classifier.load_state_dict({"weight": weight, "bias": bias})
    parameters = list(classifier.parameters())
    optimizer = torch.optim.SGD([synthetic], lr=learning_rate)
    prototypes = text_features.repeat_interleave(per_class, dim=0)
    for _ in range(steps):
        loss = features.new_zeros(())
        for c, real in gradients.items():
            own = synthetic[c * per_class : (c + 1) * per_class]
            target = torch.full((per_class,), c, device=features.device)
            matched = torch.autograd.grad(
                functional.cross_entropy(classifier(own), target),
                parameters,
                create_graph=True,
            )
            for made, wanted in zip(matched, real, strict=True):
                norms = made.norm(dim=-1) * wanted.norm(dim=-1)
                cosine = (made * wanted).sum(-1) / (norms + COSINE_EPSILON)
                loss = loss + (1 - cosine).sum()
        similarity = torch.exp(synthetic @ prototypes.T / temperature)
        positive = similarity.diagonal()
        contrast = -torch.log(positive / (similarity.sum(1) - positive)).mean()
        optimizer.zero_grad()
        (loss + contrast_weight * contrast).backward()
        optimizer.step()
    return synthetic.detach().view_as(features)


def retrain_classifier(
    features: torch.Tensor,
    initial: nn.Linear,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
) -> nn.Linear:
    """Return a classifier trained with a data loader and automatic differentiation.

    Parameters
    ----------
    features : Tensor, shape [C, m, d]
        Federated features.
    initial : nn.Linear
        Classifier to start from; not changed.
    epochs, batch_size, learning_rate : int or float
        See `strategy.retraining.retrain_classifier`.
    generator : torch.Generator
        CPU generator of the shuffling.

    Returns
    -------
    nn.Linear
    """
    num_classes, per_class, dim = features.shape
    classifier = nn.Linear(dim, num_classes).to(features)
    classifier.load_state_dict(initial.state_dict())
    labels = torch.arange(num_classes).repeat_interleave(per_class).to(features.device)
    loader = DataLoader(
        TensorDataset(features.flatten(0, 1), labels),
        batch_size=batch_size,
        sampler=Shuffled(len(labels), generator),
    )
    optimizer = torch.optim.SGD(classifier.parameters(), lr=learning_rate)
    for _ in range(epochs):
        for batch, targets in loader:
            loss = functional.cross_entropy(classifier(batch), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier
