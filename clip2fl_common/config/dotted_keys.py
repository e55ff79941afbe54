"""Convert nested TOML tables to the dotted keys of Flower's run configuration."""

import re
from collections.abc import Mapping

from clip2fl_common.config.messages import scalar_problem, shown, shown_key
from clip2fl_common.config.types import ConfigError

# Characters that TOML allows in a key without quotes. A quoted key may contain dots,
# and would then be read as another key.
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def flatten(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Turn nested TOML tables into one level of dotted keys.

    Parameters
    ----------
    table : mapping
        Keys to scalars or further tables, as `tomllib` returns them.
    prefix : str
        Prefix of each key.

    Returns
    -------
    dict of str to (bool, int, float or str)

    Raises
    ------
    ConfigError
        If a key is empty or needs quotes, or a value is a list, a date, an integer
        beyond 64 bits or not a finite number; names the key.
    """
    flat: dict[str, object] = {}
    # A stack, because dotted keys may nest deeper than functions may.
    waiting = [(prefix, table)]
    while waiting:
        before, inner = waiting.pop()
        for part, value in inner.items():
            key = f"{before}{part}"
            if not isinstance(part, str) or BARE_KEY.fullmatch(part) is None:
                raise ConfigError(
                    f"{shown_key(key)}: the part {shown(part)} of a key must be "
                    "letters, digits, hyphens or underscores; write group.key = value"
                )
            if isinstance(value, Mapping):
                waiting.append((f"{key}.", value))
            elif wanted := scalar_problem(value):
                raise ConfigError(
                    f"{shown_key(key)} = {shown(value)}, but it must be {wanted}"
                )
            else:
                flat[key] = value
    return flat
