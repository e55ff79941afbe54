"""Reading files from untrusted sources, with bounds and one-line errors.

A run's folder may be damaged, come from a stranger, or contain something that is no
file: a folder, a FIFO that never answers, a link to itself. In each case reading ends,
takes a bounded amount of memory, and the error names the file and the field.
"""

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from clip2fl_common.shown import short, shown

MEGABYTE = 2**20
# A longer number is no count, and Python's parsing time grows with its length squared.
MAX_DIGITS = 20
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# Not on every system.
_OPEN_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)

Schema = TypeVar("Schema", bound=BaseModel)


class ForeignFileError(ValueError):
    """A file is not as expected; names the file, its content and what to do."""


def refuse_unless_regular(path: Path) -> None:
    """Refuse a path that is no regular file and no link to one, without opening it.

    Raises
    ------
    ForeignFileError
        Names the kind of the path, for example a folder.
    """
    try:
        _refuse_mode(path, path.stat().st_mode)
    except OSError as error:
        _refuse_unreadable(path, error)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Lend a regular file that is open for reading, without waiting for a FIFO.

    Parameters
    ----------
    path : Path
        A file, or a link to one.

    Yields
    ------
    binary file

    Raises
    ------
    ForeignFileError
        If it cannot be read, or is a folder, a FIFO, a socket or a device.
    """
    refuse_unless_regular(path)
    try:
        # A FIFO that replaces the file between the two calls must not block either.
        file = os.fdopen(os.open(path, _OPEN_FLAGS), "rb")
    except OSError as error:
        _refuse_unreadable(path, error)
    with file:
        _refuse_mode(path, os.fstat(file.fileno()).st_mode)
        yield file


def read_text(path: Path, limit: int) -> str:
    """Return a file's text.

    Parameters
    ----------
    path : Path
        A UTF-8 file.
    limit : int
        Largest allowed size in bytes.

    Returns
    -------
    str

    Raises
    ------
    ForeignFileError
        If it cannot be read, is empty, larger than ``limit`` or not UTF-8.
    """
    with opened(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            _refuse_unreadable(path, error)
    if not content:
        raise ForeignFileError(f"{shown(path)} is empty")
    if len(content) > limit:
        raise ForeignFileError(
            f"{shown(path)} has more than {limit:,} bytes, which is too large"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ForeignFileError(
            f"{shown(path)} is not UTF-8 text (byte {error.start:,})"
        ) from None


def read_json(path: Path, schema: type[Schema], limit: int) -> dict[str, Any]:
    """Return the checked JSON object in a file.

    Parameters
    ----------
    path : Path
        The file; errors name it.
    schema : type of BaseModel
        Fields and types that the object must have.
    limit : int
        Largest allowed size in bytes.

    Returns
    -------
    dict
        As in the file, including fields that the schema does not have.

    Raises
    ------
    ForeignFileError
        Names the file and the field.
    """
    return parse_json(read_text(path, limit), schema, shown(path))


def parse_json(text: str, schema: type[Schema], where: str) -> dict[str, Any]:
    """Return a checked JSON object.

    Numbers must be finite and have at most `MAX_DIGITS` digits. Keys must be unique.

    Parameters
    ----------
    text : str
        JSON.
    schema : type of BaseModel
        Fields and types that the object must have.
    where : str
        Name of the place, for errors.

    Returns
    -------
    dict

    Raises
    ------
    ForeignFileError
        Names the place and the field.
    """
    try:
        content = json.loads(
            text,
            object_pairs_hook=_without_twins,
            parse_constant=_refuse_constant,
            parse_int=_bounded_integer,
        )
        if _SURROGATE.search(text):
            # Half a character can be written to no file and no terminal.
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ForeignFileError(f"{where} is nested too deeply") from None
    except UnicodeEncodeError:
        raise ForeignFileError(f"{where} holds half of a character") from None
    except ValueError as error:
        raise ForeignFileError(f"{where} is not JSON: {shown(error)}") from None
    if not isinstance(content, dict):
        raise ForeignFileError(
            f"{where} holds a {type(content).__name__}, but it must be an object"
        )
    check(content, schema, where)
    return content


def check(content: Mapping[str, Any], schema: type[Schema], where: str) -> Schema:
    """Check the content of a file against a schema.

    Parameters
    ----------
    content : mapping
        The parsed content.
    schema : type of BaseModel
        Fields and types that the content must have.
    where : str
        Name of the place, for errors.

    Returns
    -------
    BaseModel

    Raises
    ------
    ForeignFileError
        Names the place, the first invalid field and its value.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise ForeignFileError(f"{where}: {_explain(dict(problems[0]))}{more}")


def _explain(problem: Mapping[str, Any]) -> str:
    field = shown(".".join(map(str, problem["loc"])))[:200]
    message = str(problem["msg"])
    if problem["type"] == "missing":
        return f"{field} is missing"
    if problem["type"] == "extra_forbidden":
        return f"{field} is not known"
    if problem["type"] == "value_error":
        # A problem of the whole object has no field; its message then describes it.
        said = message.removeprefix("Value error, ")
        return f"{field}: {said}" if field else said
    # pydantic's text is "Input should be ..." or "List should have ...".
    wanted = message.replace("Input should be ", "it must be ", 1)
    return f"{field} = {short(problem['input'])}, but {wanted[0].lower()}{wanted[1:]}"


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {short(key)} comes twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _bounded_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _refuse_mode(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise ForeignFileError(f"{shown(path)} is {kind}, but it must be a file")


def _refuse_unreadable(path: Path, error: OSError) -> NoReturn:
    reason = error.strerror or str(error)
    raise ForeignFileError(f"{shown(path)} cannot be read: {reason}") from None
