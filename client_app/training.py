"""Local training, and the features of which class gradients are made."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from client_app.augmentation import siamese_augment
from client_app.batches import Batch, Batches, Images, PixelImages, Views
from client_app.local_step import LocalStep, mixed_precision, recorded_training
from client_app.losses import (
    LocalObjective,
    distillation_loss,
    label_loss,
    logit_offsets,
)
from client_app.optimizers import PLAIN_SGD, OptimizerSettings, make_optimizer
from clip2fl_common.graphs import Capture, capture_for
from clip2fl_common.models import ImageClassifier, folded
from clip2fl_common.parallel import map_pieces

__all__ = [
    "Images",
    "LocalObjective",
    "PixelImages",
    "TrainingLosses",
    "Views",
    "augmented_features",
    "distillation_loss",
    "held_images",
    "label_loss",
    "logit_offsets",
    "mixed_precision",
    "train_locally",
]


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
    capture: Capture | None = None,
) -> TrainingLosses:
    """Train a model in place; return its losses.

    On a CUDA device a step is a CUDA graph, recorded once in a process for each kind of
    model, objective and batch size. Its numbers are those of the same operations one
    after the other.

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
    capture : Capture or None
        How a step is recorded; None: as a CUDA graph on a CUDA device, and not at all
        on others.

    Returns
    -------
    TrainingLosses

    Raises
    ------
    FloatingPointError
        If the loss is no longer finite.
    """
    batches = Batches(
        images,
        labels,
        teacher_logits,
        views,
        epochs=epochs,
        batch_size=batch_size,
        padding=crop_padding,
        generator=generator,
        per_image=augment_per_image,
    )
    capture = capture or capture_for(images.device)
    if capture is None:
        descent = make_optimizer(optimizer, model, learning_rate)
        step = LocalStep(model, objective, descent, offsets, precision)
        for epoch in range(epochs):
            _run_epoch(step, step, batches.one_by_one(epoch))
            _check_finite(step.total / len(images), learning_rate)
    else:
        recorded = recorded_training(
            model, objective, optimizer, offsets, precision, capture
        )
        other = optimizer.other_learning_rate
        recorded.start(model, learning_rate, other, offsets)
        step = recorded.step
        for epoch_batches in batches.many_at_once():
            _run_epoch(step, recorded.take_step, epoch_batches)
        # Once at the end: a look at the loss waits for the GPU. Once it is not finite,
        # it stays so.
        _check_finite(step.total / len(images), learning_rate)
        recorded.finish(model)
    return TrainingLosses(
        float(step.total / len(images)), float(step.distilled / len(images))
    )


def _run_epoch(
    step: LocalStep, take_step: Callable[..., None], batches: Iterable[Batch]
) -> None:
    """Take an epoch's steps; the sums of the losses then belong to this epoch."""
    step.total.zero_()
    step.distilled.zero_()
    for batch in batches:
        take_step(*batch)


def _check_finite(loss: torch.Tensor, learning_rate: float) -> None:
    """Raise if an epoch's mean loss is not finite."""
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the local loss became {float(loss)}; lower "
            f"client.learning-rate (now {learning_rate})"
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
    members = held_images(labels, min_class_samples, fixed)
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


def held_images(
    labels: torch.Tensor,
    min_class_samples: int,
    fixed: Mapping[int, torch.Tensor] | None,
) -> dict[int, torch.Tensor]:
    """Return the images from which statistics may be computed, by class.

    Parameters
    ----------
    labels : Tensor of int64, shape [N]
        The client's labels.
    min_class_samples : int
        Classes with fewer images are left out.
    fixed : mapping of int to Tensor of int64, or None
        The site's own choice in place of this rule.

    Returns
    -------
    dict of int to Tensor of int64
        Positions among the N images, on the CPU.
    """
    if fixed is not None:
        return {c: places.cpu() for c, places in fixed.items()}
    return {
        int(c): torch.nonzero(labels == c).flatten().cpu()
        for c, count in zip(*labels.unique(return_counts=True), strict=True)
        if count >= min_class_samples
    }


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
