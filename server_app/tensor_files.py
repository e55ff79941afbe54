"""safetensors files: written completely or not at all, checked before they are read.

A file may come from an untrusted source.
Its header lists the tensors. Types and shapes are compared with the expected ones
before any tensor is read, so that a file of ten gigabytes that is no model of this
program is refused as fast as a small one.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from clip2fl_common.files import replacing
from clip2fl_common.shown import short, shown
from server_app.foreign_files import (
    MEGABYTE,
    ForeignFileError,
    opened,
    parse_json,
)

# The header of a model with 32,768 classes and long names has ten megabytes.
MAX_HEADER_BYTES = 32 * MEGABYTE
LENGTH_BYTES = 8
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_Length = Annotated[int, Field(ge=0, lt=2**48)]


class _Entry(BaseModel):
    """A tensor's entry in the header."""

    model_config = ConfigDict(strict=True, extra="forbid")

    dtype: Annotated[str, Field(max_length=20)]
    shape: Annotated[list[_Length], Field(max_length=16)]
    data_offsets: Annotated[list[_Length], Field(min_length=2, max_length=2)]


class _Header(BaseModel):
    """The header: one entry for each tensor, and text metadata."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, _Entry] = Field(init=False)

    metadata: Annotated[dict[str, str], Field(alias="__metadata__")] = {}


@dataclass(frozen=True)
class Declared:
    """Type and shape of a tensor, as a header declares them.

    Attributes
    ----------
    dtype : torch.dtype or None
        None if torch does not have the type.
    shape : tuple of int
        Shape of the tensor.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Declared":
        """Return the type and shape of a tensor, which may be on the meta device."""
        return cls(tensor.dtype, tuple(tensor.shape))

    def __str__(self) -> str:
        """Return type and shape as text for a message."""
        name = str(self.dtype).removeprefix("torch.") if self.dtype else "unknown"
        return f"{name} {list(self.shape)}"


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file of which only the header has been read.

    Attributes
    ----------
    path : Path
        The file.
    tensors : mapping of str to Declared
        The tensors that the header declares.
    metadata : mapping of str to str
        The header's text metadata.
    """

    path: Path
    tensors: Mapping[str, Declared]
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> "TensorFile":
        """Read a file's header.

        Parameters
        ----------
        path : Path
            The file.

        Returns
        -------
        TensorFile

        Raises
        ------
        ForeignFileError
            If it is no safetensors file, or is cut off.
        """
        where = shown(path)
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(LENGTH_BYTES)
            length = int.from_bytes(head, "little")
            if len(head) < LENGTH_BYTES or length > size - LENGTH_BYTES:
                raise ForeignFileError(
                    f"{where} is no safetensors file, or is cut off: it has {size:,} "
                    "bytes"
                )
            if length > MAX_HEADER_BYTES:
                raise ForeignFileError(
                    f"{where} has a header of {length:,} bytes, but it must have "
                    f"{MAX_HEADER_BYTES:,} at most"
                )
            text = file.read(length)
        try:
            content = parse_json(text.decode("utf-8"), _Header, f"{where}: its header")
        except UnicodeDecodeError:
            raise ForeignFileError(f"{where}: its header is not UTF-8 text") from None
        metadata = content.pop("__metadata__", {})
        data = size - LENGTH_BYTES - length
        end = max((entry["data_offsets"][1] for entry in content.values()), default=0)
        if end != data:
            raise ForeignFileError(
                f"{where} has {data:,} bytes of tensors, but its header tells of "
                f"{end:,}: it is cut off, or no safetensors file"
            )
        tensors = {
            name: Declared(TYPES.get(entry["dtype"]), tuple(entry["shape"]))
            for name, entry in content.items()
        }
        return cls(path, tensors, metadata)

    def require(self, expected: Mapping[str, Declared]) -> None:
        """Raise unless the file contains exactly these tensors.

        Parameters
        ----------
        expected : mapping of str to Declared
            Name, type and shape of each tensor.

        Raises
        ------
        ForeignFileError
            Names a tensor that is missing, unexpected, or of another type or shape.
        """
        where = shown(self.path)
        for name in [*expected, *self.tensors]:
            if name not in self.tensors:
                raise ForeignFileError(f"{where} lacks the tensor {name}")
            if name not in expected:
                raise ForeignFileError(f"{where} has a tensor {short(name)} too many")
            if self.tensors[name] != expected[name]:
                raise ForeignFileError(
                    f"{where}: the tensor {name} is {self.tensors[name]}, but it must "
                    f"be {expected[name]}"
                )

    def load(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Read some of the tensors.

        Parameters
        ----------
        names : collection of str
            Names of the tensors; `tensors` gives their sizes.

        Returns
        -------
        dict of str to Tensor
            On the CPU; all values are finite.

        Raises
        ------
        ForeignFileError
            If the file cannot be read, or a tensor contains a value that is not finite.
        """
        where = shown(self.path)
        found: dict[str, torch.Tensor] = {}
        try:
            with safe_open(self.path, framework="pt") as file:
                for name in names:
                    found[name] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ForeignFileError(f"{where} cannot be read: {error}") from None
        for name, tensor in found.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ForeignFileError(
                    f"{where}: the tensor {short(name)} holds values that are no "
                    "finite numbers"
                )
        return found


def save_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, completely or not at all.

    Parameters
    ----------
    path : Path
        The file, which no other process may write meanwhile; an old one is replaced.
    tensors : mapping of str to Tensor
        Content of the file.
    metadata : mapping of str to str or None
        Text metadata for the header.
    """
    content = save(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        None if metadata is None else dict(metadata),
    )
    with replacing(path, only_writer=True) as file:
        file.write(content)
