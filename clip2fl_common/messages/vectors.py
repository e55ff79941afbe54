"""Vectors of fixed-point numbers, which clients send masked and the server adds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import MetricRecord, RecordDict

from clip2fl_common.messages.arrays import ReplyError, checked, numpy_to_arrays
from clip2fl_common.messages.names import MASKED, METRICS, PARTITION
from clip2fl_common.secure.fixed_point import Ring
from clip2fl_common.secure.masks import Vector

Values = Mapping[str, npt.NDArray[np.float64]]

# The first power of two above `LARGEST_VALUE`, which no sum of a client exceeds.
WIDE = Ring(64, 2.0**40)


@dataclass(frozen=True)
class Segment:
    """One array of the vector.

    Attributes
    ----------
    shape : tuple of int
        The array's shape.
    ring : Ring
        The integers in which it is summed.
    """

    shape: tuple[int, ...]
    ring: Ring

    @property
    def size(self) -> int:
        """Return the number of values."""
        return math.prod(self.shape)


class VectorFormat:
    """The arrays of a vector, in their order.

    Parameters
    ----------
    segments : mapping of str to Segment
        The arrays by name.
    """

    def __init__(self, segments: Mapping[str, Segment]) -> None:
        self.segments = dict(segments)

    def encode(self, values: Values, parties: int) -> Vector:
        """Return values as a vector of fixed-point numbers.

        Parameters
        ----------
        values : mapping of str to ndarray
            By name of the segment.
        parties : int
            Number of parties of the round.

        Raises
        ------
        FloatingPointError
            If a value is not finite or too large: training has diverged.
        """
        parts: dict[int, list[npt.NDArray[Any]]] = {64: [], 32: []}
        for name, segment in self.segments.items():
            flat = values[name].reshape(-1)
            parts[segment.ring.bits].append(segment.ring.encode(flat, parties))
        wide, narrow = (
            np.concatenate([np.zeros(0, f"<u{bits // 8}"), *parts[bits]])
            for bits in (64, 32)
        )
        return Vector(wide, narrow)

    def decode(self, total: Vector, parties: int) -> Values:
        """Return the sum in a vector by name of the segment; see `encode`."""
        places = {64: 0, 32: 0}
        words = {64: total.wide, 32: total.narrow}
        values = {}
        for name, segment in self.segments.items():
            bits = segment.ring.bits
            end = places[bits] + segment.size
            part = words[bits][places[bits] : end].reshape(segment.shape)
            values[name] = segment.ring.decode(part, parties)
            places[bits] = end
        return values

    def zeros(self) -> Vector:
        """Return the vector of an empty sum."""
        sizes = {64: 0, 32: 0}
        for segment in self.segments.values():
            sizes[segment.ring.bits] += segment.size
        return Vector(np.zeros(sizes[64], "<u8"), np.zeros(sizes[32], "<u4"))

    def vector_in(self, content: RecordDict, asked: Mapping[int, int]) -> Vector:
        """Return a client's masked vector.

        Parameters
        ----------
        content : RecordDict
            A reply.
        asked : mapping of int to int
            Clients that the sender was asked for.

        Returns
        -------
        Vector
            A copy; any integers are possible.

        Raises
        ------
        ReplyError
            If it is no reply of this format.
        """
        if (
            set(content) != {MASKED, METRICS}
            or set(content.array_records) != {MASKED}
            or set(content.metric_records) != {METRICS}
        ):
            raise ReplyError(f"records are {sorted(content)}, expected masked sums")
        metrics = content.metric_records[METRICS]
        if set(metrics) != {PARTITION} or metrics[PARTITION] not in asked:
            raise ReplyError(f"metrics are not those of one of {sorted(asked)}")
        arrays = content.array_records[MASKED]
        wanted = self.zeros()
        if set(arrays) != {"wide", "narrow"}:
            raise ReplyError(f"masked sums have the arrays {sorted(arrays)}")
        wide, narrow = (
            checked(f"{MASKED}.{name}", arrays[name], part.shape, part.dtype).copy()
            for name, part in zip(("wide", "narrow"), wanted.parts, strict=True)
        )
        return Vector(wide, narrow)


def masked_reply(partition: int, vector: Vector) -> RecordDict:
    """Return the reply with a client's masked vector."""
    return RecordDict(
        {
            MASKED: numpy_to_arrays({"wide": vector.wide, "narrow": vector.narrow}),
            METRICS: MetricRecord({PARTITION: partition}),
        }
    )


def client_in(content: RecordDict) -> int | None:
    """Return the client that a masked reply speaks of, unchecked; None without one."""
    client = content.metric_records.get(METRICS, MetricRecord()).get(PARTITION)
    return client if isinstance(client, int) else None
