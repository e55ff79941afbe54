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
