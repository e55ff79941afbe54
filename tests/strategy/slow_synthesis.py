"""Slow synthesis, as in the released code: loops and automatic differentiation."""

from collections.abc import Mapping

import torch
from torch.nn import functional

from clip2fl_common.class_gradients import ClassGradient

Problem = tuple[
    torch.Tensor, dict[int, ClassGradient], torch.Tensor, torch.Tensor, torch.Tensor
]


def random_problem(
    seed: int, num_classes: int, per_class: int, dim: int, held: set[int]
) -> Problem:
    """Return features, gradients of the classes held, weight, bias, unit texts."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gradients = {
        c: ClassGradient(normal(num_classes, dim), normal(num_classes))
        for c in sorted(held)
    }
    return (
        normal(num_classes, per_class, dim),
        gradients,
        normal(num_classes, dim),
        normal(num_classes),
        functional.normalize(normal(num_classes, dim), dim=1),
    )


def contrastive_loss(
    features: torch.Tensor, text_features: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return the loss from the [C*m, C*m] similarities of features and prototypes."""
    num_classes, per_class, dim = features.shape
    flat = features.reshape(-1, dim)
    prototypes = text_features.repeat_interleave(per_class, dim=0)
    similarity = torch.exp(flat @ prototypes.T / temperature)
    losses = []
    for i in range(num_classes * per_class):
        own = similarity[i, i]
        others = [similarity[i, j] for j in range(len(flat)) if j != i]
        losses.append(-torch.log(own / torch.stack(others).sum()))
    return torch.stack(losses).mean()


def matching_loss(
    features: torch.Tensor,
    gradients: Mapping[int, ClassGradient],
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """Return the loss, differentiating cross-entropy class by class, row by row."""
    weight = weight.clone().requires_grad_()
    bias = bias.clone().requires_grad_()
    loss = features.new_zeros(())
    for c, real in gradients.items():
        logits = functional.linear(features[c], weight, bias)
        labels = torch.full((features.shape[1],), c)
        synthetic = torch.autograd.grad(
            functional.cross_entropy(logits, labels), (weight, bias), create_graph=True
        )
        rows = [*zip(synthetic[0], real.weight, strict=True), (synthetic[1], real.bias)]
        for a, b in rows:
            norms = torch.sqrt((a * a).sum()) * torch.sqrt((b * b).sum())
            loss = loss + 1 - (a * b).sum() / (norms + 1e-6)
    return loss


def synthesis_gradient(
    features: torch.Tensor,
    gradients: Mapping[int, ClassGradient],
    weight: torch.Tensor,
    bias: torch.Tensor,
    text_features: torch.Tensor | None,
    contrast_weight: float,
    temperature: float,
) -> torch.Tensor:
    """Return the derivative of the two slow losses by automatic differentiation."""
    features = features.clone().requires_grad_()
    loss = matching_loss(features, gradients, weight, bias) + 0 * features.sum()
    if text_features is not None:
        contrast = contrastive_loss(features, text_features, temperature)
        loss = loss + contrast_weight * contrast
    (derivative,) = torch.autograd.grad(loss, features)
    return derivative
