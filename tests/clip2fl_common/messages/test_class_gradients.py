"""Class gradients in messages: a round trip is exact, and other content is refused."""

import io
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_common import messages
from clip2fl_common.class_gradients import (
    ClassGradient,
    CodedGradient,
    LowRankGradient,
    Precision,
    encode_gradients,
    encoded_bytes,
)
from tests.defaults import run_config

CLASSES, DIM = 6, 9


def expected_format(
    precision: Precision, min_cosine: float = 0.99
) -> messages.GradientFormat:
    """Return the server's expectation; ranks up to 3 are smaller than dense."""
    upload = run_config(
        upload__precision=precision, upload__min_cosine=min_cosine
    ).upload
    return messages.GradientFormat(CLASSES, DIM, upload)


def gradients_of_rank(
    ranks: Sequence[int], precision: Precision, seed: int = 0
) -> dict[int, CodedGradient]:
    """Return classes 0, 1, ... of these ranks (0: dense), as if just encoded."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator)
        return values.bfloat16().float() if precision == "half" else values

    def rows(r: int) -> torch.Tensor:
        values: torch.Tensor = torch.linalg.qr(normal(DIM, r)).Q.T
        return values.bfloat16().float() if precision == "half" else values

    return {
        c: LowRankGradient(normal(CLASSES, r), rows(r), normal(CLASSES))
        if r
        else ClassGradient(normal(CLASSES, DIM), normal(CLASSES))
        for c, r in enumerate(ranks)
    }


def assert_same(actual: CodedGradient, expected: CodedGradient) -> None:
    """Check the kind of a gradient and each of its values."""
    assert isinstance(actual, LowRankGradient) == isinstance(expected, LowRankGradient)
    if isinstance(actual, LowRankGradient) and isinstance(expected, LowRankGradient):
        assert torch.equal(actual.left, expected.left)
        assert torch.equal(actual.right, expected.right)
    torch.testing.assert_close(actual.weight, expected.weight)
    assert torch.equal(actual.bias, expected.bias)
    assert actual.weight.dtype == actual.bias.dtype == torch.float32


@given(
    ranks=st.lists(st.integers(0, 3), min_size=1, max_size=CLASSES),
    precision=st.sampled_from(["half", "full"]),
    seed=st.integers(0, 1000),
)
def test_round_trip(ranks: list[int], precision: Precision, seed: int) -> None:
    """A round trip is exact to the last bit for any mixture; the size is as counted."""
    gradients = gradients_of_rank(ranks, precision, seed)
    arrays = messages.gradients_to_arrays(gradients, precision)
    decoded = messages.gradients_from_arrays(arrays, expected_format(precision))
    assert list(decoded) == list(gradients)
    for c, gradient in gradients.items():
        assert_same(decoded[c], gradient)
    size = sum(array.numpy().nbytes for array in arrays.values())
    assert size == encoded_bytes(gradients.values(), precision)


@pytest.mark.parametrize("precision", ["half", "full"])
def test_client_may_have_no_class_to_send(precision: Precision) -> None:
    """All classes of the client are smaller than privacy.min-class-samples."""
    expected = expected_format(precision)
    shape = (expected.num_classes, expected.feature_dim)
    arrays = messages.gradients_to_arrays({}, precision, shape)
    assert messages.gradients_from_arrays(arrays, expected) == {}


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e10])
def test_half_precision_keeps_small_and_large_values(scale: float) -> None:
    """Values keep a precision of 1 in 256: bfloat16 has the exponents of float32."""
    (gradient,) = gradients_of_rank([0], "full").values()
    scaled = ClassGradient(scale * gradient.weight, scale * gradient.bias)
    gradients: dict[int, CodedGradient] = {2: scaled}
    arrays = messages.gradients_to_arrays(gradients, "half")
    assert arrays["weight"].numpy().dtype == np.uint16
    decoded = messages.gradients_from_arrays(arrays, expected_format("half"))[2]
    for actual, exact in ((decoded.weight, scaled.weight), (decoded.bias, scaled.bias)):
        assert ((actual - exact).abs() <= exact.abs() / 256).all()


@pytest.mark.parametrize("precision", ["half", "full"])
def test_server_decodes_what_the_client_encoded(precision: Precision) -> None:
    """Decoded gradients equal encoded ones, for any order of the classes."""
    (gradient,) = gradients_of_rank([0], "full").values()
    weight, bias = gradient.weight, gradient.bias
    gradients = {
        4: ClassGradient(weight, bias),
        1: ClassGradient(torch.outer(bias, weight[0]), bias),
    }
    encoded = encode_gradients(gradients, min_cosine=0.99, precision=precision)
    arrays = messages.gradients_to_arrays(encoded, precision)
    assert arrays["ranks"].numpy().tolist() == [1, 0]
    decoded = messages.gradients_from_arrays(arrays, expected_format(precision))
    assert list(decoded) == [1, 4]
    for c in (1, 4):
        assert_same(decoded[c], encoded[c])


Damage = Callable[[ArrayRecord], None]


def put(name: str, change: Callable[[npt.NDArray[np.generic]], object]) -> Damage:
    """Return a damage that replaces an array by another one made from it."""

    def damage(arrays: ArrayRecord) -> None:
        arrays[name] = Array(np.asarray(change(arrays[name].numpy())))

    return damage


def put_bytes(name: str, data: bytes) -> Damage:
    """Return a damage that inserts an array which is falsely declared like ``bias``."""

    def damage(arrays: ArrayRecord) -> None:
        array = arrays["bias"]
        arrays[name] = Array(array.dtype, array.shape, array.stype, data)

    return damage


def put_surplus(name: str) -> Damage:
    """Return a damage that appends bytes to an array's values, which numpy ignores."""

    def damage(arrays: ArrayRecord) -> None:
        array = arrays[name]
        arrays[name] = Array(
            array.dtype, array.shape, array.stype, array.data + bytes(10_000)
        )

    return damage


def with_item(value: float) -> Callable[[npt.NDArray[np.generic]], object]:
    """Return a damage that sets an array's first item."""

    def change(array: npt.NDArray[np.generic]) -> object:
        changed = array.copy()
        changed.flat[0] = value
        return changed

    return change


def archive() -> bytes:
    """Return a compressed archive, which numpy reads like an array."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, bias=np.zeros((3, CLASSES), np.float32))
    return buffer.getvalue()


def header_only(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    """Return the start of an array file that claims this shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"shape": shape, "fortran_order": False, "descr": dtype}
    )
    return buffer.getvalue()


def without(name: str) -> Damage:
    """Return a damage that removes an array."""

    def damage(arrays: ArrayRecord) -> None:
        del arrays[name]

    return damage


# Of the classes 0, 1, 2 with ranks 0, 2, 1: [1, C, d], [3, C], [3, d], [3, C].
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without("ranks"), r"have the arrays \['bias', 'classes', 'left', 'right', 'w"),
        (put_bytes("more", header_only(())), r"arrays .*'more'.*, expected \['bias'"),
        (put("classes", lambda a: a[:0]), r"ranks has shape \(3,\), expected \(0,\)"),
        (put("classes", lambda a: a[[0, 0, 1]]), r"classes \[0, 0, 1\]; they must"),
        (put("classes", with_item(6)), r"classes \[6, 1, 2\]; they must differ"),
        (put("classes", with_item(-1)), r"classes \[-1, 1, 2\]; they must differ"),
        (put("classes", lambda a: a[0]), r"classes has type int64 and shape \(\)"),
        (put("classes", lambda a: a[None]), r"classes has type int64 and shape \(1, 3"),
        (put("classes", np.float32), "classes has type float32 .* expected int64"),
        (
            put("classes", lambda a: np.zeros(5000, np.int64)),
            r"classes has type int64 and shape \(5000,\), expected int64 and \(6,\)",
        ),
        (put("ranks", lambda a: a[:2]), r"ranks has shape \(2,\), expected \(3,\)"),
        (put("ranks", np.int32), "ranks has type int32, expected int64"),
        (put("ranks", with_item(-1)), "ranks has values from -1 to 2, expected 0 to 3"),
        (put("ranks", with_item(4)), "ranks has values from 1 to 4, expected 0 to 3"),
        (
            put("ranks", with_item(2**62)),
            "ranks has values from 1 to 4611686018427387904, expected 0 to 3",
        ),
        (
            put("ranks", with_item(1)),
            r"weight has shape \(1, 6, 9\), expected \(0, 6, 9\)",
        ),
        (
            put("ranks", lambda a: a[[0, 1, 1]]),
            r"left has shape \(3, 6\), expected \(4, 6\)",
        ),
        (
            put("weight", lambda a: a[:, :, 1:]),
            r"weight has shape \(1, 6, 8\), expected \(1, 6, 9\)",
        ),
        (put("left", lambda a: a.T), r"left has shape \(6, 3\), expected \(3, 6\)"),
        (
            put("right", lambda a: np.zeros((3, 10**6), a.dtype)),
            r"right has shape \(3, 1000000\), expected \(3, 9\)",
        ),
        (put("bias", lambda a: a[:2]), r"bias has shape \(2, 6\), expected \(3, 6\)"),
        (put("weight", np.float64), "weight has type float64, expected"),
        (put("right", np.int16), "right has type int16, expected"),
        (put_bytes("left", b"what is this?"), "left cannot be decoded"),
        (put_bytes("bias", archive()), "bias cannot be decoded"),
        (put_bytes("ranks", header_only((3,), "<i8")), "ranks cannot be decoded"),
        (put_surplus("bias"), "bias has 10128 bytes besides its values"),
        (
            put_bytes("weight", header_only((10**5, 10**5))),
            r"weight has shape \(100000, 100000\), expected \(1, 6, 9\)",
        ),
        (put_bytes("left", b"\x93NUMPY\x02\x00"), r"left .*version is \(2, 0\)"),
    ],
)
@pytest.mark.parametrize("precision", ["half", "full"])
def test_malformed_gradients_are_refused(
    damage: Damage, reason: str, precision: Precision
) -> None:
    arrays = messages.gradients_to_arrays(
        gradients_of_rank([0, 2, 1], precision), precision
    )
    messages.gradients_from_arrays(arrays, expected_format(precision))
    damage(arrays)
    with pytest.raises(messages.ReplyError, match=reason):
        messages.gradients_from_arrays(arrays, expected_format(precision))


@pytest.mark.parametrize("name", ["weight", "left", "right", "bias"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("precision", ["half", "full"])
def test_values_that_are_not_finite_are_refused(
    name: str, bad: float, precision: Precision
) -> None:
    gradients = gradients_of_rank([0, 2], precision)
    dense, low_rank = gradients.values()
    assert isinstance(low_rank, LowRankGradient)
    tensor = {
        "weight": dense.weight,
        "left": low_rank.left,
        "right": low_rank.right,
        "bias": low_rank.bias,
    }[name]
    tensor[-1, ...] = bad
    arrays = messages.gradients_to_arrays(gradients, precision)
    with pytest.raises(
        messages.ReplyError,
        match=f"array class-gradients.{name} has values that are not finite",
    ):
        messages.gradients_from_arrays(arrays, expected_format(precision))


def test_factors_whose_product_overflows_are_refused() -> None:
    gradient = LowRankGradient(
        torch.full((CLASSES, 1), 1e12), torch.eye(1, DIM), torch.ones(CLASSES)
    )
    arrays = messages.gradients_to_arrays({0: gradient}, "full")
    with pytest.raises(messages.ReplyError, match="a product that may reach"):
        messages.gradients_from_arrays(arrays, expected_format("full"))


@pytest.mark.parametrize(
    ("sent", "wanted", "found"),
    [
        ("half", "full", "type uint16, expected float32"),
        ("full", "half", "type float32, expected uint16"),
    ],
)
def test_only_the_precision_asked_for_is_taken(
    sent: Precision, wanted: Precision, found: str
) -> None:
    arrays = messages.gradients_to_arrays(gradients_of_rank([0, 1], sent), sent)
    with pytest.raises(
        messages.ReplyError, match=f"array class-gradients.weight has {found}"
    ):
        messages.gradients_from_arrays(arrays, expected_format(wanted))


def test_low_rank_is_taken_only_where_asked_for() -> None:
    arrays = messages.gradients_to_arrays(gradients_of_rank([0, 1], "half"), "half")
    with pytest.raises(
        messages.ReplyError, match="ranks has values from 0 to 1, expected 0 to 0"
    ):
        messages.gradients_from_arrays(arrays, expected_format("half", min_cosine=1.0))


def test_factors_whose_product_cancels_are_refused() -> None:
    """Its norm is zero, and what is added to it in float32 is lost."""
    left, right = torch.full((CLASSES, 1), 1e5), torch.eye(1, DIM)
    gradient = LowRankGradient(
        torch.cat([left, -left], 1), torch.cat([right, right]), torch.ones(CLASSES)
    )
    arrays = messages.gradients_to_arrays({2: gradient}, "full")
    with pytest.raises(messages.ReplyError, match="class 2 are not orthonormal"):
        messages.gradients_from_arrays(arrays, expected_format("full"))


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-8, 1.0, 1e8]))
@pytest.mark.parametrize("precision", ["half", "full"])
def test_factors_that_a_client_makes_are_taken(
    precision: Precision, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ends = [torch.randn(n, 2, generator=generator) for n in (CLASSES, DIM)]
    dense = ClassGradient(scale * ends[0] @ ends[1].T, torch.ones(CLASSES))
    coded = encode_gradients({1: dense}, min_cosine=0.99, precision=precision)
    assert isinstance(coded[1], LowRankGradient)
    arrays = messages.gradients_to_arrays(coded, precision)
    assert_same(
        messages.gradients_from_arrays(arrays, expected_format(precision))[1], coded[1]
    )
