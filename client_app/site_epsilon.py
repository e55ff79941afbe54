"""What a site's answers cost, if its rules bound their epsilon (docs/privacy.md).

The cost of an answer follows from the noise on each thing that it holds. A thing
without noise may reveal an image entirely, so no bound allows it.
"""

from collections.abc import Iterable, Iterator

from clip2fl_common.config import RunConfig
from clip2fl_common.config.types import GRADIENT_METHODS, STATISTICS_METHODS
from clip2fl_common.epsilon import cost
from clip2fl_common.head_choice import uses_moments
from clip2fl_common.messages import CLASS_STATISTICS, GRADIENTS, MOMENTS
from clip2fl_common.protection import protection

IMPLIED = (GRADIENTS, CLASS_STATISTICS, MOMENTS)
"""Fields of which a run's configuration says whether its clients send them."""


def implied_fields(config: RunConfig) -> list[str]:
    """Return what a run's configuration makes clients send beside their models."""
    gradients = [GRADIENTS] if config.method in GRADIENT_METHODS else []
    statistics = [CLASS_STATISTICS] if config.method in STATISTICS_METHODS else []
    moments = [MOMENTS] if uses_moments(config) else []
    return [*gradients, *statistics, *moments]


def unprotected(config: RunConfig, fields: Iterable[str]) -> Iterator[str]:
    """Yield each part of an answer that has no noise, as a reason to refuse it.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    fields : iterable of str
        What the answer holds beside the model.
    """
    noises = {"model": config.privacy.model_noise_multiplier}
    for field in fields:
        if own := protection(field, config.privacy):
            noises[own.name] = own.noise
        else:
            yield (
                f"the run asks for {field}, to which no noise is added, and the site "
                "has a max-epsilon"
            )
    for name, multiplier in noises.items():
        if multiplier == 0:
            yield (
                f"the run has privacy.{name}-noise-multiplier = 0, and the site has a "
                "max-epsilon, which needs noise on all that is sent"
            )


def answer_cost(config: RunConfig, fields: Iterable[str]) -> float:
    """Return the cost of an answer without unprotected parts.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    fields : iterable of str
        What the answer holds beside the model.

    Returns
    -------
    float
        As `clip2fl_common.epsilon.cost`.
    """
    found = [protection(field, config.privacy) for field in fields]
    own = [part.noise for part in found if part]
    return cost([config.privacy.model_noise_multiplier, *own])
