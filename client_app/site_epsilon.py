"""What a site's answers cost, if its rules bound their epsilon (docs/privacy.md).

The cost of an answer follows from the noise on each thing that it holds. A thing
without noise may reveal an image entirely, so no bound allows it.
"""

from collections.abc import Iterable, Iterator

from clip2fl_common.config import GRADIENT_METHODS, RunConfig
from clip2fl_common.epsilon import cost
from clip2fl_common.head_choice import uses_moments
from clip2fl_common.messages import CLASS_STATISTICS, GRADIENTS, MOMENTS


def implied_fields(config: RunConfig) -> list[str]:
    """Return what a run's configuration makes clients send beside their models."""
    gradients = [GRADIENTS] if config.method in GRADIENT_METHODS else []
    statistics = [CLASS_STATISTICS] if config.method == "ccvr" else []
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
    known = _noises(config)
    for field in fields:
        if field in known:
            name, noises[name] = known[field]
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
    noises = _noises(config)
    own = [noises[field][1] for field in fields]
    return cost([config.privacy.model_noise_multiplier, *own])


def _noises(config: RunConfig) -> dict[str, tuple[str, float]]:
    """Return the name in keys and the multiplier of the noise on each field."""
    privacy = config.privacy
    return {
        GRADIENTS: ("gradient", privacy.gradient_noise_multiplier),
        MOMENTS: ("moment", privacy.moment_noise_multiplier),
    }
