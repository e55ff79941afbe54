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
from strategy.gradient_target import GradientTarget
from strategy.subspace import SharedRows, Subspace

__all__ = [
    "ClassGradient",
    "Objective",
    "class_chunks",
    "gradient_matching_loss",
    "mean_class_gradients",
    "prototype_contrastive_loss",
    "synthesis_gradient",
    "synthesize",
]

# Added to the product of norms in the cosine, as in the released code.
COSINE_EPSILON = 1e-6

# Target gradients of the classes treated at once. A processor's cache holds 4 MiB of
# them with all that is computed from them; a GPU wants large products. Ten classes are
# enough for large products on a CPU and leave some for other cores. None of it depends
# on the number of threads, and so neither does the result.
CPU_CHUNK_BYTES = 4 * 2**20
CPU_CHUNK_CLASSES = 10
CUDA_CHUNK_BYTES = 2**30

# A multiplication in a factorisation over one in a product, in time: measured.
FACTORISATION_COST = 3


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


def _distance_derivative(
    product: torch.Tensor, norm_a: torch.Tensor, norm_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors x and y of the derivative ``x a + y b`` of ``1 - cos(a, b)`` by a.

    All three arguments have one shape: the inner products of a and b, and the norms.
    """
    norms = norm_a * norm_b + COSINE_EPSILON
    # At a = 0 the norm has no derivative; automatic differentiation returns 0 too.
    along_a = product * norm_b / norms.square()
    along_a /= norm_a.clamp_min(torch.finfo(norm_a.dtype).tiny)
    return along_a, -1 / norms


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

    def rows(self, matching: bool) -> torch.Tensor:
        """Return what features are multiplied with, shape [0, C or 2 C, d].

        Classifier (for the matching term) and prototypes over tau (for the contrastive
        one) are stacked: one product is faster than two.
        """
        matrices = [self.weight] if matching else [self.weight[:0]]
        if self.text_features is not None and self.contrasts:
            matrices.append(self.text_features / self.temperature)
        return torch.cat(matrices)


@torch.no_grad()
def synthesis_gradient(
    features: torch.Tensor,
    classes: Sequence[int],
    target: GradientTarget | None,
    objective: Objective,
) -> torch.Tensor:
    """Return the derivative of the synthesis objective by some classes' features.

    The objective is ``gradient_matching_loss + contrast_weight *
    prototype_contrastive_loss`` over all C classes. With S the softmax, P = S - onehot,
    and G the derivative of the matching loss by the synthetic weight gradient
    ``P^T V / m`` (g by the bias gradient), the features' derivative is ``P G / m +
    dZ W`` with ``dP = (V G^T + g) / m`` and ``dZ = S * (dP - <S, dP>)``.

    Where the real gradient T is a product of thin factors L R and C is large, G [C, d]
    is not formed. Its rows are ``x_j (P^T V / m)_j + y_j T_j``, so that norms, products
    and all of the above follow from ``V V^T`` [m, m], ``V R^T`` and L.

    Parameters
    ----------
    features : Tensor, shape [k, m, d]
        Federated features of k of the C classes.
    classes : sequence of int
        Which classes these are.
    target : GradientTarget or None
        Their mean class gradients; None leaves the matching term out.
    objective : Objective
        Classifier and prototypes.

    Returns
    -------
    Tensor, shape [k, m, d]
    """
    matrix = objective.rows(matching=target is not None)
    return _Descent(features, classes, target, objective, matrix).gradient(features)


class _Descent:
    """The derivative for fixed classes and targets: what steps share is made once.

    It is returned in an array that the next one overwrites.

    Tensors are laid out with the C classes first, [C, k, m]: sums over classes then
    run along memory whatever C is.

    Features, targets and ``matrix``, the objective's rows, may be in coordinates of
    any orthonormal basis; the matrix then has the first of them, and the others are
    zero.
    """

    def __init__(
        self,
        features: torch.Tensor,
        classes: Sequence[int],
        target: GradientTarget | None,
        objective: Objective,
        matrix: torch.Tensor,
    ) -> None:
        num_classes = len(objective.weight)
        per_class, dim = features.shape[1:]
        self.matrix = matrix
        # Large arrays cost more to get from the system than to fill.
        self.logits = features.new_empty(len(matrix), len(classes) * per_class)
        self.num_classes = num_classes
        self.own = (
            torch.tensor(classes, dtype=torch.int64, device=features.device),
            torch.arange(len(classes), device=features.device),
        )
        self.bias = objective.bias[:, None, None]
        self.target = target
        if target is not None:
            self.target_norms = target.row_norms()
            self.target_bias_norms = torch.linalg.vector_norm(target.bias, dim=-1)
            self.through_products = _products_pay(per_class, num_classes, dim, target)
            if not self.through_products:
                self.target_weight = target.weight
                self.outer = torch.empty_like(self.target_weight)
                self.product = torch.empty_like(self.target_weight)
                self.derivative = torch.empty_like(features)
        self.contrasts = objective.contrasts
        if self.contrasts:
            self.scale = objective.contrast_weight / (num_classes * per_class)
            self.log_multiplicity = _log_multiplicity(
                classes, num_classes, per_class, features
            )

    def gradient(self, features: torch.Tensor) -> torch.Tensor:
        """Return the derivative at features [k, m, d], same shape."""
        width = self.matrix.shape[1]
        flat = features.flatten(0, 1)[:, :width]
        torch.mm(self.matrix, flat.T, out=self.logits)
        logits = self.logits.unflatten(1, features.shape[:2])
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
            derivative = torch.zeros_like(features)
        derivative.flatten(0, 1)[:, :width].addmm_(through_logits, self.matrix)
        return derivative

    def _matching(
        self, features: torch.Tensor, target: GradientTarget, logits: torch.Tensor
    ) -> torch.Tensor:
        """Return ``P G / m`` [k, m, d]; write dZ over the logits [C, k, m]."""
        per_class = features.shape[1]
        softmax = torch.softmax(logits + self.bias, dim=0)
        residual = softmax.clone()
        residual[self.own] -= 1
        by_class = residual.transpose(0, 1)
        bias_gradient = residual.mean(dim=2).T
        along, towards = _distance_derivative(
            (bias_gradient * target.bias).sum(-1, keepdim=True),
            torch.linalg.vector_norm(bias_gradient, dim=-1, keepdim=True),
            self.target_bias_norms[:, None],
        )
        outer_bias = (bias_gradient * along).addcmul_(target.bias, towards)
        outer_bias /= per_class
        through = self._by_products if self.through_products else self._by_rows
        derivative, d_residual = through(features, target, by_class, outer_bias)
        d_residual = d_residual.transpose(0, 1)
        inner = (softmax * d_residual).sum(dim=0)
        torch.mul(softmax, d_residual - inner, out=logits)
        return derivative

    def _by_rows(
        self,
        features: torch.Tensor,
        target: GradientTarget,
        residual: torch.Tensor,
        outer_bias: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``P G / m`` [k, m, d] and dP [k, C, m], forming G [k, C, d]."""
        per_class = features.shape[1]
        outer = torch.bmm(residual, features, out=self.outer).div_(per_class)
        along, towards = _distance_derivative(
            torch.mul(outer, self.target_weight, out=self.product).sum(-1),
            torch.linalg.vector_norm(outer, dim=-1),
            self.target_norms,
        )
        outer *= along.div_(per_class)[..., None]
        outer.addcmul_(self.target_weight, towards.div_(per_class)[..., None])
        d_residual = torch.baddbmm(
            outer_bias[:, :, None], outer, features.transpose(1, 2)
        )
        derivative = torch.bmm(residual.transpose(1, 2), outer, out=self.derivative)
        return derivative, d_residual

    def _by_products(
        self,
        features: torch.Tensor,
        target: GradientTarget,
        residual: torch.Tensor,
        outer_bias: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same from inner products, without anything of the shape of G."""
        per_class = features.shape[1]
        left, right = target.left, target.right
        assert right is not None
        residual = residual.contiguous()
        among_features = torch.bmm(features, features.transpose(1, 2)).div_(per_class)
        # Rows of the synthetic and of the real gradient, times every feature.
        synthetic = torch.bmm(residual, among_features)
        real = torch.bmm(left, torch.bmm(right, features.transpose(1, 2)))
        squared_norms = (synthetic * residual).sum(-1).clamp_min_(0) / per_class
        along, towards = _distance_derivative(
            (real * residual).sum(-1).div_(per_class),
            squared_norms.sqrt_(),
            self.target_norms,
        )
        along, towards = (
            factor.div_(per_class)[..., None] for factor in (along, towards)
        )
        weighted = (residual * along).transpose(1, 2)
        mixed = torch.bmm(weighted, residual).div_(per_class)
        pulled = torch.bmm((residual * towards).transpose(1, 2), left)
        derivative = torch.bmm(pulled, right)
        derivative.baddbmm_(mixed, features)
        d_residual = synthetic.mul_(along).addcmul_(real, towards)
        d_residual += outer_bias[:, :, None]
        return derivative, d_residual


def _products_pay(
    per_class: int, num_classes: int, dim: int, target: GradientTarget
) -> bool:
    """Whether inner products with factors take fewer multiplications than rows of G.

    On dense targets they would save few, and were measured not to pay at C = 1000.
    """
    if target.right is None:
        return False
    by_products = 2 * (per_class + target.rank) * (num_classes + dim)
    return by_products < 3 * num_classes * dim


def _subspace_pays(
    features: torch.Tensor, target: GradientTarget, shared: int, steps: int
) -> bool:
    """Whether coordinates in a `Subspace` save more than making them costs.

    In multiplications for one class; those of a factorisation take longer than those
    of a product.
    """
    per_class, dim = features.shape[1:]
    own = per_class + target.rows.shape[1]
    reduced = shared + own
    if features.device.type != "cpu" or reduced >= dim:
        return False
    step = 2 * shared * (dim - shared) + 3 * len(target.bias[0]) * (dim - reduced)
    making = own * (2 * shared * dim + own * (dim - shared))
    restoring = per_class * 2 * dim * reduced
    return steps * per_class * step > FACTORISATION_COST * (making + restoring)


def _descended(
    descent: _Descent, features: torch.Tensor, steps: int, learning_rate: float
) -> torch.Tensor:
    """Take all steps, in place."""
    for _ in range(steps):
        features.sub_(descent.gradient(features), alpha=learning_rate)
    return features


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
    rows = objective.rows(matching=True)
    shared = SharedRows.of(rows) if len(rows) < dim else None

    def descend(chunk: Sequence[int]) -> None:
        current = features[list(chunk)]
        if chunk[0] not in gradients:
            matrix = objective.rows(matching=False)
            descent = _Descent(current, chunk, None, objective, matrix)
            result[list(chunk)] = _descended(descent, current, steps, learning_rate)
            return
        target = GradientTarget.stack(gradients, chunk, features)
        if shared is None or not _subspace_pays(current, target, len(rows), steps):
            descent = _Descent(current, chunk, target, objective, rows)
            result[list(chunk)] = _descended(descent, current, steps, learning_rate)
            return
        spanning = target.rows.shape[1]
        subspace = Subspace(shared, torch.cat([target.rows, current], dim=1))
        target = target.with_rows(subspace.coordinates[:, :spanning].contiguous())
        current = subspace.coordinates[:, spanning:].contiguous()
        descent = _Descent(current, chunk, target, objective, shared.coordinates)
        result[list(chunk)] = subspace.out_of(
            _descended(descent, current, steps, learning_rate)
        )

    absent = [c for c in range(num_classes) if c not in gradients]
    chunks = [
        *class_chunks(sorted(gradients), num_classes, dim, features.device),
        *class_chunks(absent, num_classes, dim, features.device),
    ]
    deque(map_pieces(descend, chunks, features.device), maxlen=0)
    return result
