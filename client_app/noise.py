"""Differential privacy of class gradients: noise that hides any one image.

Two sets of images are neighbours here if one image is replaced by another of the same
class. Which classes a client sends a gradient of is no secret, and neither is that it
holds `min_class_samples` images or more of each. How many is: the noise is that of the
smallest class that is sent, for all of them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from clip2fl_common.class_gradients import ClassGradient

if TYPE_CHECKING:  # class gradients are benchmarked where pydantic is not installed
    from clip2fl_common.config import Privacy


@dataclass(frozen=True)
class GradientProtection:
    """Bound and Gaussian noise on each image's part of a class gradient.

    Attributes
    ----------
    max_norm : float
        Greatest norm of an image's part.
    deviation : float
        Standard deviation of the noise on every entry.
    generator : torch.Generator
        CPU source of the noise.
    """

    max_norm: float
    deviation: float
    generator: torch.Generator

    def with_noise(
        self, gradients: dict[int, ClassGradient]
    ) -> dict[int, ClassGradient]:
        """Return class gradients with noise on weight and bias."""
        if self.deviation == 0:
            return gradients
        return {
            c: ClassGradient(*(tensor + self._noise(tensor) for tensor in gradient))
            for c, gradient in gradients.items()
        }

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(like.shape, generator=self.generator)
        return self.deviation * drawn.to(like)


def gradient_protection(
    privacy: "Privacy", samples_per_class: int, generator: torch.Generator
) -> GradientProtection | None:
    """Return what a run's configuration asks for, if anything.

    A class gradient is the mean over the draws, each of ``n`` images: all that a small
    class has, or ``samples_per_class`` of a larger one. In the worst case an image is
    part of every draw. Replacing it then changes the mean by ``2 * max_norm / n``.

    Parameters
    ----------
    privacy : Privacy
        Settings.
    samples_per_class : int
        Images of a class in one draw at most.
    generator : torch.Generator
        CPU source of the noise; where images are real, a `secret_generator`.

    Returns
    -------
    GradientProtection or None
    """
    if privacy.gradient_clip_norm == 0:
        return None
    fewest = min(privacy.min_class_samples, samples_per_class)
    sensitivity = 2 * privacy.gradient_clip_norm / fewest
    return GradientProtection(
        privacy.gradient_clip_norm,
        privacy.gradient_noise_multiplier * sensitivity,
        generator,
    )
