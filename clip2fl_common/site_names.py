"""What a site may be called: the same rule at the node, at the server and in keys."""

import re
from typing import TypeGuard

# ASCII only: a Cyrillic letter may look like a Latin one, and one letter may have
# several encodings.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_RULE = (
    "1 to 64 ASCII letters, digits, '.', '_' or '-', the first a letter or digit"
)


def is_site_name(value: object) -> TypeGuard[str]:
    """Return whether a value is a name that a site may have."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def clashing(name: str) -> str:
    """Return what two names have in common that must not stand for two sites.

    Names that differ only in case clash: people and file systems mix them up.
    """
    return name.casefold()
