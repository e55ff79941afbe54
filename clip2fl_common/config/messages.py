"""What the checks of the run configuration say: one line for each problem."""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

INT64 = 2**63
SHOWN_CHARACTERS = 100
"""Of a key or a value; the rest is left out."""
SHOWN_PROBLEMS = 20
SCALAR = "a string, a number, true or false, and no list, table or date"


def shown(value: object) -> str:
    """Return a value as a message shows it: on one line, and not all of a long one."""
    if isinstance(value, int) and not -INT64 <= value < INT64:
        # Python refuses to write very long integers in decimal digits.
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | tuple | dict):
        # Its items may be such integers, or nested too deeply to be written.
        return "a table" if isinstance(value, dict) else "a list"
    text = repr(value)
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[: SHOWN_CHARACTERS - 3]}..."
    return text


def shown_key(key: object) -> str:
    """Return a key as a message shows it: without quotes, unless it is odd."""
    if isinstance(key, str) and key.isprintable() and 0 < len(key) < SHOWN_CHARACTERS:
        return key
    return shown(key)


def nearest(key: str, known: Iterable[str]) -> str | None:
    """Return the known key that somebody may have meant, if one is near."""
    # The search takes seconds for very long keys.
    close = difflib.get_close_matches(key[:SHOWN_CHARACTERS], known, n=1)
    return close[0] if close else None


def scalar_problem(value: object) -> str | None:
    """Return why a value can be no value of a run configuration.

    Parameters
    ----------
    value : object
        As a TOML file, JSON or a caller has it.

    Returns
    -------
    str or None
        What it must be instead; None where nothing is wrong.
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
        Dotted keys to what was given for them.
    known : sequence of str
        Every key that there must be.

    Yields
    ------
    str
        One line a problem.
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


def explain(problem: Mapping[str, Any]) -> str:
    """Return one of pydantic's problems with a key's value in one line."""
    key = ".".join(str(part) for part in problem["loc"])
    # pydantic's text is "Input should be ..."; the key and value say which input.
    wanted = str(problem["msg"]).replace("Input should be ", "")
    return f"{key} = {shown(problem['input'])}, but it must be {wanted}"


def listed(problems: Sequence[str]) -> str:
    """Return a message: one problem on its line, several below each other."""
    if len(problems) == 1:
        return f"run configuration: {problems[0]}"
    lines = [f"  - {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  and {len(problems) - SHOWN_PROBLEMS} more")
    return "\n".join(["run configuration: ", *lines])
