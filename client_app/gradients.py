"""Class gradients in closed form (CReFF, Shang et al. 2022, Eq. 4).

For features f [n, d] of one class c and a linear classifier (W, b), the mean
cross-entropy towards c has the gradient ``P^T f / n`` with respect to W and the
mean of P's rows with respect to b, where ``P = softmax(f W^T + b) - onehot(c)``.
No automatic differentiation is needed.

A sample's own part is its row of P times (f, 1). Its norm is the norm of the row times
the norm of (f, 1), so scaling the row shortens the part (Abadi et al. 2016).
"""

import torch
from torch.nn import functional

from client_app.noise import GradientProtection
from clip2fl_common.class_gradients import (
    ClassGradient,
    CodedGradient,
    Precision,
    encode_gradients,
)

__all__ = ["ClassGradient", "class_gradients", "coded_class_gradients"]

# Bytes of dense class gradients held at once: one takes 2 MiB at C = 1000 and d = 512.
CHUNK_BYTES = 64 * 2**20


@torch.no_grad()
def class_gradients(
    features: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    max_norm: float = 0.0,
) -> dict[int, ClassGradient]:
    """Return the classifier's gradient for every class among the labels.

    Parameters
    ----------
    features : Tensor, shape [N, d]
        Features of the backbone (in evaluation mode).
    labels : Tensor of int64, shape [N]
        Class of each sample, in [0, C).
    weight : Tensor, shape [C, d]
        Weight of the classifier that the server sent.
    bias : Tensor, shape [C]
        Bias of that classifier.
    max_norm : float
        Largest Euclidean norm of a sample's part; 0 sets no bound. With a bound, a
        part that is not finite is zero: no noise can hide a NaN. All is then computed
        in double precision: in float32 a server could choose a model for which the
        square of a residual is zero, and its product with the features is not.

    Returns
    -------
    dict of int to ClassGradient
        One gradient per class held, in ascending order of class.
    """
    held, group, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    given = features.dtype
    if max_norm > 0:
        features, weight, bias = features.double(), weight.double(), bias.double()
    residual = torch.softmax(features @ weight.T + bias, dim=1)
    residual -= functional.one_hot(labels, weight.shape[0])
    if max_norm > 0:
        norms = residual.norm(dim=1) * (features.square().sum(dim=1) + 1).sqrt()
        residual *= (max_norm / norms).clamp(max=1)[:, None]
        finite = norms.isfinite()[:, None]
        residual = torch.where(finite, residual, 0)
        features = torch.where(finite, features, 0)
    # Classes hold different numbers of samples. Padded to [K, n_max, .], one batched
    # product serves all classes; the padding rows are zero and add nothing.
    order = torch.argsort(group, stable=True)
    ends = sizes.cumsum(0)
    place = (
        torch.arange(len(order), device=labels.device) - (ends - sizes)[group[order]]
    )
    padded_shape = (len(held), int(sizes.max()) if len(held) else 0)
    padded_residual = residual.new_zeros(*padded_shape, weight.shape[0])
    padded_features = features.new_zeros(*padded_shape, features.shape[1])
    padded_residual[group[order], place] = residual[order]
    padded_features[group[order], place] = features[order]
    count = sizes.to(features.dtype)
    weight_gradients = padded_residual.transpose(1, 2) @ padded_features
    weight_gradients /= count[:, None, None]
    bias_gradients = padded_residual.sum(1) / count[:, None]
    return {
        int(c): ClassGradient(
            weight_gradients[k].to(given), bias_gradients[k].to(given)
        )
        for k, c in enumerate(held)
    }


def coded_class_gradients(
    features: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    min_cosine: float,
    precision: Precision,
    protection: GradientProtection | None = None,
) -> dict[int, CodedGradient]:
    """Return the class gradients as they are uploaded, with bounded memory.

    Parameters
    ----------
    features, labels, weight, bias : Tensor
        As in `class_gradients`. A few classes are computed at a time.
    min_cosine : float
        Bound of the low-rank code (see `gradient_coding.encode_gradients`).
    precision : {"half", "full"}
        Precision of all values.
    protection : GradientProtection or None
        Bound and noise on the part of one image.

    Returns
    -------
    dict of int to ClassGradient or LowRankGradient
        One gradient per class held, in ascending order of class.
    """
    coded: dict[int, CodedGradient] = {}
    for classes in labels.unique().split(max(1, CHUNK_BYTES // weight.nbytes)):
        chosen = torch.isin(labels, classes)
        dense = class_gradients(
            features[chosen],
            labels[chosen],
            weight,
            bias,
            protection.max_norm if protection else 0.0,
        )
        if protection:
            dense = protection.with_noise(dense)
        coded |= encode_gradients(dense, min_cosine=min_cosine, precision=precision)
    return coded
