"""Reply fields: what a method's clients send besides their model.

A field declares the arrays of one record in a train reply. The client encodes them by
the declaration, and the server checks every reply by it. `REPLY_FIELDS` is the
registry: a method that needs new statistics adds a line there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from clip2fl_common.config import RunConfig
from clip2fl_common.messages.arrays import ReplyError, checked
from clip2fl_common.messages.class_gradients import GradientFormat
from clip2fl_common.messages.class_statistics import StatisticsFormat
from clip2fl_common.messages.names import CLASS_STATISTICS, GRADIENTS

Content_co = TypeVar("Content_co", covariant=True)


class ReplyField(Protocol[Content_co]):
    """One more record of arrays in a train reply."""

    @property
    def name(self) -> str:
        """Return the name of the record in a reply."""

    def decode(self, arrays: ArrayRecord) -> Content_co:
        """Return the content of the arrays after checking them.

        Raises
        ------
        ReplyError
            If the arrays are not as declared.
        """


@dataclass(frozen=True)
class ArrayFields:
    """Float32 arrays of fixed shapes, such as sums over a client's images.

    Attributes
    ----------
    name : str
        Name of the record in a reply.
    shapes : mapping of str to tuple of int
        Shape of each array.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]

    def encode(self, tensors: Mapping[str, torch.Tensor]) -> ArrayRecord:
        """Return a client's tensors as arrays.

        Raises
        ------
        ValueError
            If names or shapes are not as declared.
        """
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != dict(self.shapes):
            raise ValueError(f"{self.name}: made {found}, declared {self.shapes}")
        return ArrayRecord(
            {
                name: Array(tensor.detach().float().cpu().numpy())
                for name, tensor in tensors.items()
            }
        )

    def decode(self, arrays: ArrayRecord) -> dict[str, torch.Tensor]:
        """Return the tensors after checking them.

        Raises
        ------
        ReplyError
            If names, shapes, types or values are not as declared.
        """
        if set(arrays) != set(self.shapes):
            raise ReplyError(
                f"{self.name} has the arrays {sorted(arrays)}, expected "
                f"{sorted(self.shapes)}"
            )
        return {
            name: torch.from_numpy(
                checked(f"{self.name}.{name}", arrays[name], shape, np.float32).copy()
            )
            for name, shape in self.shapes.items()
        }


Declaration = Callable[[RunConfig, int], ReplyField[object]]

# By name: a function of configuration and number of classes that declares the field.
REPLY_FIELDS: dict[str, Declaration] = {
    GRADIENTS: GradientFormat.of,
    CLASS_STATISTICS: StatisticsFormat.of,
}


def array_fields(name: str, config: RunConfig, num_classes: int) -> ArrayFields:
    """Return the declaration of a field with fixed shapes; see `reply_field`."""
    declared = reply_field(name, config, num_classes)
    assert isinstance(declared, ArrayFields), f"{name} has no fixed shapes"
    return declared


def reply_field(name: str, config: RunConfig, num_classes: int) -> ReplyField[object]:
    """Return the declaration of a field for one run.

    Parameters
    ----------
    name : str
        Name of the field in `REPLY_FIELDS`.
    config : RunConfig
        The run's configuration.
    num_classes : int
        Number of classes C.

    Raises
    ------
    ReplyError
        If there is no such field here, since server and client run different code.
    """
    if name not in REPLY_FIELDS:
        raise ReplyError(
            f"no reply field is called {name}; there are {sorted(REPLY_FIELDS)} "
            "(clip2fl_common/messages/fields.py)"
        )
    return REPLY_FIELDS[name](config, num_classes)
