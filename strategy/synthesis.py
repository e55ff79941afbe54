"""Federated features: synthesised so that their class gradients match the clients'.

CReFF (Shang et al. 2022, Eq. 5-7) finds, for every class, m features whose
classifier gradient equals the clients' average; CLIP2FL (Shi et al. 2024, Eq. 9-10)
also holds them near CLIP's text prototypes. The derivative of the gradient-matching
loss is written out, so that no double back-propagation is needed.

Classes do not meet in the objective: each one's features, gradient and share of the
contrastive loss are its own. So a few classes at a time are taken through all descent
steps. What they need stays in the processor's cache, no array of shape [C, C, d] is
formed, and several cores work on different classes.

Where paper and released code differ, the released code is followed: rows of the
weight gradient are summed, not averaged; the bias gradient takes part; and the
contrastive denominator runs over the prototypes of all C * m features.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from clip2fl_common.gradient_coding import CodedGradient
from clip2fl_common.gradients import ClassGradient
from clip2fl_common.parallel import map_pieces
from strategy.gradient_mean import mean_class_gradients

__all__ = [
    "ClassGradient",
    "Objective",
    "class_chunks",
    "gradient_matching_loss",
    "mean_class_gradients",
    "prototype_contrastive_loss",
    "stack_gradients",
    "step_size",
    "synthesis_gradient",
    "synthesize",
]

# Added to the product of norms in the cosine, as in the released code.
COSINE_EPSILON = 1e-6

# Target gradients of the classes treated at once. A processor's cache holds 4 MiB of
# them with all that is computed from them; a GPU wants large products. Five classes
# are enough for large products on a CPU and leave some for other cores. None of it
# depends on the number of threads, and so neither does the result.
CPU_CHUNK_BYTES = 4 * 2**20
CPU_CHUNK_CLASSES = 5
CUDA_CHUNK_BYTES = 2**30


def step_size(start: float, final: float, server_round: int, rounds: int) -> float:
    """Return a round's step size on the features, geometric over the rounds.

    Parameters
    ----------
    start : float
        Step size of round 1.
    final : float
        Step size of the last round; 0: the same in all rounds.
    server_round, rounds : int
        Round, from 1, and number of rounds.

    Returns
    -------
    float
    """
    if final == 0 or rounds == 1:
        return start
    return float(start * (final / start) ** ((server_round - 1) / (rounds - 1)))


def class_chunks(
    classes: Sequence[int], num_classes: int, dim: int, device: torch.device
) -> list[list[int]]:
    """Divide classes into groups that are treated at once.

    Parameters
    ----------
    classes : sequence of int
        Classes to divide; their order is kept.
    num_classes, dim : int
        C and d: a class gradient holds C * d numbers.
    device : torch.device
        Where they are treated.

    Returns
    -------
    list of list of int
        Disjoint groups whose class gradients stay within the device's budget.
    """
    gradient_bytes = 4 * num_classes * dim
    if device.type == "cuda":
        size = max(1, CUDA_CHUNK_BYTES // gradient_bytes)
    else:
        size = max(1, min(CPU_CHUNK_CLASSES, CPU_CHUNK_BYTES // gradient_bytes))
    return [list(classes[i : i + size]) for i in range(0, len(classes), size)]


def prototype_contrastive_loss(
    features: torch.Tensor, text_features: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return CLIP2FL's prototype contrastive loss (Eq. 9, the released code's form).

    For feature v of class c and unit text features t,
    ``-log(exp(v.t_c/tau) / (m * sum_k exp(v.t_k/tau) - exp(v.t_c/tau)))``, averaged
    over all features. Needs [C, m] memory for a class at a time where the released
    code needs [C*m, C*m], and does not overflow.

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
    num_classes, per_class, dim = features.shape
    total = features.new_zeros(())
    for chunk in class_chunks(range(num_classes), num_classes, dim, features.device):
        own = slice(chunk[0], chunk[-1] + 1)
        logits = torch.einsum("kmd,cd->ckm", features[own], text_features / temperature)
        weighted = logits + _log_multiplicity(chunk, num_classes, per_class, features)
        total = total + weighted.logsumexp(dim=0).sum()
        total = total - logits[own].diagonal(dim1=0, dim2=1).sum()
    return total / (num_classes * per_class)


def _log_multiplicity(
    classes: Sequence[int], num_classes: int, per_class: int, like: torch.Tensor
) -> torch.Tensor:
    """Return the log of how often each prototype counts, shape [C, k, 1].

    The released code builds the [C*m, C*m] similarities between features and their
    prototypes. Its columns repeat: each prototype stands m times in a row, one of
    which (the feature's own) is taken away. Hence m times every other class's term
    and m - 1 times the own one.
    """
    multiplicity = like.new_full((num_classes, len(classes), 1), float(per_class))
    for k, c in enumerate(classes):
        multiplicity[c, k] = per_class - 1
    logarithm: torch.Tensor = multiplicity.log()
    return logarithm


def gradient_matching_loss(
    features: torch.Tensor,
    gradients: Mapping[int, CodedGradient],
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
    gradients : mapping of int to ClassGradient or LowRankGradient
        Mean class gradient of every class that a client holds.
    weight : Tensor, shape [C, d]
        The classifier at which the clients took their gradients.
    bias : Tensor, shape [C]
        Its bias.

    Returns
    -------
    Tensor, scalar
    """
    num_classes, per_class, dim = features.shape
    total = features.new_zeros(())
    for chunk in class_chunks(list(gradients), num_classes, dim, features.device):
        target_weight, target_bias = stack_gradients(gradients, chunk, features)
        held = features[chunk]
        residual = torch.softmax(held @ weight.T + bias, dim=2)
        own = torch.zeros_like(residual)
        own[range(len(chunk)), :, chunk] = 1
        residual = residual - own
        weight_gradient = residual.transpose(1, 2) @ held / per_class
        total = total + (1 - _cosine(weight_gradient, target_weight)).sum()
        total = total + (1 - _cosine(residual.mean(dim=1), target_bias)).sum()
    return total


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return cos(a, b) along the last axis."""
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    cosine: torch.Tensor = (a * b).sum(-1) / (norms + COSINE_EPSILON)
    return cosine


def _distance_derivative(
    a: torch.Tensor, b: torch.Tensor, norm_b: torch.Tensor
) -> torch.Tensor:
    """Return the derivative of the summed ``1 - cos(a, b)`` by a, written over a."""
    norm_a = torch.linalg.vector_norm(a, dim=-1)
    product = norm_a * norm_b + COSINE_EPSILON
    # At a = 0 the norm has no derivative; automatic differentiation returns 0 too.
    along_a = (a * b).sum(-1) * norm_b / product.square()
    along_a /= norm_a.clamp_min(torch.finfo(a.dtype).tiny)
    return a.mul_(along_a[..., None]).addcmul_(b, -1 / product[..., None])


@dataclass(frozen=True)
class Objective:
    """What the federated features of every class are held against.

    Attributes
    ----------
    weight : Tensor, shape [C, d]
        The classifier at which the clients took their gradients.
    bias : Tensor, shape [C]
        Its bias.
    text_features : Tensor or None, shape [C, d]
        Unit text features of the teacher; None leaves the contrastive term out.
    contrast_weight : float
        Weight eta of the contrastive term.
    temperature : float
        tau > 0 of the contrastive term.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    text_features: torch.Tensor | None
    contrast_weight: float
    temperature: float

    @property
    def contrasts(self) -> bool:
        """Whether the contrastive term moves anything."""
        return self.text_features is not None and self.contrast_weight > 0


@torch.no_grad()
def synthesis_gradient(
    features: torch.Tensor,
    classes: Sequence[int],
    target: tuple[torch.Tensor, torch.Tensor] | None,
    objective: Objective,
) -> torch.Tensor:
    """Return the derivative of the synthesis objective by some classes' features.

    The objective is ``gradient_matching_loss + contrast_weight *
    prototype_contrastive_loss`` over all C classes. With S the softmax, P = S - onehot,
    and G the derivative of the matching loss by the synthetic weight gradient
    ``P^T V / m`` (g by the bias gradient), the features' derivative is ``P G / m +
    dZ W`` with ``dP = (V G^T + g) / m`` and ``dZ = S * (dP - <S, dP>)``.

    Parameters
    ----------
    features : Tensor, shape [k, m, d]
        Federated features of k of the C classes.
    classes : sequence of int
        Which classes these are.
    target : tuple of Tensor or None, shapes [k, C, d] and [k, C]
        Their mean weight and bias gradients; None leaves the matching term out.
    objective : Objective
        Classifier and prototypes.

    Returns
    -------
    Tensor, shape [k, m, d]
    """
    return _Descent(features, classes, target, objective).gradient(features)


class _Descent:
    """The derivative for fixed classes and targets: what steps share is made once.

    Tensors are laid out with the C classes first, [C, k, m]: sums over classes then
    run along memory whatever C is.
    """

    def __init__(
        self,
        features: torch.Tensor,
        classes: Sequence[int],
        target: tuple[torch.Tensor, torch.Tensor] | None,
        objective: Objective,
    ) -> None:
        num_classes = len(objective.weight)
        per_class = features.shape[1]
        self.num_classes = num_classes
        self.own = (
            torch.tensor(classes, dtype=torch.int64, device=features.device),
            torch.arange(len(classes), device=features.device),
        )
        self.bias = objective.bias[:, None, None]
        self.target = target
        matrices = []
        if target is not None:
            self.target_norms = [torch.linalg.vector_norm(b, dim=-1) for b in target]
            matrices.append(objective.weight)
        self.contrasts = objective.contrasts
        if objective.text_features is not None and self.contrasts:
            matrices.append(objective.text_features / objective.temperature)
            self.scale = objective.contrast_weight / (num_classes * per_class)
            self.log_multiplicity = _log_multiplicity(
                classes, num_classes, per_class, features
            )
        # One product with classifier and prototypes stacked is faster than two.
        self.matrix = torch.cat(matrices) if matrices else None

    def gradient(self, features: torch.Tensor) -> torch.Tensor:
        """Return the derivative at features [k, m, d], same shape."""
        if self.matrix is None:
            return torch.zeros_like(features)
        flat = features.flatten(0, 1)
        logits = (self.matrix @ flat.T).unflatten(1, features.shape[:2])
        derivative = None
        if self.target is not None:
            matching = logits[: self.num_classes]
            derivative = self._matching(features, self.target, matching)
        if self.contrasts:
            contrast = logits[-self.num_classes :]
            share = torch.softmax(contrast + self.log_multiplicity, dim=0)
            share[self.own] -= 1
            torch.mul(share, self.scale, out=contrast)
        through_logits = logits.flatten(1).T
        if derivative is None:
            return torch.mm(through_logits, self.matrix).view_as(features)
        derivative.flatten(0, 1).addmm_(through_logits, self.matrix)
        return derivative

    def _matching(
        self,
        features: torch.Tensor,
        target: tuple[torch.Tensor, torch.Tensor],
        logits: torch.Tensor,
    ) -> torch.Tensor:
        """Return ``P G / m`` [k, m, d]; write dZ over the logits [C, k, m]."""
        per_class = features.shape[1]
        softmax = torch.softmax(logits + self.bias, dim=0)
        residual = softmax.clone()
        residual[self.own] -= 1
        by_class = residual.transpose(0, 1)
        weight_gradient = torch.bmm(by_class, features).div_(per_class)
        outer = _distance_derivative(weight_gradient, target[0], self.target_norms[0])
        outer /= per_class
        outer_bias = _distance_derivative(
            residual.mean(dim=2).T, target[1], self.target_norms[1]
        )
        outer_bias /= per_class
        d_residual = torch.baddbmm(
            outer_bias[:, :, None], outer, features.transpose(1, 2)
        ).transpose(0, 1)
        inner = (softmax * d_residual).sum(dim=0)
        torch.mul(softmax, d_residual - inner, out=logits)
        return torch.bmm(by_class.transpose(1, 2), outer)


def stack_gradients(
    gradients: Mapping[int, CodedGradient],
    classes: Sequence[int],
    like: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack the gradients of some classes.

    Parameters
    ----------
    gradients : mapping of int to ClassGradient or LowRankGradient
        Class gradients.
    classes : sequence of int
        Which k of them, at least one.
    like : Tensor
        Gives device and type.

    Returns
    -------
    tuple of Tensor
        Weight gradients [k, C, d] and bias gradients [k, C].
    """
    return (
        torch.stack([gradients[c].weight.to(like) for c in classes]),
        torch.stack([gradients[c].bias.to(like) for c in classes]),
    )


@torch.no_grad()
def synthesize(
    features: torch.Tensor,
    gradients: Mapping[int, CodedGradient],
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

    On a CPU each of torch's threads treats other classes; the result does not depend
    on their number.

    Parameters
    ----------
    features : Tensor, shape [C, m, d]
        Federated features of the round before (standard normal at first); not
        changed.
    gradients : mapping of int to ClassGradient or LowRankGradient
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
    objective = Objective(weight, bias, text_features, contrast_weight, temperature)
    num_classes, _, dim = features.shape
    result = features.clone()

    def descend(chunk: Sequence[int]) -> None:
        held = chunk[0] in gradients
        target = stack_gradients(gradients, chunk, features) if held else None
        current = features[list(chunk)]
        descent = _Descent(current, chunk, target, objective)
        for _ in range(steps):
            current.sub_(descent.gradient(current), alpha=learning_rate)
        result[list(chunk)] = current

    absent = [c for c in range(num_classes) if c not in gradients]
    chunks = [
        *class_chunks(sorted(gradients), num_classes, dim, features.device),
        *class_chunks(absent, num_classes, dim, features.device),
    ]
    deque(map_pieces(descend, chunks, features.device), maxlen=0)
    return result
