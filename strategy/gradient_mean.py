"""Mean of class gradients over clients, one client at a time, low-rank if smaller."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch

from clip2fl_common.class_gradients import (
    ClassGradient,
    CodedGradient,
    LowRankGradient,
    max_rank,
)


def mean_class_gradients(
    replies: Iterable[Mapping[int, CodedGradient]],
) -> Mapping[int, CodedGradient]:
    """Average each class's gradient over the clients that hold the class.

    The mean is not weighted by class counts, so that clients need not send them. The
    sum of low-rank gradients is exact: their factors are put side by side, as long as
    these are smaller than the dense sum.

    Parameters
    ----------
    replies : iterable of mapping from class to ClassGradient or LowRankGradient
        One mapping per client. They are read one at a time, and none is kept.

    Returns
    -------
    mapping of int to ClassGradient or LowRankGradient
        In ascending order of class.
    """
    sums: defaultdict[int, _ClassSum] = defaultdict(_ClassSum)
    for reply in replies:
        for c, gradient in reply.items():
            sums[c].add(gradient)
    return {c: total.mean() for c, total in sorted(sums.items())}


class _ClassSum:
    """Sum of one class's gradients, kept as stacked factors or dense."""

    def __init__(self) -> None:
        self._count = 0
        self._bias: torch.Tensor | float = 0.0
        self._lefts: list[torch.Tensor] = []
        self._rights: list[torch.Tensor] = []
        self._dense: torch.Tensor | None = None

    def add(self, gradient: CodedGradient) -> None:
        """Add one client's gradient, without keeping any of its tensors."""
        self._count += 1
        self._bias = self._bias + gradient.bias
        if self._dense is None and isinstance(gradient, LowRankGradient):
            # Clone, since the classes of a reply share its arrays.
            self._lefts.append(gradient.left.clone())
            self._rights.append(gradient.right.clone())
            rank = sum(map(len, self._rights))
            if rank > max_rank(len(gradient.left), gradient.right.shape[1]):
                self._dense = self._product()
        elif self._dense is None:
            # Adding 0 copies the tensor, which the reply still owns.
            self._dense = gradient.weight + (self._product() if self._lefts else 0)
        else:
            self._dense += gradient.weight

    def mean(self) -> CodedGradient:
        """Return the sum divided by the number of gradients added."""
        assert isinstance(self._bias, torch.Tensor)
        bias = self._bias / self._count
        if self._dense is not None:
            return ClassGradient(self._dense / self._count, bias)
        left = torch.cat(self._lefts, dim=1) / self._count
        return LowRankGradient(left, torch.cat(self._rights), bias)

    def _product(self) -> torch.Tensor:
        product = torch.cat(self._lefts, dim=1) @ torch.cat(self._rights)
        self._lefts.clear()
        self._rights.clear()
        return product
