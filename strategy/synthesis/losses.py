"""Losses of the federated features: gradient matching and prototype contrast.

CReFF (Shang et al. 2022, Eq. 5-7) finds m features for every class whose classifier
gradient matches the clients' mean. CLIP2FL (Shi et al. 2024, Eq. 9-10) also pulls them
towards CLIP's text prototypes.

Where the paper and the released code differ, this follows the released code: rows of
the weight gradient are summed, not averaged; the bias gradient takes part; and the
contrastive denominator runs over the prototypes of all C * m features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from clip2fl_common.class_gradients import CodedGradient
from strategy.synthesis.target import GradientTarget

# Added to the product of norms in the cosine, as in the released code.
COSINE_EPSILON = 1e-6

# Bytes of target gradients treated at once. A CPU's cache holds 4 MiB of them with all
# values computed from them; a GPU needs large products. Ten classes are enough for
# large products on a CPU and leave classes for the other cores. The chunks do not
# depend on the number of threads, so the result does not either.
CPU_CHUNK_BYTES = 4 * 2**20
CPU_CHUNK_CLASSES = 10
CUDA_CHUNK_BYTES = 2**30


def class_chunks(
    classes: Sequence[int], num_classes: int, dim: int, device: torch.device
) -> list[list[int]]:
    """Divide classes into groups that are processed at once.

    Parameters
    ----------
    classes : sequence of int
        Classes to divide; their order is kept.
    num_classes, dim : int
        C and d: a class gradient holds C * d numbers.
    device : torch.device
        Device on which they are processed.

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
    over all features. Needs [C, m] memory for one class at a time, where the released
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
        weighted = logits + log_multiplicity(chunk, num_classes, per_class, features)
        total = total + weighted.logsumexp(dim=0).sum()
        total = total - logits[own].diagonal(dim1=0, dim2=1).sum()
    return total / (num_classes * per_class)


def log_multiplicity(
    classes: Sequence[int], num_classes: int, per_class: int, like: torch.Tensor
) -> torch.Tensor:
    """Return the log of how often each prototype counts, shape [C, k, 1].

    The released code computes the [C*m, C*m] similarities between features and their
    prototypes. Each prototype fills m columns. One column, the feature's own, is left
    out of the denominator. So every other class counts m times and the feature's own
    class m - 1 times.
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
        Bias of that classifier.

    Returns
    -------
    Tensor, scalar
    """
    num_classes, per_class, dim = features.shape
    total = features.new_zeros(())
    for chunk in class_chunks(list(gradients), num_classes, dim, features.device):
        target = GradientTarget.stack(gradients, chunk, features)
        held = features[chunk]
        residual = torch.softmax(held @ weight.T + bias, dim=2)
        own = torch.zeros_like(residual)
        own[range(len(chunk)), :, chunk] = 1
        residual = residual - own
        weight_gradient = residual.transpose(1, 2) @ held / per_class
        total = total + (1 - _cosine(weight_gradient, target.weight)).sum()
        total = total + (1 - _cosine(residual.mean(dim=1), target.bias)).sum()
    return total


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return cos(a, b) along the last axis."""
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    cosine: torch.Tensor = (a * b).sum(-1) / (norms + COSINE_EPSILON)
    return cosine


def distance_derivative(
    product: torch.Tensor, norm_a: torch.Tensor, norm_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors x and y of the derivative ``x a + y b`` of ``1 - cos(a, b)`` by a.

    All three arguments have one shape: the inner products of a and b, and the norms.
    """
    norms = norm_a * norm_b + COSINE_EPSILON
    # At a = 0 the norm has no derivative; like automatic differentiation, return 0.
    along_a = product * norm_b / norms.square()
    along_a /= norm_a.clamp_min(torch.finfo(norm_a.dtype).tiny)
    return along_a, -1 / norms


@dataclass(frozen=True)
class Objective:
    """The classifier and prototypes that enter the losses of the federated features.

    Attributes
    ----------
    weight : Tensor, shape [C, d]
        The classifier at which the clients took their gradients.
    bias : Tensor, shape [C]
        Bias of that classifier.
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
        """Return whether the contrastive term changes the features."""
        return self.text_features is not None and self.contrast_weight > 0

    def rows(self, matching: bool) -> torch.Tensor:
        """Return the rows that features are multiplied with, shape [0, C or 2 C, d].

        The classifier (for the matching term) and the prototypes over tau (for the
        contrastive term) are stacked, since one product is faster than two.
        """
        matrices = [self.weight] if matching else [self.weight[:0]]
        if self.text_features is not None and self.contrasts:
            matrices.append(self.text_features / self.temperature)
        return torch.cat(matrices)
