"""Text from elsewhere, made safe to show."""

import re
import unicodedata

# Joiners are format characters that scripts such as Persian need.
_JOINERS = "\u200c\u200d"
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_SUSPECT = re.compile(r"[^ -~]")


def visible(text: str) -> str:
    r"""Return a text on one line, with what a reader would not see written out.

    A name may hold escape sequences that rewrite a terminal, line breaks that forge a
    line of output, marks that reverse the direction of writing, or halves of
    characters that no file can hold.

    Parameters
    ----------
    text : str
        For example a file's or a class's name.

    Returns
    -------
    str
        Control and format characters, line separators and surrogates stand as
        ``\x1b`` or ``\u202e``; everything else is as it was.

    Examples
    --------
    >>> visible("cat\n\x1b[2J")
    'cat\\n\\x1b[2J'
    """
    return _SUSPECT.sub(lambda match: _written_out(match[0]), text)


def _written_out(character: str) -> str:
    if character in _JOINERS or unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape").decode("ascii")
