"""Low-rank coding keeps its bound at the smallest rank, for any gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_common.class_gradients import (
    ClassGradient,
    CodedGradient,
    LowRankGradient,
    Precision,
    encode_gradients,
    encoded_bytes,
    max_rank,
    row_cosines,
)

# Cosines are computed in float32, by the code and, in another order, here.
ROUNDING = 1e-6


def random_weight(
    shape: tuple[int, int], *, rank: int, noise: float, seed: int
) -> torch.Tensor:
    """Return a matrix of some rank plus noise, its rows of very different norms."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    left = torch.randn(rows, rank, generator=generator)
    right = torch.randn(rank, columns, generator=generator)
    disturbance = noise * torch.randn(shape, generator=generator)
    norms = 10 ** torch.empty(rows, 1).uniform_(-3, 3, generator=generator)
    return norms * (left @ right + disturbance)


def with_decay(shape: tuple[int, int], decay: float, seed: int) -> torch.Tensor:
    """Return a matrix whose singular values fall by a factor from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    size = min(shape)
    left = torch.randn(rows, size, generator=generator) * decay ** torch.arange(size)
    square = torch.randn(columns, columns, generator=generator)
    directions: torch.Tensor = torch.linalg.qr(square).Q
    return left @ directions[:size]


def encode(
    weight: torch.Tensor, min_cosine: float, precision: Precision = "half"
) -> CodedGradient:
    """Return the encoded gradient of one class."""
    gradient = ClassGradient(weight, torch.linspace(-1, 1, len(weight)))
    return encode_gradients({3: gradient}, min_cosine=min_cosine, precision=precision)[
        3
    ]


def rank_of(gradient: CodedGradient) -> int:
    """Return the rank; 0 means dense."""
    return gradient.rank if isinstance(gradient, LowRankGradient) else 0


def slow_cosines(exact: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """Return the cosines of all rows that are not zero, in double precision."""
    return torch.stack(
        [
            torch.dot(a, b) / (a.norm() * b.norm())
            for a, b in zip(exact.double(), decoded.double(), strict=True)
            if a.norm() > 0
        ]
    )


def slow_rank(weight: torch.Tensor, min_cosine: float) -> int:
    """Try one rank after the other, with a full SVD in double precision."""
    exact = weight.double()
    norms = exact.norm(dim=1, keepdim=True)
    unit = exact / norms
    vectors = torch.linalg.svd(unit, full_matrices=False).Vh
    for rank in range(1, max_rank(*weight.shape) + 1):
        decoded = norms * (unit @ vectors[:rank].T @ vectors[:rank])
        if slow_cosines(exact, decoded).min() >= min_cosine:
            return rank
    return 0


@given(
    rows=st.integers(2, 90),
    columns=st.integers(2, 90),
    rank=st.integers(1, 8),
    noise=st.sampled_from([0.0, 0.01, 0.3, 3.0]),
    min_cosine=st.sampled_from([0.5, 0.9, 0.99, 0.999]),
    precision=st.sampled_from(["half", "full"]),
    seed=st.integers(0, 1000),
)
def test_worst_row_keeps_the_bound(
    rows: int,
    columns: int,
    rank: int,
    noise: float,
    min_cosine: float,
    precision: Precision,
    seed: int,
) -> None:
    """The bound holds for any shape; low rank is chosen only if it is smaller."""
    weight = random_weight((rows, columns), rank=rank, noise=noise, seed=seed)
    coded = encode(weight, min_cosine, precision)
    assert slow_cosines(weight, coded.weight).min() >= min_cosine - ROUNDING
    assert rank_of(coded) <= max_rank(rows, columns)
    dense = encode(weight, 1.0, precision)
    if rank_of(coded):
        assert encoded_bytes([coded], precision) < encoded_bytes([dense], precision)
    else:
        assert torch.equal(coded.weight, dense.weight)


@given(
    shape=st.sampled_from([(10, 64), (60, 40), (100, 80), (300, 128)]),
    decay=st.sampled_from([0.5, 0.8, 0.95]),
    min_cosine=st.sampled_from([0.9, 0.99]),
    seed=st.integers(0, 1000),
)
def test_rank_is_the_smallest(
    shape: tuple[int, int], decay: float, min_cosine: float, seed: int
) -> None:
    """The rank is the smallest even if it comes from a sketch, not from a full SVD."""
    weight = with_decay(shape, decay, seed)
    assert rank_of(encode(weight, min_cosine, "full")) == slow_rank(weight, min_cosine)


def test_low_rank_is_found_exactly() -> None:
    """The rank is the number of noise-free directions, in both precisions."""
    weight = random_weight((200, 150), rank=3, noise=0.0, seed=0)
    for precision in ("half", "full"):
        coded = encode(weight, 0.9999, precision)
        assert isinstance(coded, LowRankGradient)
        assert coded.rank == 3
        assert coded.left.shape == (200, 3)
        assert coded.right.shape == (3, 150)


def test_full_rank_stays_dense() -> None:
    """The factors would be larger than the dense form, whose values are rounded."""
    weight = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    coded = encode(weight, 0.99)
    assert isinstance(coded, ClassGradient)
    assert torch.equal(coded.weight, weight.bfloat16().float())


def test_zero_rows_decode_to_zero_and_do_not_count() -> None:
    weight = random_weight((30, 40), rank=2, noise=0.0, seed=1)
    weight[[0, 7, 29]] = 0
    coded = encode(weight, 0.999)
    assert rank_of(coded) == 2
    assert not coded.weight[[0, 7, 29]].any()
    assert len(row_cosines(weight, coded.weight)) == 27
    assert slow_cosines(weight, coded.weight).min() >= 0.999 - ROUNDING


@pytest.mark.parametrize("shape", [(30, 40), (200, 100)])
def test_zero_gradient_takes_one_rank(shape: tuple[int, int]) -> None:
    coded = encode(torch.zeros(shape), 0.99)
    assert rank_of(coded) == 1
    assert torch.equal(coded.weight, torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 512), (10, 1), (2, 2)])
def test_shapes_without_a_smaller_code_stay_dense(shape: tuple[int, int]) -> None:
    """A single row or column has no smaller factors."""
    assert max_rank(*shape) == 0
    weight = torch.ones(shape)
    assert torch.equal(encode(weight, 0.9).weight, weight)
    assert rank_of(encode(weight, 0.9)) == 0


@pytest.mark.parametrize("exponent", [-100, -66, 66, 110])
@pytest.mark.parametrize("precision", ["half", "full"])
def test_magnitude_changes_nothing(exponent: int, precision: Precision) -> None:
    """From 1e-30 to 1e33: squares of these rows are outside float32's range."""
    scale = 2.0**exponent
    weight = with_decay((100, 80), 0.8, seed=2)
    expected = encode(weight, 0.99, precision)
    coded = encode(scale * weight, 0.99, precision)
    assert rank_of(coded) == rank_of(expected) > 0
    assert slow_cosines(scale * weight, coded.weight).min() >= 0.99 - ROUNDING
    torch.testing.assert_close(coded.weight / scale, expected.weight, rtol=0, atol=1e-6)


def test_negligible_rows_count_as_zero() -> None:
    """A row below the normal numbers of float32 does not increase the rank."""
    weight = random_weight((30, 40), rank=2, noise=0.0, seed=3)
    weight[4] = 1e-40 * torch.randn(40, generator=torch.Generator().manual_seed(3))
    coded = encode(weight, 0.999)
    assert rank_of(coded) == 2
    assert not coded.weight[4].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_for_the_server_to_refuse(bad: float) -> None:
    weight = random_weight((30, 40), rank=2, noise=0.0, seed=4)
    weight[1, 2] = bad
    coded = encode(weight, 0.9)
    assert isinstance(coded, ClassGradient)
    assert not torch.isfinite(coded.weight).all()


def test_a_bound_beyond_the_precision_ends_dense() -> None:
    """bfloat16 factors rotate a row by about 1e-6; float32 factors do not."""
    weight = random_weight((200, 150), rank=3, noise=0.0, seed=5)
    assert rank_of(encode(weight, 0.9999999, "half")) == 0
    assert rank_of(encode(weight, 0.999999, "full")) == 3


@pytest.mark.parametrize("precision", ["half", "full"])
def test_without_coding_all_classes_stay_dense(precision: Precision) -> None:
    weight = random_weight((20, 30), rank=1, noise=0.0, seed=6)
    gradient = ClassGradient(weight, weight[:, 0])
    coded = encode_gradients({5: gradient}, min_cosine=1.0, precision=precision)
    assert list(coded) == [5]
    expected = [
        tensor if precision == "full" else tensor.bfloat16().float()
        for tensor in gradient
    ]
    assert isinstance(coded[5], ClassGradient)
    assert torch.equal(coded[5].weight, expected[0])
    assert torch.equal(coded[5].bias, expected[1])


def test_factors_are_values_of_the_precision() -> None:
    """The client checks exactly the values that the server decodes."""
    coded = encode(with_decay((100, 80), 0.8, seed=7), 0.99, "half")
    assert isinstance(coded, LowRankGradient)
    for tensor in (coded.left, coded.right, coded.bias):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensor.bfloat16().float())
    assert torch.equal(coded.weight, coded.left @ coded.right)


def test_torchs_generator_is_neither_read_nor_moved() -> None:
    weight = with_decay((200, 100), 0.8, seed=8)
    codes = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        codes.append(encode(weight, 0.99).weight)
        assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(*codes)


def test_bytes_are_counted_by_hand() -> None:
    """Class and rank take 8 bytes each; [4, 6] has 20 values at rank 2, 24 if dense."""
    bias = torch.zeros(4)
    dense = ClassGradient(torch.zeros(4, 6), bias)
    low_rank = LowRankGradient(torch.zeros(4, 2), torch.zeros(2, 6), bias)
    assert encoded_bytes([dense], "full") == 16 + 4 * (24 + 4)
    assert encoded_bytes([low_rank], "half") == 16 + 2 * (20 + 4)
    assert encoded_bytes([dense, low_rank], "half") == 32 + 2 * (28 + 24)
