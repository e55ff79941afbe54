"""Arrays of messages are checked, and decoded as numpy does, without a copy."""

import io

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clip2fl_common.messages import NotFiniteError, ReplyError
from clip2fl_common.messages.arrays import checked


def wire(values: npt.NDArray[np.generic], order: str = "C") -> Array:
    """Return an array as it arrives, in C or Fortran order."""
    stream = io.BytesIO()
    np.save(stream, np.asarray(values, order="F" if order == "F" else "C"))
    array = Array(values)
    array.data = stream.getvalue()
    return array


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
        elements=st.floats(-1e6, 1e6, width=32),
    ),
    st.sampled_from("CF"),
)
def test_values_are_those_that_numpy_reads(
    values: npt.NDArray[np.float32], order: str
) -> None:
    array = wire(values, order)
    found = checked("a", array, values.shape, np.float32)
    np.testing.assert_array_equal(found, np.load(io.BytesIO(array.data)))
    assert not found.flags.writeable


def test_memory_is_the_messages() -> None:
    array = wire(np.arange(1000, dtype=np.float32))
    found = checked("a", array, (1000,), np.float32)
    assert np.shares_memory(found, np.frombuffer(array.data, np.uint8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-3], "cannot be decoded"),
        (lambda data: data + b"x" * 300, "428 bytes besides its values"),
        (lambda data: b"", "cannot be decoded"),
        (lambda data: data.replace(b"<f4", b"|O4"), "has type|cannot be decoded"),
        (lambda data: data.replace(b"<f4", b">f4"), "has type >f4, expected float32"),
        (lambda data: data.replace(b"(3,)", b"(9,)"), r"shape \(9,\), expected \(3,\)"),
    ],
)
def test_damaged_bytes_are_refused(damage: object, message: str) -> None:
    array = wire(np.ones(3, np.float32))
    assert callable(damage)
    array.data = damage(array.data)
    with pytest.raises(ReplyError, match=message):
        checked("a", array, (3,), np.float32)


def test_another_serialisation_is_refused() -> None:
    array = wire(np.ones(3, np.float32))
    array.stype = "pickle"
    with pytest.raises(ReplyError, match="serialised as 'pickle'"):
        checked("a", array, (3,), np.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e13])
def test_values_that_cannot_be_averaged_are_refused(value: float) -> None:
    with pytest.raises(NotFiniteError, match="array a has values"):
        checked("a", wire(np.asarray([1, value], np.float32)), (2,), np.float32)
