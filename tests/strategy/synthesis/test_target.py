"""Stacked targets: what stands in them, whatever the gradients' kinds."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_common.class_gradients import ClassGradient, CodedGradient, LowRankGradient
from strategy.synthesis.target import GradientTarget

CLASSES, DIM = 7, 5


@given(
    ranks=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_weights_biases_and_norms_are_the_gradients(
    ranks: list[int], dtype: torch.dtype
) -> None:
    """Low-rank (rank 0: dense) only where all are; ranks may differ."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gradients: dict[int, CodedGradient] = {
        10 + k: LowRankGradient(normal(CLASSES, r), normal(r, DIM), normal(CLASSES))
        if r
        else ClassGradient(normal(CLASSES, DIM), normal(CLASSES))
        for k, r in enumerate(ranks)
    }
    target = GradientTarget.stack(
        gradients, list(gradients), torch.empty(0, dtype=dtype)
    )
    assert (target.right is None) == (0 in ranks)
    assert target.rank == (DIM if 0 in ranks else max(ranks))
    for k, gradient in enumerate(gradients.values()):
        exact = gradient.weight.to(dtype)
        torch.testing.assert_close(target.weight[k], exact)
        torch.testing.assert_close(target.row_norms()[k], exact.norm(dim=1))
        assert torch.equal(target.bias[k], gradient.bias.to(dtype))


def test_factors_that_cancel_keep_the_norm() -> None:
    """Two clients whose gradients are opposite but for a thousandth."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(CLASSES, 1, generator=generator)
    right = torch.randn(1, DIM, generator=generator)
    opposed = LowRankGradient(
        torch.cat([left, -left * 1.001], dim=1),
        torch.cat([right, right]),
        torch.zeros(CLASSES),
    )
    target = GradientTarget.stack({0: opposed}, [0], right)
    exact = (opposed.left.double() @ opposed.right.double()).norm(dim=1)
    torch.testing.assert_close(target.row_norms()[0].double(), exact, rtol=1e-5, atol=0)
