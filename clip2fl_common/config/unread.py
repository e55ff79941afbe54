"""Keys that differ from their defaults although the run's method does not read them."""

from clip2fl_common.config.checks import known_classes
from clip2fl_common.config.keys import AUTO
from clip2fl_common.config.schema import KEYS, RunConfig
from clip2fl_common.config.types import METHODS


def unread_warning(config: RunConfig) -> str | None:
    """Return a warning about changed keys that have no effect in a run.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.

    Returns
    -------
    str or None
        One line with the method and the keys. None if the method reads every key that
        differs from its default, or if the schema does not know the method.
    """
    if config.method not in METHODS:
        return None
    flat = config.to_flat()
    classes = known_classes(flat)
    unread = [
        f"{name} = {value!r}"
        for name, value in flat.items()
        if config.method not in KEYS[name].methods
        and value not in (AUTO, KEYS[name].default_of(config.method, classes))
    ]
    if not unread:
        return None
    return (
        f"method = {config.method!r} does not read {', '.join(unread)}: the run is the "
        "same as with the defaults"
    )
