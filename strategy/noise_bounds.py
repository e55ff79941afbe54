"""Bounds on replies that hold noise: they are as long as clipping and noise allow."""

import math
from collections.abc import Iterator, Sequence

from clip2fl_common.class_gradients import gradient_sensitivity
from clip2fl_common.class_moments import noise_deviations
from clip2fl_common.config import RunConfig
from clip2fl_common.messages import (
    MOMENTS,
    ArrayFields,
    GradientFormat,
    ReplyField,
    TrainReply,
)
from clip2fl_common.updates import bounded_update, update_norm
from strategy.outliers import ROUNDING
from strategy.robust import Arrays, gradient_norm

# Standard normal noise on D values is longer than sqrt(D) + t with a probability of at
# most exp(-t^2 / 2) (concentration of measure): 1e-14 here.
DEVIATIONS = 8.0


class NoiseBounds:
    """What clipping and noise allow in a reply, where noise hides what is plausible.

    The norm of clipped values and the deviation of the noise on them are known. So a
    reply that is much longer is not the result of honest noise.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    fields : sequence of ReplyField
        Fields that replies hold besides model and metrics.
    """

    def __init__(self, config: RunConfig, fields: Sequence[ReplyField[object]]) -> None:
        self._privacy = config.privacy
        self._update_norm = config.aggregation.max_update_norm
        self._samples = config.class_gradients.samples_per_class
        self._fields = fields

    def objection(self, reply: TrainReply, sent: Arrays) -> str:
        """Return why a reply is longer than its noise explains, or an empty string.

        Parameters
        ----------
        reply : TrainReply
            A client's reply, or what a secure sum makes of several.
        sent : mapping of str to ndarray
            The model that the client began with.
        """
        for name, norm, longest in self._lengths(reply, sent):
            if not norm <= longest * ROUNDING:
                return (
                    f"{name} has the norm {norm:.3g}, and clipping and noise allow "
                    f"{longest:.3g}"
                )
        return ""

    def _lengths(
        self, reply: TrainReply, sent: Arrays
    ) -> Iterator[tuple[str, float, float]]:
        """Yield name, norm and longest honest norm of each part that has noise."""
        privacy = self._privacy
        if privacy.model_noise_multiplier > 0:
            deviation = 2 * self._update_norm * privacy.model_noise_multiplier
            update = bounded_update(reply.model, sent, 0)
            size = sum(part.size for part in update.values())
            longest = self._update_norm + _noise(deviation, size)
            yield "the model's update", update_norm(update), longest
        for declared in self._fields:
            if isinstance(declared, GradientFormat):
                yield from self._gradients(reply, declared)
            elif isinstance(declared, ArrayFields) and declared.name == MOMENTS:
                yield from self._moments(reply, declared)

    def _gradients(
        self, reply: TrainReply, declared: GradientFormat
    ) -> Iterator[tuple[str, float, float]]:
        privacy = self._privacy
        if privacy.gradient_noise_multiplier == 0:
            return
        clipped = privacy.gradient_clip_norm
        deviation = privacy.gradient_noise_multiplier * gradient_sensitivity(
            clipped, privacy.min_class_samples, self._samples
        )
        size = declared.num_classes * (declared.feature_dim + 1)
        longest = clipped + _noise(deviation, size)
        for c, gradient in reply.field(declared).items():
            yield f"the class gradient of class {c}", gradient_norm(gradient), longest

    def _moments(
        self, reply: TrainReply, declared: ArrayFields
    ) -> Iterator[tuple[str, float, float]]:
        privacy = self._privacy
        if privacy.moment_noise_multiplier == 0:
            return
        clipped = privacy.moment_clip_norm
        deviations = noise_deviations(privacy.moment_noise_multiplier, clipped)
        moments = reply.field(declared)
        # Moments are sums over clients, each with noise of its own.
        spread = math.sqrt(len(reply.clients))
        for power, (name, deviation) in enumerate(
            zip(("count", "total", "scatter"), deviations, strict=True)
        ):
            tensor = moments[name].double()
            exact = reply.images * clipped**power
            yield (
                f"the {name} of the class moments",
                float(tensor.norm()),
                exact + spread * _noise(deviation, tensor.numel()),
            )


def _noise(deviation: float, size: int) -> float:
    """Return a norm that noise on so many values exceeds hardly ever."""
    return deviation * (math.sqrt(size) + DEVIATIONS)
