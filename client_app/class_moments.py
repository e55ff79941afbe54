"""The client's part of the balanced discriminant: sums over its images."""

from typing import ClassVar

from flwr.app import ArrayRecord

from client_app.narrow_features import narrow_features
from client_app.part import ClientPart, ClientRound
from clip2fl_common.class_moments import (
    ClassMoments,
    noise_deviations,
    shorten_rows,
)
from clip2fl_common.config import Privacy
from clip2fl_common.messages import MOMENTS
from clip2fl_common.randomness import Noise


class MomentSums(ClientPart):
    """Class moments of the global model, of images without augmentation."""

    field: ClassVar[str] = MOMENTS

    def before_training(self, client: ClientRound) -> ArrayRecord:
        """Return the moments, bounded and with noise if privacy asks for it."""
        privacy = client.config.privacy
        moments = _moments(client)
        if privacy.moment_noise_multiplier > 0:
            moments = with_noise(moments, privacy, client.noise_source("moment-noise"))
        return client.encode(MOMENTS, moments.named())


def _moments(client: ClientRound) -> ClassMoments:
    """Return the exact moments of the classes that may be sent, in float64."""
    features, labels = narrow_features(client)
    bounded = shorten_rows(features, client.config.privacy.moment_clip_norm)
    return ClassMoments.of(bounded, labels, client.num_classes)


def with_noise(moments: ClassMoments, privacy: Privacy, noise: Noise) -> ClassMoments:
    """Return moments with Gaussian noise on all entries, absent classes included.

    The noise on the scatter is made symmetric afterwards, which reveals nothing more.

    Parameters
    ----------
    moments : ClassMoments
        Of statistics no longer than ``privacy.moment-clip-norm``.
    privacy : Privacy
        Settings of privacy.
    noise : Noise
        Source of the noise; for real images `secret_noise`.
    """
    count, total, scatter = (
        tensor + deviation * noise(tensor.shape)
        for tensor, deviation in zip(
            moments.named().values(),
            noise_deviations(privacy.moment_noise_multiplier, privacy.moment_clip_norm),
            strict=True,
        )
    )
    return ClassMoments(count, total, (scatter + scatter.T) / 2)
