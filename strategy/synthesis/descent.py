"""Gradient descent on federated features, with a hand-written derivative.

The derivative needs no double back-propagation. In the objective, each class has its
own features, gradient and share of the contrastive loss, and no term joins two classes.
So all descent steps run on a few classes at a time: their data stay in the processor's
cache, no array of shape [C, C, d] is formed, and several cores work on different
classes.

On a GPU a step of few classes is shorter than the host takes to start its operations.
There it is recorded as a CUDA graph (`clip2fl_common.graphs`), which later rounds use
again if their classes and ranks have the same shapes.
"""

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from clip2fl_common.class_gradients import CodedGradient
from clip2fl_common.graphs import Capture, Kept, Replayed, capture_for
from clip2fl_common.parallel import map_pieces
from strategy.synthesis.losses import (
    Objective,
    class_chunks,
    distance_derivative,
    log_multiplicity,
)
from strategy.synthesis.subspace import SharedRows, Subspace
from strategy.synthesis.target import GradientTarget

# Measured time of a multiplication in a factorisation, relative to one in a product.
FACTORISATION_COST = 3

# Steps of larger targets keep a GPU busy for longer than the host needs to start them:
# on an H100 a step took 1.3 ms one by one and 0.15 ms in a graph at C = 10 (0.2 MB of
# targets), 1.3 and 0.7 ms at C = 100 (20 MB), but 42 ms at C = 1000 (2 GB).
RECORDED_BYTES = 64 * 2**20
# Recording costs a few steps, and the time of about twenty more to make it ready
# (expected, not measured).
LEAST_RECORDED_STEPS = 25
# Recordings in a process, each with targets and a few arrays of their size.
KEPT = 6
# Recorded steps are padded to an eighth of the classes and to multiples of this rank,
# so that most rounds have the shapes of an earlier one.
RANK_STEP = 8


@torch.no_grad()
def synthesis_gradient(
    features: torch.Tensor,
    classes: Sequence[int],
    target: GradientTarget | None,
    objective: Objective,
) -> torch.Tensor:
    """Return the derivative of the synthesis objective by the features of some classes.

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
        The k classes.
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
    """The derivative for fixed classes and targets; steps share what is computed once.

    Each call overwrites the array that the call before returned.

    Tensors have the C classes first, [C, k, m], so that sums over classes run along
    memory for any C.

    Features, targets and ``matrix`` (the rows of the objective) may be coordinates in
    any orthonormal basis. The matrix then holds the first coordinates only; its others
    are zero.
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
        # Allocated once: allocating a large array takes longer than filling it.
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
            self.log_multiplicity = log_multiplicity(
                classes, num_classes, per_class, features
            )

    def kind(self) -> tuple[object, ...]:
        """Return what two descents have in common if one can take the other's values.

        That are all numbers of the host, and the shapes of `operands`.
        """
        numbers = {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, bool | int | float)
        }
        shapes = ((t.shape, t.dtype, t.device) for t in self.operands())
        return (*numbers.items(), self.target is None, *shapes)

    def operands(self) -> list[torch.Tensor]:
        """Return all tensors that `gradient` reads and does not write."""
        found = [self.matrix, self.bias, *self.own]
        if self.target is not None:
            target = self.target
            found += [target.left, target.bias, self.target_norms]
            found.append(self.target_bias_norms)
            if target.right is not None:
                found.append(target.right)
            if not self.through_products:
                found.append(self.target_weight)
        if self.contrasts:
            found.append(self.log_multiplicity)
        return found

    def gradient(self, features: torch.Tensor) -> torch.Tensor:
        """Return the derivative at features [k, m, d], in the same shape."""
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
        along, towards = distance_derivative(
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
        along, towards = distance_derivative(
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
        """Return the same as `_by_rows` from inner products, without forming G."""
        per_class = features.shape[1]
        left, right = target.left, target.right
        assert right is not None
        residual = residual.contiguous()
        among_features = torch.bmm(features, features.transpose(1, 2)).div_(per_class)
        # Rows of the synthetic and the real gradient, multiplied with every feature.
        synthetic = torch.bmm(residual, among_features)
        real = torch.bmm(left, torch.bmm(right, features.transpose(1, 2)))
        squared_norms = (synthetic * residual).sum(-1).clamp_min_(0) / per_class
        along, towards = distance_derivative(
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
    """Return whether inner products with factors need fewer multiplications than G.

    For dense targets they save few multiplications; at C = 1000 they were slower.
    """
    if target.right is None:
        return False
    by_products = 2 * (per_class + target.rank) * (num_classes + dim)
    return by_products < 3 * num_classes * dim


def _subspace_pays(
    features: torch.Tensor, target: GradientTarget, shared: int, steps: int
) -> bool:
    """Return whether coordinates in a `Subspace` save more time than they cost.

    Both are counted in multiplications for one class; a multiplication in a
    factorisation takes longer than one in a product.
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
    descent: _Descent,
    features: torch.Tensor,
    steps: int,
    learning_rate: float,
    capture: Capture | None,
) -> torch.Tensor:
    """Take all descent steps, maybe in place, and return the features."""
    if capture is not None:
        recorded = _recorded.of(
            (descent.kind(), features.shape, capture),
            lambda: _RecordedDescent(descent, features, capture),
        )
        return recorded.descended(descent, features, steps, learning_rate)
    for _ in range(steps):
        features.sub_(descent.gradient(features), alpha=learning_rate)
    return features


def _descend(
    descent: _Descent, features: torch.Tensor, learning_rate: torch.Tensor
) -> None:
    """Take a step in place; the step size is a scalar tensor."""
    features.addcmul_(descent.gradient(features), learning_rate, value=-1)


class _RecordedDescent:
    """Steps of one shape, on copies of features and targets at fixed addresses.

    The step size may change from round to round, so it is an operand too.
    """

    def __init__(
        self, descent: _Descent, features: torch.Tensor, capture: Capture
    ) -> None:
        # Deep: later rounds write to what the copy reads.
        self._descent = copy.deepcopy(descent)
        self._features = features.clone()
        self._learning_rate = features.new_zeros(())
        # Without this object in it: the recording is freed as soon as nobody uses it.
        step = partial(_descend, self._descent, self._features, self._learning_rate)
        self._take = Replayed(step, [self._features], capture, "the synthesis")

    def descended(
        self,
        descent: _Descent,
        features: torch.Tensor,
        steps: int,
        learning_rate: float,
    ) -> torch.Tensor:
        """Return new features after steps with the values of another descent."""
        self._features.copy_(features)
        self._learning_rate.fill_(learning_rate)
        theirs = descent.operands()
        for own, given in zip(self._descent.operands(), theirs, strict=True):
            own.copy_(given)
        for _ in range(steps):
            self._take()
        return self._features.clone()


_recorded: Kept[_RecordedDescent] = Kept(KEPT)


def recording_pays(steps: int, num_classes: int, dim: int, classes: int) -> bool:
    """Return whether a GPU's steps are recorded: if they are many and small.

    Parameters
    ----------
    steps : int
        Number of steps in a round.
    num_classes, dim, classes : int
        C, d and the number of classes k that are treated at once: their dense
        gradients hold k * C * d numbers.
    """
    small = 4 * classes * num_classes * dim <= RECORDED_BYTES
    return small and steps >= LEAST_RECORDED_STEPS


def _padded(chunk: Sequence[int], num_classes: int) -> list[int]:
    """Return classes with the last one repeated, up to a multiple of an eighth of C."""
    step = -(-num_classes // 8)
    return [*chunk, *[chunk[-1]] * (-len(chunk) % step)]


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
    capture: Capture | None = None,
) -> torch.Tensor:
    """Return the federated features after plain gradient descent.

    On a CPU each of torch's threads works on other classes. The result does not depend
    on the number of threads.

    Parameters
    ----------
    features : Tensor, shape [C, m, d]
        Federated features of the previous round (standard normal in round 1); not
        changed.
    gradients : mapping of int to ClassGradient or LowRankGradient
        Mean class gradient of every class that a client holds in this round.
    weight : Tensor, shape [C, d]
        The classifier at which the clients took their gradients.
    bias : Tensor, shape [C]
        Bias of that classifier.
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
    capture : Capture or None
        How steps are recorded; None: as CUDA graphs where that pays on a GPU
        (`recording_pays`), and not at all elsewhere.

    Returns
    -------
    Tensor, shape [C, m, d]
        The new federated features. A class without a gradient in this round moves
        by the contrastive term only.
    """
    objective = Objective(weight, bias, text_features, contrast_weight, temperature)
    num_classes, _, dim = features.shape
    result = features.clone()
    rows = objective.rows(matching=True)
    shared = SharedRows.of(rows) if len(rows) < dim else None

    def descend(chunk: Sequence[int]) -> None:
        recording = capture
        if recording is None and recording_pays(steps, num_classes, dim, len(chunk)):
            recording = capture_for(features.device)
        classes = chunk if recording is None else _padded(chunk, num_classes)
        current = features[list(classes)]

        def descended(
            target: GradientTarget | None, matrix: torch.Tensor, start: torch.Tensor
        ) -> torch.Tensor:
            descent = _Descent(start, classes, target, objective, matrix)
            return _descended(descent, start, steps, learning_rate, recording)

        if chunk[0] not in gradients:
            moved = descended(None, objective.rows(matching=False), current)
            result[list(chunk)] = moved[: len(chunk)]
            return
        rank_step = 1 if recording is None else RANK_STEP
        target = GradientTarget.stack(gradients, classes, features, rank_step)
        if (
            shared is None
            or recording is not None
            or not _subspace_pays(current, target, len(rows), steps)
        ):
            result[list(chunk)] = descended(target, rows, current)[: len(chunk)]
            return
        spanning = target.rows.shape[1]
        subspace = Subspace(shared, torch.cat([target.rows, current], dim=1))
        target = target.with_rows(subspace.coordinates[:, :spanning].contiguous())
        current = subspace.coordinates[:, spanning:].contiguous()
        result[list(chunk)] = subspace.out_of(
            descended(target, shared.coordinates, current)
        )

    absent = [c for c in range(num_classes) if c not in gradients]
    chunks = [
        *class_chunks(sorted(gradients), num_classes, dim, features.device),
        *class_chunks(absent, num_classes, dim, features.device),
    ]
    deque(map_pieces(descend, chunks, features.device), maxlen=0)
    return result
