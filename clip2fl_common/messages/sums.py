"""What is summed of training with secure aggregation: one vector a client.

The client makes the vector from the reply that it would send without secure
aggregation. The server makes one reply from the sum. All that follows at the server is
the same, with a single reply in place of many.

==================  =============================================  ============
part                what is summed                                 modulo
==================  =============================================  ============
images              number of images n                             2^64
metrics             n times losses; counts and seconds             2^64
model               n times (local minus global)                   2^64
class gradients     gradients; zeros for classes not held          2^32 or 2^64
other fields        the arrays, which are sums over images         2^64
==================  =============================================  ============

Class gradients are compared with those of the features by their directions. So their
sum serves as well as their mean over the clients that hold the class, and nobody tells
which classes a client holds. ``upload.precision = "half"`` sums them modulo 2^32.
"""

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, RecordDict

from clip2fl_common.class_gradients import ClassGradient, CodedGradient
from clip2fl_common.config import RunConfig
from clip2fl_common.messages.arrays import (
    NotFiniteError,
    ReplyError,
    arrays_to_numpy,
    check_values,
)
from clip2fl_common.messages.class_gradients import GradientFormat
from clip2fl_common.messages.fields import ArrayFields, ReplyField
from clip2fl_common.messages.names import (
    ARRAYS,
    AVERAGED_METRICS,
    CLIENT_SECONDS,
    LARGEST_VALUE,
    METRICS,
    MOST_SECONDS,
    NUM_EXAMPLES,
    SUMMED_METRICS,
    VARIANCE,
)
from clip2fl_common.messages.training import TrainReply
from clip2fl_common.messages.vectors import WIDE, Segment, Values, VectorFormat
from clip2fl_common.secure.fixed_point import Ring
from clip2fl_common.secure.masks import Vector
from clip2fl_common.updates import Arrays, bounded_update

# Norm to which a class gradient is shortened without aggregation.max-gradient-norm.
LONGEST_GRADIENT = 2.0**7

IMAGES, MODEL = "images", "model"
METRIC_NAMES = (*AVERAGED_METRICS, *SUMMED_METRICS)


class SumFormat(VectorFormat):
    """The vector of training: which arrays it has, and in which order.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    sent : mapping of str to ndarray
        The global model that was sent.
    fields : sequence of ReplyField
        What replies hold besides model and metrics.
    """

    def __init__(
        self, config: RunConfig, sent: Arrays, fields: Sequence[ReplyField[object]]
    ) -> None:
        self._sent = sent
        self._fields = fields
        self._aggregation = config.aggregation
        noisy = config.privacy.model_noise_multiplier > 0
        # Noise is added after an update was bounded, and makes it longer.
        self._max_norm = 0.0 if noisy else config.aggregation.max_update_norm
        self.longest_gradient = self._aggregation.max_gradient_norm or LONGEST_GRADIENT
        bound = 2.0 ** math.ceil(math.log2(self.longest_gradient))
        gradients = Ring(32, bound) if config.upload.precision == "half" else WIDE
        segments = {
            IMAGES: Segment((), WIDE),
            METRICS: Segment((len(METRIC_NAMES),), WIDE),
        }
        # Not in the order of the message: where a party's numbers lie in the sum would
        # depend on it, and a server could have other parties' zeros there.
        for name, values in sorted(sent.items()):
            segments[_part(MODEL, name)] = Segment(values.shape, WIDE)
        for field in fields:
            if isinstance(field, GradientFormat):
                classes, width = field.num_classes, field.feature_dim
                shapes: Mapping[str, tuple[int, ...]] = {
                    "weight": (classes, classes, width),
                    "bias": (classes, classes),
                }
                ring = gradients
            else:
                assert isinstance(field, ArrayFields), f"{field.name} has no sums"
                shapes, ring = field.shapes, WIDE
            for name, shape in shapes.items():
                segments[_part(field.name, name)] = Segment(shape, ring)
        super().__init__(segments)

    def values_of(self, content: RecordDict) -> Values:
        """Return what a client adds to the sum.

        Parameters
        ----------
        content : RecordDict
            The reply that the client would send without secure aggregation.

        Returns
        -------
        mapping of str to ndarray of float64
            By name of the segment. The client's weight, its update and its class
            gradients are bounded as the server bounds them otherwise.
        """
        metrics = content.metric_records[METRICS]
        images = cast(int, metrics[NUM_EXAMPLES])
        weight = float(min(images, self._aggregation.max_site_images))
        values: dict[str, npt.NDArray[np.float64]] = {
            IMAGES: np.array(weight),
            METRICS: np.array(
                [
                    float(cast(float, metrics[name]))
                    * (weight if name in AVERAGED_METRICS else 1)
                    for name in METRIC_NAMES
                ]
            ),
        }
        local = arrays_to_numpy(content.array_records[ARRAYS])
        for name, part in bounded_update(local, self._sent, self._max_norm).items():
            values[_part(MODEL, name)] = weight * part
        for field in self._fields:
            arrays = self._field_arrays(field, content.array_records[field.name])
            # Sums over the images that the bounded weight stands for.
            of_images = isinstance(field, ArrayFields)
            share = weight / images if of_images and images else 1.0
            for name, array in arrays.items():
                values[_part(field.name, name)] = share * array
        return values

    def _field_arrays(self, field: ReplyField[object], record: ArrayRecord) -> Values:
        if not isinstance(field, GradientFormat):
            assert isinstance(field, ArrayFields)
            return {n: t.double().numpy() for n, t in field.decode(record).items()}
        classes, width = field.num_classes, field.feature_dim
        weight = np.zeros((classes, classes, width))
        bias = np.zeros((classes, classes))
        for c, gradient in field.decode(record).items():
            own, offset = gradient.weight.double(), gradient.bias.double()
            norm = math.hypot(float(own.norm()), float(offset.norm()))
            scale = min(1.0, self.longest_gradient / norm) if norm > 0 else 1.0
            weight[c], bias[c] = scale * own.numpy(), scale * offset.numpy()
        return {"weight": weight, "bias": bias}

    def reply_of(
        self, total: Vector, parties: int, members: Mapping[int, int], size: int
    ) -> TrainReply:
        """Return the one reply that stands for all members of a sum.

        Parameters
        ----------
        total : Vector
            The sum without masks.
        parties : int
            Number of parties of the round.
        members : mapping of int to int
            The clients in the sum, each with the most images that it can have.
        size : int
            Bytes that each of them sent.

        Returns
        -------
        TrainReply
            Its model is the mean over images; class gradients are means over members.

        Raises
        ------
        ReplyError
            If the sum is none of possible replies.
        """
        values = self.decode(total, parties)
        images = float(values[IMAGES])
        most = self._aggregation.max_site_images
        allowed = sum(min(own, most) for own in members.values())
        if not len(members) <= images <= allowed:
            raise ReplyError(
                f"the sum is of {images:.6g} images, and {len(members)} clients have "
                f"from {len(members)} to {allowed}"
            )
        model = {}
        for name, sent in self._sent.items():
            mean = sent + values[_part(MODEL, name)] / images
            if name.endswith(VARIANCE):
                mean = mean.clip(min=0)  # rounding may make it negative
            model[name] = mean.astype(sent.dtype)
            check_values(name, model[name])
        first, *_ = members
        return TrainReply(
            node=0,
            client=first,
            images=round(images),
            model=model,
            metrics=_metrics(values[METRICS], images, len(members)),
            upload_bytes=size,
            field_bytes=self._field_bytes,
            fields={
                field.name: self._summed(field, values, len(members))
                for field in self._fields
            },
            members=tuple(members),
        )

    @property
    def _field_bytes(self) -> int:
        records = {field.name for field in self._fields}
        return sum(
            segment.size * segment.ring.bits // 8
            for name, segment in self.segments.items()
            if name.partition(".")[0] in records
        )

    def _summed(
        self, field: ReplyField[object], values: Values, members: int
    ) -> Mapping[str, torch.Tensor] | Mapping[int, CodedGradient]:
        if not isinstance(field, GradientFormat):
            assert isinstance(field, ArrayFields)
            return {
                name: torch.from_numpy(values[_part(field.name, name)])
                for name in field.shapes
            }
        weight, bias = (values[_part(field.name, name)] for name in ("weight", "bias"))
        return {
            c: ClassGradient(
                torch.from_numpy(weight[c] / members).float(),
                torch.from_numpy(bias[c] / members).float(),
            )
            for c in range(field.num_classes)
            # Exactly zero: no client has a gradient of the class.
            if weight[c].any() or bias[c].any()
        }


def _metrics(
    summed: npt.NDArray[np.float64], images: float, members: int
) -> dict[str, float]:
    metrics = dict(zip(METRIC_NAMES, summed.tolist(), strict=True))
    for name in AVERAGED_METRICS:
        metrics[name] /= images
    for name, value in metrics.items():
        if abs(value) > LARGEST_VALUE:
            raise NotFiniteError(f"metric {name} = {value} is too large")
        if name in SUMMED_METRICS and value < 0:
            raise ReplyError(f"metric {name} = {value} is negative")
    for name in CLIENT_SECONDS:  # one client's wrong clock must not cost the round
        metrics[name] = min(metrics[name], members * MOST_SECONDS)
    return metrics


def _part(record: str, name: str) -> str:
    return f"{record}.{name}"
