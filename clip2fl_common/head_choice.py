"""Which statistics the choice of the delivered head takes, without torch."""

from clip2fl_common.config import RunConfig


def uses_moments(config: RunConfig) -> bool:
    """Return whether a run computes the discriminant, so that clients send moments."""
    return config.head.delivered == "discriminant" or config.method == "fedlda"
