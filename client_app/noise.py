"""Differential privacy of class gradients: noise that hides every single image.

Two sets of images are neighbours if one image is replaced by another of the same class.
So the guarantee does not hide which classes a client sends gradients of, nor that it
holds at least `min_class_samples` images of each. It hides the number of images: the
noise scale is the same for all classes, and follows the smallest class that is sent.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from clip2fl_common.class_gradients import ClassGradient, gradient_sensitivity
from clip2fl_common.randomness import Noise

if TYPE_CHECKING:  # benchmarks of class gradients run without pydantic
    from clip2fl_common.config import Privacy


@dataclass(frozen=True)
class GradientProtection:
    """Bound and Gaussian noise on each image's part of a class gradient.

    Attributes
    ----------
    max_norm : float
        Largest norm of an image's part.
    deviation : float
        Standard deviation of the noise on every entry.
    noise : Noise
        Source of the noise.
    """

    max_norm: float
    deviation: float
    noise: Noise

    def with_noise(
        self, gradients: dict[int, ClassGradient]
    ) -> dict[int, ClassGradient]:
        """Return class gradients with noise added to weight and bias."""
        if self.deviation == 0:
            return gradients
        return {
            c: ClassGradient(*(tensor + self._noise(tensor) for tensor in gradient))
            for c, gradient in gradients.items()
        }

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        return (self.deviation * self.noise(like.shape)).to(like)


def gradient_protection(
    privacy: "Privacy", samples_per_class: int, noise: Noise
) -> GradientProtection | None:
    """Return the protection that a run's configuration asks for, or None.

    Parameters
    ----------
    privacy : Privacy
        Settings of privacy.
    samples_per_class : int
        Most images of a class in one draw.
    noise : Noise
        Source of the noise; for real images `secret_noise`.

    Returns
    -------
    GradientProtection or None
    """
    if privacy.gradient_clip_norm == 0:
        return None
    sensitivity = gradient_sensitivity(
        privacy.gradient_clip_norm, privacy.min_class_samples, samples_per_class
    )
    return GradientProtection(
        privacy.gradient_clip_norm,
        privacy.gradient_noise_multiplier * sensitivity,
        noise,
    )
