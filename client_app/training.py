"""Local training: (logit-adjusted) cross-entropy, distillation, proximal term."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from client_app.augmentation import random_crop_flip, siamese_augment
from client_app.optimizers import PLAIN_SGD, OptimizerSettings, make_optimizer
from clip2fl_common.models import ImageClassifier, folded
from clip2fl_common.parallel import map_pieces


def distillation_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return ``T^2 * KL(softmax(teacher/T) || softmax(student/T))``.

    Knowledge distillation (Hinton et al. 2015) as CLIP2FL uses it (Eq. 5), averaged
    over the batch.

    Parameters
    ----------
    student_logits, teacher_logits : Tensor, shape [N, C]
        Logits.
    temperature : float
        T > 0.

    Returns
    -------
    Tensor, scalar
    """
    return temperature**2 * functional.kl_div(
        functional.log_softmax(student_logits / temperature, dim=1),
        functional.log_softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


def logit_offsets(
    labels: torch.Tensor, num_classes: int, strength: float
) -> torch.Tensor:
    """Return ``strength * log(prior)``, with the label frequencies as the prior.

    The offsets are added to the logits inside the cross-entropy (Menon et al. 2021,
    Eq. 10). They demand a larger margin of rare classes over frequent ones. The
    classifier without the offsets then suits balanced classes. Each client uses its
    own prior, as in FedLC (Zhang et al. 2022), so that no label counts leave it.

    A class that the client does not hold has the offset -infinity. It takes no part in
    the softmax, so this client neither raises nor lowers its score. This is the limit
    of the formula (and of FedLC's), and the restricted softmax of FedRS (Li and Zhan
    2021). With a finite offset the clients without a rare class, which are the
    majority, would unlearn it in every step.

    Parameters
    ----------
    labels : Tensor of int64, shape [N]
        The client's labels.
    num_classes : int
        Number of classes C.
    strength : float
        tau > 0; Menon et al. use 1.

    Returns
    -------
    Tensor, shape [C]
        On the labels' device.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    return strength * (counts / len(labels)).log()


@dataclass(frozen=True)
class LocalObjective:
    """The terms of the local loss and their weights.

    Attributes
    ----------
    distillation_weight : float
        alpha; 0 turns distillation off.
    distillation_temperature : float
        T > 0.
    proximal_mu : float
        Weight of half the squared distance to the global model (FedProx, Li et al.
        2020, Eq. 2); 0 turns it off.
    label_weight : float
        Weight of the cross-entropy with the labels; with 0 the teacher alone trains.
    """

    distillation_weight: float = 0.0
    distillation_temperature: float = 1.0
    proximal_mu: float = 0.0
    label_weight: float = 1.0


class Images(Protocol):
    """Normalised images [N, 3, H, W]: a tensor, or an object that makes batches."""

    @property
    def device(self) -> torch.device:
        """Return the device of the batches."""

    def __len__(self) -> int:
        """Return the number of images N."""

    def __getitem__(self, indices: torch.Tensor, /) -> torch.Tensor:
        """Return the images at these indices."""


@dataclass(frozen=True)
class PixelImages:
    """Images kept as pixels and normalised batch by batch.

    Pixels take a quarter of the memory of normalised images, and may be memory-mapped.

    Attributes
    ----------
    pixels : Tensor of uint8, shape [N, 3, H, W]
        RGB images.
    normalize : callable
        Converts uint8 images to normalised float images (`datasets.Normalization`).
    device : torch.device
        Device of the batches.
    """

    pixels: torch.Tensor
    normalize: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device

    def __len__(self) -> int:
        """Return the number of images N."""
        return len(self.pixels)

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the normalised images at these indices."""
        chosen = self.pixels[indices.to(self.pixels.device)]
        return self.normalize(chosen.to(self.device))


class Views(Protocol):
    """Augmented pictures of the images, with the teacher's logits of each picture."""

    def batch(
        self, epoch: int, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return normalised pictures [n, 3, H, W] and logits [n, C] of the images."""

    def mixture(
        self, epoch: int, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return which images are mixed in [n], and the shares of the first [n].

        None where the pictures are not mixed.
        """


def label_loss(
    scores: torch.Tensor,
    labels: torch.Tensor,
    mixture: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the cross-entropy with the labels, averaged over the batch.

    For a mixed picture it is ``lambda * CE(y_i) + (1 - lambda) * CE(y_j)`` (mixup,
    Zhang et al. 2018; CutMix, Yun et al. 2019).

    Parameters
    ----------
    scores : Tensor, shape [n, C]
        Logits. They may be -infinity for classes that are no label.
    labels : Tensor of int64, shape [n]
        Labels of the (first) images.
    mixture : tuple of Tensor or None
        Labels [n] of the images that are mixed in, and lambda [n].

    Returns
    -------
    Tensor, scalar
    """
    if mixture is None:
        return functional.cross_entropy(scores, labels)
    others, shares = mixture
    # Soft labels in one cross-entropy would multiply -infinity by zero.
    own = functional.cross_entropy(scores, labels, reduction="none")
    other = functional.cross_entropy(scores, others, reduction="none")
    return (shares * own + (1 - shares) * other).mean()


@dataclass(frozen=True)
class TrainingLosses:
    """Mean losses over the last local epoch."""

    total: float
    distillation: float


def train_locally(
    model: ImageClassifier,
    images: Images,
    labels: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    objective: LocalObjective,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    crop_padding: int,
    generator: torch.Generator,
    offsets: torch.Tensor | None = None,
    augment_per_image: bool = False,
    precision: torch.dtype = torch.float32,
    optimizer: OptimizerSettings = PLAIN_SGD,
    views: Views | None = None,
) -> TrainingLosses:
    """Train a model in place; return its losses.

    Parameters
    ----------
    model : ImageClassifier
        Global model; trained in place.
    images : Images, N of them
        The client's normalised images.
    labels : Tensor of int64, shape [N]
        Their classes.
    teacher_logits : Tensor or None, shape [N, C]
        The teacher's logits for the un-augmented images, if it distils.
    objective : LocalObjective
        Terms of the loss.
    epochs, batch_size : int
        Passes over the images and mini-batch size; the last batch may be smaller.
    learning_rate : float
        Step size of the optimizer.
    crop_padding : int
        Zero pixels around an image before its crop (see `random_crop_flip`).
    generator : torch.Generator
        CPU generator of shuffling and augmentation.
    offsets : Tensor or None, shape [C]
        Added to the logits in the cross-entropy (see `logit_offsets`). Distillation
        compares the logits without them: the teacher knows no client's frequencies.
    augment_per_image : bool
        Draw crop and flip for each image instead of each batch.
    precision : torch.dtype
        Precision of the passes: float32, or bfloat16 for mixed precision.
    optimizer : OptimizerSettings
        Plain SGD by default. Its state starts at zero and ends with this call.
    views : Views or None
        Pictures to train on instead of the images with a crop and a flip; their logits
        take the place of ``teacher_logits``. Mixed pictures have mixed labels
        (`label_loss`).

    Returns
    -------
    TrainingLosses

    Raises
    ------
    FloatingPointError
        If the loss is no longer finite.
    """
    model.train()
    # The global model's parameters stay fixed while the local ones move.
    anchors = (
        [parameter.detach().clone() for parameter in model.parameters()]
        if objective.proximal_mu > 0
        else []
    )
    descent = make_optimizer(optimizer, model, learning_rate)
    for epoch in range(epochs):
        total = distilled = torch.zeros((), device=images.device)
        for batch in torch.randperm(len(images), generator=generator).split(batch_size):
            chosen = batch.to(images.device)
            taught: torch.Tensor | None
            mixture = None
            if views is not None:
                augmented, taught = views.batch(epoch, batch)
                if (mixed := views.mixture(epoch, batch)) is not None:
                    mixture = labels[mixed[0]], mixed[1]
            else:
                augmented = random_crop_flip(
                    images[chosen], crop_padding, generator, per_image=augment_per_image
                )
                taught = None if teacher_logits is None else teacher_logits[chosen]
            with mixed_precision(images.device, precision):
                logits = model(augmented)
            # In half precision the loss would be rounded to three digits.
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            scores = logits if offsets is None else logits + offsets
            loss = label_loss(scores, labels[chosen], mixture)
            if objective.label_weight != 1:
                loss = objective.label_weight * loss
            if taught is not None:
                distillation = distillation_loss(
                    logits, taught, objective.distillation_temperature
                )
                loss = loss + objective.distillation_weight * distillation
                distilled = distilled + distillation.detach() * len(batch)
            if anchors:
                squared = sum(
                    (parameter - anchor).square().sum()
                    for parameter, anchor in zip(
                        model.parameters(), anchors, strict=True
                    )
                )
                loss = loss + objective.proximal_mu / 2 * squared
            model.zero_grad()
            loss.backward()
            descent.step()
            total = total + loss.detach() * len(batch)
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"the local loss became {float(total / len(images))}; lower "
                f"client.learning-rate (now {learning_rate})"
            )
    return TrainingLosses(float(total / len(images)), float(distilled / len(images)))


def mixed_precision(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return torch's automatic mixed precision; float32 switches it off."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=precision == torch.bfloat16
    )


@torch.no_grad()
def augmented_features(
    model: ImageClassifier,
    images: Images,
    labels: torch.Tensor,
    *,
    draws: int,
    samples_per_class: int,
    augment: bool,
    batch_size: int,
    generator: torch.Generator,
    precision: torch.dtype = torch.float32,
    min_class_samples: int = 1,
    fixed: Mapping[int, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features from which a client's class gradients are computed.

    Each draw takes up to ``samples_per_class`` random images of each class held and
    augments each class's images by one Siamese operation (PAPER, "One round", 2). Every
    draw has the same number of images of a class, so a class's gradient over all of its
    features is the mean of the draws' gradients.

    Parameters
    ----------
    model : ImageClassifier
        Global model, before local training.
    images : Images, N of them
        The client's normalised images.
    labels : Tensor of int64, shape [N]
        Their classes.
    draws, samples_per_class : int
        Number of draws, and most images of a class in one draw.
    augment : bool
        Whether images are augmented.
    batch_size : int
        Images in one forward pass.
    generator : torch.Generator
        CPU generator of the selection and the augmentation.
    precision : torch.dtype
        Precision of the passes: float32, or bfloat16 for mixed precision.
    min_class_samples : int
        Classes with fewer images are left out.
    fixed : mapping of int to Tensor of int64, or None
        By class, positions of the images that every draw takes exactly; other classes
        are left out, however many images they have. None lets each draw choose.

    Returns
    -------
    tuple of Tensor
        Features [n, d] in float32 and their labels [n], in the order of the draws.
    """
    network = folded(model)
    members = {
        int(c): torch.nonzero(labels == c).flatten().cpu()
        for c, count in zip(*labels.unique(return_counts=True), strict=True)
        if count >= min_class_samples
    }
    if fixed is not None:
        members = {c: places.cpu() for c, places in fixed.items()}
    if not members:
        dim = model.classifier.in_features
        return torch.empty(0, dim, device=labels.device), labels[:0]
    chosen: list[torch.Tensor] = []

    def parts() -> Iterator[torch.Tensor]:
        for _ in range(draws):
            for indices in members.values():
                if fixed is None:
                    order = torch.randperm(len(indices), generator=generator)
                    indices = indices[order[:samples_per_class]]
                picked = indices.to(images.device)
                chosen.append(picked)
                part = images[picked]
                yield siamese_augment(part, None, generator) if augment else part

    def features_of(batch: torch.Tensor) -> torch.Tensor:
        with mixed_precision(images.device, precision):
            return network.features(batch).float()

    batches = _rebatch(parts(), batch_size)
    features = torch.cat(list(map_pieces(features_of, batches, images.device)))
    return features, labels[torch.cat(chosen)]


def _rebatch(parts: Iterable[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """Join and cut tensors along the first axis; only the last may be smaller."""
    waiting: list[torch.Tensor] = []
    for part in parts:
        waiting.append(part)
        while sum(map(len, waiting)) >= size:
            joined = torch.cat(waiting)
            yield joined[:size]
            waiting = [joined[size:]]
    if rest := [part for part in waiting if len(part)]:
        yield torch.cat(rest)
