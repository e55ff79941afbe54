"""Text from untrusted sources, made safe to print, to log and to send.

A file name, or a text that a stranger sends, may contain any byte: line breaks and
colour codes that forge a log, marks that reverse the text around them, bytes that are
not UTF-8 and cannot be printed.
"""

import reprlib
from collections.abc import Iterable

# Largest number of characters to show of a foreign text.
LONGEST_TEXT = 300
# Largest number of characters to show of a refused name.
LONGEST_NAME = 80


def shown(name: object) -> str:
    r"""Return a name in which every character that does not print as itself is escaped.

    Parameters
    ----------
    name : object
        A path or text.

    Returns
    -------
    str
        Letters, accents and spaces unchanged; a line break as ``\n``, a byte that is
        not UTF-8 as ``\xff``, other invisible characters as ``\u202e``.
    """
    return "".join(c if c.isprintable() else _escaped(ord(c)) for c in str(name))


def listed(names: Iterable[object], most: int = 5) -> str:
    """Return the first names, escaped, separated by commas; dots stand for the rest."""
    texts = [shown(name) for name in names]
    return ", ".join(texts[:most]) + (", ..." if texts[most:] else "")


def _escaped(code: int) -> str:
    if code < 0x80:
        return chr(code).encode("unicode_escape").decode()
    if 0xDC80 <= code <= 0xDCFF:  # Python's form of a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def plain(text: object) -> str:
    """Return a foreign text as one line that is safe to print.

    Parameters
    ----------
    text : object
        A text from a client, of any length, with any characters.

    Returns
    -------
    str
        Control characters (line ends, terminal codes), invisible ones and halves of
        surrogate pairs escaped; `LONGEST_TEXT` characters at most.
    """
    # Cut first: escaping a text of many megabytes takes seconds.
    whole = str(text)
    escaped = shown(whole[:LONGEST_TEXT])
    cut = len(whole) > LONGEST_TEXT or len(escaped) > LONGEST_TEXT
    return escaped[:LONGEST_TEXT] + ("..." if cut else "")


def quoted(name: object) -> str:
    r"""Return a refused name in quotes that make look-alike letters visible.

    Parameters
    ----------
    name : object
        Anything that a stranger may have sent.

    Returns
    -------
    str
        One line of at most about `LONGEST_NAME` ASCII characters, without control
        characters.

    Examples
    --------
    >>> quoted("s\u0456te-a")
    "'s\\u0456te-a'"
    """
    # A long text is cut first: escaping all of it takes memory, too.
    text = ascii(name[:LONGEST_NAME] if isinstance(name, str) else name)
    return text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}..."


def short(value: object) -> str:
    """Return a value as text for a message: on one line, and cut if it is long."""
    return shown(_SHORT.repr(value))


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlong = 30
_SHORT.maxlevel = 2
