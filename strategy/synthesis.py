"""Federated features: synthesised so that their class gradients match the clients'.

CReFF (Shang et al. 2022, Eq. 5-7) finds, for every class, m features whose
classifier gradient equals the clients' average; CLIP2FL (Shi et al. 2024, Eq. 9-10)
also holds them near CLIP's text prototypes. All classes are treated at once and the
derivative of the gradient-matching loss is written out, so that neither a loop over
classes nor double back-propagation is needed.

Where paper and released code differ, the released code is followed: rows of the
weight gradient are summed, not averaged; the bias gradient takes part; and the
contrastive denominator runs over the prototypes of all C * m features.
"""

from collections.abc import Iterable, Mapping

import torch
from torch.nn import functional

from clip2fl_common.gradients import ClassGradient

__all__ = [
    "ClassGradient",
    "gradient_matching_loss",
    "mean_class_gradients",
    "prototype_contrastive_loss",
    "stack_gradients",
    "synthesis_gradient",
    "synthesize",
]

# Added to the product of norms in the cosine, as in the released code.
COSINE_EPSILON = 1e-6


def mean_class_gradients(
    replies: Iterable[Mapping[int, ClassGradient]],
) -> dict[int, ClassGradient]:
    """Average each class's gradient over the clients that hold the class.

    A plain mean, not weighted by class counts: no class count leaves a client.

    Parameters
    ----------
    replies : iterable of mapping from class to ClassGradient
        One mapping per client; consumed one at a time.

    Returns
    -------
    dict of int to ClassGradient
        In ascending order of class.
    """
    sums: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}
    for reply in replies:
        for c, gradient in reply.items():
            if c in sums:
                weight, bias, count = sums[c]
                sums[c] = (weight + gradient.weight, bias + gradient.bias, count + 1)
            else:
                sums[c] = (gradient.weight, gradient.bias, 1)
    return {
        c: ClassGradient(weight / count, bias / count)
        for c, (weight, bias, count) in sorted(sums.items())
    }


def _contrast_logits(
    features: torch.Tensor, text_features: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return v.t/tau, and the same with the log of each term's multiplicity added.

    The released code builds the [C*m, C*m] similarities between features and their
    prototypes. Its columns repeat: each prototype stands m times in a row, one of
    which (the feature's own) is taken away. Hence m times every other class's term
    and m - 1 times the own one.
    """
    num_classes, per_class, _ = features.shape
    logits = features @ text_features.T / temperature
    multiplicity = torch.full(
        (num_classes, num_classes), float(per_class), device=features.device
    )
    multiplicity.fill_diagonal_(float(per_class - 1))
    return logits, logits + multiplicity.log().to(features.dtype)[:, None, :]


def prototype_contrastive_loss(
    features: torch.Tensor, text_features: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return CLIP2FL's prototype contrastive loss (Eq. 9, the released code's form).

    For feature v of class c and unit text features t,
    ``-log(exp(v.t_c/tau) / (m * sum_k exp(v.t_k/tau) - exp(v.t_c/tau)))``, averaged
    over all features. Needs [C, m, C] memory where the released code needs
    [C*m, C*m], and does not overflow.

    Parameters
    ----------
    features : Tensor, shape [C, m, d]
        Federated features, not normalised.
    text_features : Tensor, shape [C, d]
        Unit text features, one prototype a class.
    temperature : float
        tau > 0.

    Returns
    -------
    Tensor, scalar
    """
    logits, weighted = _contrast_logits(features, text_features, temperature)
    own = logits.diagonal(dim1=0, dim2=2).T
    return (weighted.logsumexp(dim=2) - own).mean()


def _feature_gradients(
    features: torch.Tensor,
    classes: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return softmax [K, m, C], weight gradients [K, C, d], bias gradients [K, C]."""
    probabilities = torch.softmax(features @ weight.T + bias, dim=2)
    residual = probabilities - functional.one_hot(classes, len(weight))[:, None, :].to(
        features.dtype
    )
    per_class = features.shape[1]
    return (
        probabilities,
        residual.transpose(1, 2) @ features / per_class,
        residual.mean(dim=1),
    )


def gradient_matching_loss(
    features: torch.Tensor,
    target_weight: torch.Tensor,
    target_bias: torch.Tensor,
    classes: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """Return the distance between synthetic and real class gradients (CReFF Eq. 6).

    For each class, ``1 - cos`` of every row of the weight gradient and of the bias
    gradient, summed over rows and classes.

    Parameters
    ----------
    features : Tensor, shape [C, m, d]
        Federated features of all classes.
    target_weight : Tensor, shape [K, C, d]
        Mean weight gradient of each class that a client holds.
    target_bias : Tensor, shape [K, C]
        Mean bias gradient of each of these classes.
    classes : Tensor of int64, shape [K]
        Which classes these are.
    weight : Tensor, shape [C, d]
        The classifier at which the clients took their gradients.
    bias : Tensor, shape [C]
        Its bias.

    Returns
    -------
    Tensor, scalar
    """
    _, weight_gradient, bias_gradient = _feature_gradients(
        features[classes], classes, weight, bias
    )
    row_cosine = _cosine(weight_gradient, target_weight)[0]
    bias_cosine = _cosine(bias_gradient, target_bias)[0]
    return (1 - row_cosine).sum() + (1 - bias_cosine).sum()


def _cosine(
    a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return cos(a, b) along the last axis, both norms and the guarded product."""
    norm_a, norm_b = a.norm(dim=-1), b.norm(dim=-1)
    product = norm_a * norm_b + COSINE_EPSILON
    return (a * b).sum(-1) / product, norm_a, norm_b, product


def _distance_derivative(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the derivative of the summed ``1 - cos(a, b)`` with respect to a."""
    cosine, norm_a, norm_b, product = _cosine(a, b)
    # At a = 0 the norm has no derivative; automatic differentiation returns 0 too.
    direction = a / norm_a.clamp_min(torch.finfo(a.dtype).tiny)[..., None]
    return direction * (cosine * norm_b / product)[..., None] - b / product[..., None]


@torch.no_grad()
def synthesis_gradient(
    features: torch.Tensor,
    target_weight: torch.Tensor,
    target_bias: torch.Tensor,
    classes: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    text_features: torch.Tensor | None,
    *,
    contrast_weight: float,
    temperature: float,
) -> torch.Tensor:
    """Return the derivative of the synthesis objective with respect to the features.

    The objective is ``gradient_matching_loss + contrast_weight *
    prototype_contrastive_loss``. With S the softmax, P = S - onehot, and G the
    derivative of the matching loss with respect to the synthetic weight gradient
    ``P^T V / m`` (g with respect to the bias gradient), the features' derivative is
    ``P G / m + dZ W`` with ``dP = (V G^T + g) / m`` and ``dZ = S * (dP - <S, dP>)``.

    Parameters
    ----------
    features : Tensor, shape [C, m, d]
        Federated features.
    target_weight, target_bias, classes, weight, bias : Tensor
        As for `gradient_matching_loss`.
    text_features : Tensor or None, shape [C, d]
        Unit text features; None leaves the contrastive term out.
    contrast_weight : float
        eta >= 0.
    temperature : float
        tau > 0 of the contrastive term.

    Returns
    -------
    Tensor, shape [C, m, d]
    """
    num_classes, per_class, _ = features.shape
    derivative = torch.zeros_like(features)
    if len(classes):
        held = features[classes]
        probabilities, weight_gradient, bias_gradient = _feature_gradients(
            held, classes, weight, bias
        )
        outer = _distance_derivative(weight_gradient, target_weight) / per_class
        outer_bias = _distance_derivative(bias_gradient, target_bias) / per_class
        d_residual = held @ outer.transpose(1, 2) + outer_bias[:, None, :]
        d_logits = probabilities * (
            d_residual - (probabilities * d_residual).sum(2, keepdim=True)
        )
        one_hot = functional.one_hot(classes, num_classes)[:, None, :]
        residual = probabilities - one_hot.to(features.dtype)
        derivative[classes] = residual @ outer + d_logits @ weight
    if text_features is not None and contrast_weight > 0:
        _, weighted = _contrast_logits(features, text_features, temperature)
        share = torch.softmax(weighted, dim=2)
        share.diagonal(dim1=0, dim2=2).sub_(1)
        scale = contrast_weight / (num_classes * per_class * temperature)
        derivative += (share @ text_features) * scale
    return derivative


def stack_gradients(
    gradients: Mapping[int, ClassGradient], features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stack class gradients on the features' device.

    Parameters
    ----------
    gradients : mapping of int to ClassGradient
        K classes.
    features : Tensor, shape [C, m, d]
        Federated features.

    Returns
    -------
    tuple of Tensor
        Weight gradients [K, C, d], bias gradients [K, C], classes [K].
    """
    num_classes, _, dim = features.shape
    weight = features.new_zeros(len(gradients), num_classes, dim)
    bias = features.new_zeros(len(gradients), num_classes)
    for k, gradient in enumerate(gradients.values()):
        weight[k] = gradient.weight
        bias[k] = gradient.bias
    classes = torch.tensor(list(gradients), dtype=torch.int64, device=features.device)
    return weight, bias, classes


@torch.no_grad()
def synthesize(
    features: torch.Tensor,
    gradients: Mapping[int, ClassGradient],
    weight: torch.Tensor,
    bias: torch.Tensor,
    text_features: torch.Tensor | None,
    *,
    steps: int,
    learning_rate: float,
    contrast_weight: float,
    temperature: float,
) -> torch.Tensor:
    """Move the federated features by plain gradient descent.

    Parameters
    ----------
    features : Tensor, shape [C, m, d]
        Federated features of the round before (standard normal at first); not
        changed.
    gradients : mapping of int to ClassGradient
        Mean class gradient of every class that a client holds this round.
    weight : Tensor, shape [C, d]
        The classifier at which the clients took their gradients.
    bias : Tensor, shape [C]
        Its bias.
    text_features : Tensor or None, shape [C, d]
        Unit text features of the teacher; None for CReFF.
    steps : int
        Number of descent steps.
    learning_rate : float
        Step size.
    contrast_weight : float
        Weight eta of the prototype contrastive loss.
    temperature : float
        tau > 0 of the prototype contrastive loss.

    Returns
    -------
    Tensor, shape [C, m, d]
        The new federated features. A class without a gradient this round is moved
        by the contrastive term only.
    """
    target_weight, target_bias, classes = stack_gradients(gradients, features)
    current = features.clone()
    for _ in range(steps):
        current -= learning_rate * synthesis_gradient(
            current,
            target_weight,
            target_bias,
            classes,
            weight,
            bias,
            text_features,
            contrast_weight=contrast_weight,
            temperature=temperature,
        )
    return current
