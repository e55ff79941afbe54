"""Names from a disk as text that is safe to print, to log and to send.

A file's name may hold any byte: line breaks and colour codes that forge a log, marks
that reverse the text around them, bytes that are no UTF-8 and cannot be printed.
"""

from collections.abc import Iterable


def shown(name: object) -> str:
    r"""Return a name with everything escaped that does not print as itself.

    Parameters
    ----------
    name : object
        A path or text.

    Returns
    -------
    str
        Letters, accents and spaces as they are; a line break as ``\n``, a byte that is
        no UTF-8 as ``\xff``, other invisible characters as ``\u202e``.
    """
    return "".join(c if c.isprintable() else _escaped(ord(c)) for c in str(name))


def listed(names: Iterable[object], most: int = 5) -> str:
    """Return the first names, shown, separated by commas; dots stand for others."""
    texts = [shown(name) for name in names]
    return ", ".join(texts[:most]) + (", ..." if texts[most:] else "")


def _escaped(code: int) -> str:
    if code < 0x80:
        return chr(code).encode("unicode_escape").decode()
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


# Characters of a text from elsewhere that are shown.
LONGEST_TEXT = 300


def plain(text: object) -> str:
    """Return a text from elsewhere as one line that is safe to print.

    Parameters
    ----------
    text : object
        What a client sent: of any length, with any characters.

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
