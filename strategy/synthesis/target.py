"""Mean class gradients of a few classes as operands: dense, or low-rank factors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from clip2fl_common.class_gradients import CodedGradient, LowRankGradient


@dataclass(frozen=True)
class GradientTarget:
    """Weight gradients T [k, C, d] and bias gradients of k classes.

    Attributes
    ----------
    left : Tensor, shape [k, C, d] or [k, C, r]
        Weight gradients, or their left factors.
    right : Tensor or None, shape [k, r, d]
        Right factors; None if ``left`` holds dense gradients.
    bias : Tensor, shape [k, C]
        Bias gradients.
    """

    left: torch.Tensor
    right: torch.Tensor | None
    bias: torch.Tensor

    @classmethod
    def stack(
        cls,
        gradients: Mapping[int, CodedGradient],
        classes: Sequence[int],
        like: torch.Tensor,
        rank_step: int = 1,
    ) -> "GradientTarget":
        """Stack the gradients of some classes.

        Parameters
        ----------
        gradients : mapping of int to ClassGradient or LowRankGradient
            Class gradients.
        classes : sequence of int
            The k classes to stack, at least one.
        like : Tensor
            Gives the device and type of the result.
        rank_step : int
            The common rank of factors is padded to a multiple of it.

        Returns
        -------
        GradientTarget
            Low-rank if all of these classes are; smaller ranks are padded with zeros.
        """
        chosen = [gradients[c] for c in classes]
        bias = torch.stack([gradient.bias.to(like) for gradient in chosen])
        factors = [g for g in chosen if isinstance(g, LowRankGradient)]
        if len(factors) < len(chosen):
            weight = torch.stack([gradient.weight.to(like) for gradient in chosen])
            return cls(weight, None, bias)
        rank = max(factor.rank for factor in factors)
        rank += -rank % rank_step
        num_classes, dim = bias.shape[1], factors[0].right.shape[1]
        left = like.new_zeros(len(factors), num_classes, rank)
        right = like.new_zeros(len(factors), rank, dim)
        for k, factor in enumerate(factors):
            left[k, :, : factor.rank] = factor.left
            right[k, : factor.rank] = factor.right
        return cls(left, right, bias)

    @property
    def rows(self) -> torch.Tensor:
        """Return the rows [k, C or r, d] that the weight gradients combine."""
        return self.left if self.right is None else self.right

    def with_rows(self, rows: torch.Tensor) -> "GradientTarget":
        """Return the same combinations of other rows."""
        if self.right is None:
            return GradientTarget(rows, None, self.bias)
        return GradientTarget(self.left, rows, self.bias)

    @property
    def rank(self) -> int:
        """Return the number of directions r of the factors; d if there are none."""
        return self.left.shape[2]

    @property
    def weight(self) -> torch.Tensor:
        """Return the dense weight gradients T, shape [k, C, d]."""
        return self.left if self.right is None else torch.bmm(self.left, self.right)

    def row_norms(self) -> torch.Tensor:
        """Return the norms of T's rows, shape [k, C]."""
        if self.right is None:
            dense: torch.Tensor = torch.linalg.vector_norm(self.left, dim=-1)
            return dense
        # In double precision, since the factors of several clients may cancel out.
        left, right = self.left.double(), self.right.double()
        squared: torch.Tensor = (left @ (right @ right.mT) * left).sum(-1)
        return squared.clamp_min(0).sqrt().to(self.left.dtype)
