"""Keys that differ from their defaults although the run does not read them."""

from clip2fl_common.config.checks import known_classes
from clip2fl_common.config.keys import AUTO
from clip2fl_common.config.schema import KEYS, RunConfig
from clip2fl_common.config.types import METHODS

SWITCHES = {"distillation.view-mix": "distillation.views"}
"""Keys that are read only where another one is above 0."""


def unread_warning(config: RunConfig) -> str | None:
    """Return a warning about changed keys that have no effect in a run.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.

    Returns
    -------
    str or None
        One line with the method and the keys. None if the run reads every key that
        differs from its default, or if the schema does not know the method.
    """
    if config.method not in METHODS:
        return None
    flat = config.to_flat()
    classes = known_classes(flat)
    changed = {
        name: f"{name} = {value!r}"
        for name, value in flat.items()
        if value not in (AUTO, KEYS[name].default_of(config.method, classes))
    }
    unread = [
        text
        for name, text in changed.items()
        if config.method not in KEYS[name].methods
    ]
    reasons = []
    if unread:
        reasons.append(f"method = {config.method!r} does not read {', '.join(unread)}")
    reasons += [
        f"{switch} = 0 leaves {changed[name]} without effect"
        for name, switch in SWITCHES.items()
        if name in changed and changed[name] not in unread and flat[switch] == 0
    ]
    if not reasons:
        return None
    return f"{'; '.join(reasons)}: the run is the same as with the defaults"
