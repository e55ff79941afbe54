"""Sites' names and numbers, the same at the node, the server and the registry."""

import hashlib
import re
from typing import TypeGuard

# ASCII only: a Cyrillic letter may look like a Latin one, and one letter may have
# several encodings.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_RULE = (
    "1 to 64 ASCII letters, digits, '.', '_' or '-', the first a letter or digit"
)

# A site's number has this many low bits that do not number its random streams.
_MORE_BITS = 31


def is_site_name(value: object) -> TypeGuard[str]:
    """Return whether a value is a valid name of a site."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def clashing(name: str) -> str:
    """Return a name's key; two sites must not have names with the same key.

    Names that differ only in case clash: people and file systems confuse them.
    """
    return name.casefold()


def client_number(name: str) -> int:
    """Return the number that identifies a site in requests, replies and sums.

    Parameters
    ----------
    name : str
        The site's name.

    Returns
    -------
    int
        A number of 63 bits, the most that Flower's metrics hold. The upper 32 bits
        give the order of the sites and number their random streams. 32 bits alone
        would not do: two names would soon share a number and shut one site out.
    """
    upper = hashlib.blake2b(name.encode(), digest_size=4).digest()
    more = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return int.from_bytes(upper, "little") << _MORE_BITS | more >> 1


def random_stream(number: int) -> int:
    """Return the number of the random streams of the site with a number."""
    return number >> _MORE_BITS
