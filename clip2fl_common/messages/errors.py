"""The reasons of errors that come in place of replies."""

import re

from flwr.app import Message

from clip2fl_common.shown import plain

# What Flower makes of an exception in a ClientApp: its class, and its text.
_EXCEPTION = re.compile(r"<class '([\w.]+)'>:<'(.*)'>", re.DOTALL)
# Their exceptions say in words what is wrong.
_OURS = ("client_app.", "clip2fl_common.")


def error_reason(message: Message) -> str:
    """Return why a client sent no reply, as one line that is safe to print.

    Parameters
    ----------
    message : Message
        An error.

    Returns
    -------
    str
        The text of this program's own exceptions; of others also the class, for
        example ``MemoryError: no space``; else what Flower says.
    """
    reason = str(message.error.reason)
    found = _EXCEPTION.fullmatch(reason)
    if found is None:
        return plain(reason)
    name, text = found.groups()
    if not name.startswith(_OURS):
        text = f"{name.rpartition('.')[2]}: {text}"
    return plain(text)
