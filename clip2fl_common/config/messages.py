"""Messages of the run configuration's checks: one line for each problem."""

import difflib
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

INT64 = 2**63
SHOWN_CHARACTERS = 100
"""Length to which a key or value is cut in a message."""
SHOWN_PROBLEMS = 20
SCALAR = "a string, a number, true or false, and no list, table or date"


def shown(value: object) -> str:
    """Return a value as text for a message: on one line, and cut if it is long."""
    if isinstance(value, int) and not -INT64 <= value < INT64:
        # Python refuses to write very long integers in decimal digits.
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | tuple | dict):
        # Its items may be such integers, or be nested too deeply for `repr`.
        return "a table" if isinstance(value, dict) else "a list"
    text = repr(value)
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[: SHOWN_CHARACTERS - 3]}..."
    return text


def shown_key(key: object) -> str:
    """Return a key as text for a message, quoted only if it has unusual characters."""
    if isinstance(key, str) and key.isprintable() and 0 < len(key) < SHOWN_CHARACTERS:
        return key
    return shown(key)


def nearest(key: str, known: Iterable[str]) -> str | None:
    """Return the known key that the user probably meant, or None."""
    # The search takes seconds for very long keys.
    close = difflib.get_close_matches(key[:SHOWN_CHARACTERS], known, n=1)
    return close[0] if close else None


def scalar_problem(value: object) -> str | None:
    """Return the reason why a value cannot be a value of a run configuration.

    Parameters
    ----------
    value : object
        A value from a TOML file, JSON or a caller.

    Returns
    -------
    str or None
        What the value must be instead; None if it is valid.
    """
    if not isinstance(value, bool | int | float | str):
        return SCALAR
    if isinstance(value, int) and not -INT64 <= value < INT64:
        return "within the range of 64-bit integers"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        return "valid Unicode text"
    return None


def key_problems(flat: Mapping[str, object], known: Sequence[str]) -> Iterator[str]:
    """Name unknown and missing keys, and values that are no scalars.

    Parameters
    ----------
    flat : mapping
        Dotted keys to the given values.
    known : sequence of str
        Every key that must be present.

    Yields
    ------
    str
        One line for each problem.
    """
    for key, value in flat.items():
        if key not in known:
            close = nearest(str(key), known)
            hint = f"; did you mean {close}?" if close else ""
            yield f"{shown_key(key)} is not a key of the run configuration{hint}"
        elif wanted := scalar_problem(value):
            yield f"{key} = {shown(value)}, but it must be {wanted}"
    for key in known:
        if key not in flat:
            yield (
                f"{key} is missing; its default stands in pyproject.toml, "
                "[tool.flwr.app.config]"
            )


def explain(problem: Mapping[str, Any], auto: Container[str] = ()) -> str:
    """Return one line for one of pydantic's problems with a key's value.

    Parameters
    ----------
    problem : mapping
        One of ``ValidationError.errors()``.
    auto : container of str
        Keys that may also be ``"auto"``.

    Returns
    -------
    str
    """
    key = ".".join(str(part) for part in problem["loc"])
    # pydantic's text is "Input should be ..."; the key and value say which input.
    wanted = str(problem["msg"]).replace("Input should be ", "")
    if key in auto:
        wanted += " or 'auto'"
    return f"{key} = {shown(problem['input'])}, but it must be {wanted}"


def listed(problems: Sequence[str]) -> str:
    """Return the message: one problem on the first line, several below each other."""
    if len(problems) == 1:
        return f"run configuration: {problems[0]}"
    lines = [f"  - {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  and {len(problems) - SHOWN_PROBLEMS} more")
    return "\n".join(["run configuration: ", *lines])
