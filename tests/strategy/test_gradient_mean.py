"""Test that the mean of low-rank gradients equals the dense mean, and is no larger."""

import gc
import weakref
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_common.class_gradients import (
    ClassGradient,
    CodedGradient,
    LowRankGradient,
    encode_gradients,
    max_rank,
    row_cosines,
)
from strategy.gradient_mean import mean_class_gradients

CLASSES, DIM = 12, 20


def low_rank(rank: int, seed: int) -> LowRankGradient:
    """Return random factors."""
    generator = torch.Generator().manual_seed(seed)
    return LowRankGradient(
        torch.randn(CLASSES, rank, generator=generator),
        torch.randn(rank, DIM, generator=generator),
        torch.randn(CLASSES, generator=generator),
    )


def dense(seed: int) -> ClassGradient:
    """Return a random gradient."""
    generator = torch.Generator().manual_seed(seed)
    return ClassGradient(
        torch.randn(CLASSES, DIM, generator=generator),
        torch.randn(CLASSES, generator=generator),
    )


@given(
    ranks=st.lists(
        st.dictionaries(st.integers(0, 3), st.integers(0, 7), max_size=4),
        min_size=1,
        max_size=4,
    )
)
def test_mean_equals_the_dense_mean(ranks: list[dict[int, int]]) -> None:
    """Gradients may be dense (rank 0) or low-rank, in any mixture and order."""
    replies: list[dict[int, CodedGradient]] = [
        {
            c: low_rank(rank, 10 * k + c) if rank else dense(10 * k + c)
            for c, rank in reply.items()
        }
        for k, reply in enumerate(ranks)
    ]
    mean = mean_class_gradients(replies)
    assert list(mean) == sorted({c for reply in ranks for c in reply})
    for c, gradient in mean.items():
        held = [reply[c] for reply in replies if c in reply]
        weights = torch.stack([g.weight.double() for g in held])
        biases = torch.stack([g.bias.double() for g in held])
        torch.testing.assert_close(
            gradient.weight, weights.mean(0).float(), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(gradient.bias, biases.mean(0).float())
        held_ranks = [reply[c] for reply in ranks if c in reply]
        small = 0 not in held_ranks and sum(held_ranks) <= max_rank(CLASSES, DIM)
        assert isinstance(gradient, LowRankGradient) == small
        if isinstance(gradient, LowRankGradient):
            assert gradient.rank == sum(held_ranks)


def test_mean_of_coded_gradients_is_within_the_bound() -> None:
    """Rows of one class have nearly one direction, so their mean errs no more."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(60, 3, generator=generator) @ torch.randn(
        3, 100, generator=generator
    )
    clients = [
        {
            0: ClassGradient(
                direction + 0.1 * torch.randn(60, 100, generator=generator),
                torch.zeros(60),
            )
        }
        for _ in range(3)
    ]
    exact = mean_class_gradients(clients)[0].weight
    coded = mean_class_gradients(
        encode_gradients(client, min_cosine=0.95, precision="half")
        for client in clients
    )[0]
    assert isinstance(coded, LowRankGradient)
    assert row_cosines(exact, coded.weight).min() >= 0.95


def test_replies_are_taken_one_at_a_time_and_let_go() -> None:
    """When a reply is requested, at most the previous one is still in memory."""
    rng = np.random.default_rng(0)
    decoded: list[weakref.ref[npt.NDArray[np.float32]]] = []

    def alive() -> list[bool]:
        gc.collect()
        return [reference() is not None for reference in decoded]

    def reply(c: int) -> dict[int, CodedGradient]:
        """Return views of two arrays, as `gradients_from_arrays` does."""
        dense = rng.normal(size=(2, CLASSES, DIM)).astype(np.float32)
        factors = rng.normal(size=(4, CLASSES + DIM)).astype(np.float32)
        decoded.extend((weakref.ref(dense), weakref.ref(factors)))
        weight, both = torch.from_numpy(dense), torch.from_numpy(factors)
        bias = weight[0, :, 0]
        return {
            0: ClassGradient(weight[0], bias),
            c: ClassGradient(weight[1], bias),
            9: LowRankGradient(both[:2, :CLASSES].T, both[:2, CLASSES:], bias),
        }

    def replies() -> Iterator[dict[int, CodedGradient]]:
        for c in range(1, 5):
            assert not any(alive()[:-2])
            yield reply(c)

    mean = mean_class_gradients(replies())
    assert list(mean) == [0, 1, 2, 3, 4, 9]
    assert alive() == [False] * 8
