"""What a site may be called: the same rule at the node, at the server and in keys."""

import re
from typing import TypeGuard

# ASCII only: a Cyrillic letter may look like a Latin one, and one letter may have
# several encodings.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_RULE = (
    "1 to 64 ASCII letters, digits, '.', '_' or '-', the first a letter or digit"
)
# Characters of a refused name that a message shows.
_SHOWN = 80


def is_site_name(value: object) -> TypeGuard[str]:
    """Return whether a value is a name that a site may have."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def shown(value: object) -> str:
    r"""Return a refused value as a message may show it.

    Parameters
    ----------
    value : object
        Anything that a stranger may have sent.

    Returns
    -------
    str
        One line of at most about 80 ASCII characters, without control characters.

    Examples
    --------
    >>> shown("s\u0456te-a")
    "'s\\u0456te-a'"
    """
    # A long text is cut first: writing out all of it takes memory, too.
    text = ascii(value[:_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def clashing(name: str) -> str:
    """Return what two names have in common that must not stand for two sites.

    Names that differ only in case clash: people and file systems mix them up.
    """
    return name.casefold()
