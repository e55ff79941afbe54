"""Arrays in messages: converted to and from torch, and checked before use."""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import nn

from clip2fl_common.messages.names import LARGEST_VALUE, LONGEST_HEADER
from clip2fl_common.shown import plain

# Flower's name for numpy's own format.
NUMPY = "numpy.ndarray"


class ReplyError(ValueError):
    """A reply that must not change the server's state; says why in one plain line.

    Parameters
    ----------
    reason : str
        The reason. It may quote anything that the client sent.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(plain(reason))


class NotFiniteError(ReplyError):
    """A reply holds numbers that are not finite or too large: training has diverged."""


def model_to_arrays(model: nn.Module) -> ArrayRecord:
    """Return the model's floating-point state, BatchNorm's buffers included.

    Integer buffers (BatchNorm's batch counter) are left out: nothing reads them, and
    their average has no meaning.
    """
    return state_to_arrays(
        {
            name: tensor
            for name, tensor in model.state_dict().items()
            if tensor.is_floating_point()
        }
    )


def state_to_arrays(state: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Return named tensors as Flower's arrays."""
    return ArrayRecord(
        {name: Array(tensor.detach().cpu().numpy()) for name, tensor in state.items()}
    )


def load_arrays(model: nn.Module, arrays: ArrayRecord) -> None:
    """Load the arrays from `model_to_arrays` into a model of the same architecture."""
    state = arrays_to_tensors(arrays)
    counters = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not tensor.is_floating_point()
    }
    model.load_state_dict(state | counters)


def arrays_to_numpy(arrays: ArrayRecord) -> dict[str, npt.NDArray[Any]]:
    """Return the values of arrays that were checked before, by name."""
    return {name: array.numpy() for name, array in arrays.items()}


def arrays_to_tensors(arrays: ArrayRecord) -> dict[str, torch.Tensor]:
    """Return copies of arrays that were checked before as tensors, by name."""
    return {name: torch.from_numpy(a.numpy().copy()) for name, a in arrays.items()}


def numpy_to_arrays(values: Mapping[str, npt.NDArray[Any]]) -> ArrayRecord:
    """Return named values as Flower's arrays."""
    return ArrayRecord({name: Array(array) for name, array in values.items()})


def checked(
    name: str, array: Array, shape: tuple[int, ...], dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """Return an array's values after checking that they are as expected and finite.

    Parameters
    ----------
    name : str
        Name of the array in errors.
    array : Array
        The array that arrived.
    shape : tuple of int
        Expected shape.
    dtype : dtype
        Expected type.

    Returns
    -------
    ndarray
        Read-only; shares the memory of the message.

    Raises
    ------
    ReplyError
        If shape, type or values are not as expected.
    """
    header = read_header(name, array)
    wanted = np.dtype(dtype)
    if header.shape != shape:
        raise ReplyError(f"array {name} has shape {header.shape}, expected {shape}")
    if header.dtype != wanted:
        raise ReplyError(f"array {name} has type {header.dtype}, expected {wanted}")
    values = decode(name, array, header)
    check_values(name, values)
    return values


def check_values(name: str, values: npt.NDArray[Any]) -> None:
    """Raise an error if values are not finite, or too large to stay finite.

    Raises
    ------
    NotFiniteError
        The message names the array.
    """
    if not np.isfinite(values).all():
        raise NotFiniteError(f"array {name} has values that are not finite")
    if values.dtype.kind == "f" and np.abs(values).max(initial=0) > LARGEST_VALUE:
        raise NotFiniteError(
            f"array {name} has values up to {float(np.abs(values).max()):.1e}, "
            f"expected {LARGEST_VALUE:.0e} at most"
        )


@dataclass(frozen=True)
class Header:
    """The header that numpy's format puts before an array's values.

    Attributes
    ----------
    shape : tuple of int
        Shape of the array.
    fortran : bool
        Whether the first axis varies fastest.
    dtype : dtype
        Type of the values.
    length : int
        Size of the header in bytes.
    """

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    length: int


def read_header(name: str, array: Array) -> Header:
    """Return an array's header: the shape and type that its bytes declare.

    The header is read first, so that an unexpected array takes no memory.

    Raises
    ------
    ReplyError
        If numpy cannot read the header.
    """
    stream = io.BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"format version is {version}, expected (1, 0)")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if array.stype != NUMPY:
            raise ValueError(f"it is serialised as {array.stype!r}")
    # A sender may put any bytes here, and numpy raises many exceptions for them.
    except Exception as error:
        raise _undecodable(name, error) from None
    return Header(shape, fortran, dtype, stream.tell())


def decode(name: str, array: Array, header: Header) -> npt.NDArray[Any]:
    """Return an array's values without a copy.

    Parameters
    ----------
    name : str
        Name of the array in errors.
    array : Array
        The array that arrived.
    header : Header
        The header from `read_header`; its type must not hold Python objects.

    Returns
    -------
    ndarray
        Read-only.

    Raises
    ------
    ReplyError
        If there are fewer bytes than the values need, or too many.
    """
    assert not header.dtype.hasobject
    count = math.prod(header.shape)
    try:
        values = np.frombuffer(array.data, header.dtype, count, header.length)
    except Exception as error:
        raise _undecodable(name, error) from None
    # Numpy ignores bytes after the values, however many there are.
    surplus = len(array.data) - values.nbytes
    if surplus > LONGEST_HEADER:
        raise ReplyError(f"array {name} has {surplus} bytes besides its values")
    return values.reshape(header.shape, order="F" if header.fortran else "C")


def _undecodable(name: str, error: Exception) -> ReplyError:
    return ReplyError(f"array {name} cannot be decoded ({error})")


def payload_bytes(content: RecordDict) -> int:
    """Return the size of a message's arrays in bytes, its only large part."""
    return sum(map(record_bytes, content.array_records.values()))


def message_bytes(content: RecordDict) -> int:
    """Return the size of all records in a message, in bytes; a number counts eight."""
    values = [
        *(v for record in content.config_records.values() for v in record.values()),
        *(v for record in content.metric_records.values() for v in record.values()),
    ]
    parts = [p for v in values for p in (v if isinstance(v, list) else [v])]
    return payload_bytes(content) + sum(
        len(part) if isinstance(part, str | bytes) else 8 for part in parts
    )


def record_bytes(record: ArrayRecord) -> int:
    """Return the size of arrays in bytes."""
    return sum(len(array.data) for array in record.values())
