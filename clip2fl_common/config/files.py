"""Reading the run configuration: files, ``key=value`` pairs, and how they are merged.

People write these files and pairs. So each error names the wrong file or key on one
line, and reading neither waits nor uses unbounded memory.
"""

import json
import os
import re
import stat
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from clip2fl_common.config.dotted_keys import flatten
from clip2fl_common.config.messages import (
    SCALAR,
    nearest,
    scalar_problem,
    shown,
    shown_key,
)
from clip2fl_common.config.schema import RunConfig, defaults
from clip2fl_common.config.types import ConfigError, Scalar

FILE_BYTES = 4 * 2**20
"""Twice the size of 10,000 long class names."""
BYTE_ORDER_MARK = "\ufeff"

PAIR = re.compile(
    r"""\s*(?P<key>[\w.-]+)\s*=\s*"""
    r"""(?P<value>'[^']*'|"(?:[^"\\]|\\.)*"|[^\s'"]+)\s*"""
)


def read_text(path: Path) -> str:
    """Return the content of a file that the user named.

    Parameters
    ----------
    path : Path
        A regular file of UTF-8 text.

    Returns
    -------
    str

    Raises
    ------
    ConfigError
        If it is missing, unreadable, too large, a folder, a pipe or a device, or not
        UTF-8. The message omits the path; the caller adds it with the option's name.
    """
    try:
        # Opening a pipe that nobody writes to would wait for ever.
        with open(path, "rb", opener=_open_at_once) as file:
            content = file.read(FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # a path may hold a NUL
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot be read ({reason})") from None
    if len(content) > FILE_BYTES:
        raise ConfigError(f"is longer than {FILE_BYTES:,} bytes; is it the right file?")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    if text.startswith(BYTE_ORDER_MARK):
        raise ConfigError(
            "begins with a byte-order mark; save it as UTF-8 without one (BOM)"
        )
    return text


def _open_at_once(path: str, flags: int) -> int:
    handle = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError("it is a folder, a pipe or a device, and no file")
    return handle


def read_toml(path: Path) -> dict[str, object]:
    """Return the tables in a TOML file that the user named.

    Raises
    ------
    ConfigError
        As `read_text`, or if the file is not TOML; the message omits the path.
    """
    return _parsed(read_text(path))


def _parsed(text: str) -> dict[str, object]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError("is nested too deeply") from None
    except ValueError as error:  # also of an integer with thousands of digits
        raise ConfigError(str(error)) from None


def parse_overrides(texts: Sequence[str]) -> dict[str, object]:
    """Parse ``key=value`` pairs as ``flwr run --run-config`` understands them.

    Parameters
    ----------
    texts : Sequence[str]
        Each holds pairs separated by spaces, for example ``'seed=8 method="creff"'``.

    Returns
    -------
    dict[str, object]
        Dotted key to value; a later pair replaces an earlier one.

    Raises
    ------
    ConfigError
        If a text holds anything but pairs of a key and a TOML value.
    """
    pairs: dict[str, object] = {}
    for text in texts:
        position = 0
        while position < len(text):
            match = PAIR.match(text, position)
            try:
                if match is None:
                    raise ConfigError("not a key=value pair")
                found = flatten(_parsed(f"{match['key']} = {match['value']}"))
                if not found:
                    raise ConfigError("an empty table")
            except ConfigError as error:
                raise ConfigError(
                    f"--set: cannot read {shown(text[position:])} ({error}). Write "
                    "pairs such as 'seed=8 method=\"fedavg\"': strings need quotes, "
                    "booleans are true or false."
                ) from None
            pairs |= found
            position = match.end()
    return pairs


def default_settings(app: Path) -> dict[str, object]:
    """Return every dotted key of an app with its default value.

    Parameters
    ----------
    app : Path
        Directory of the app, with its ``pyproject.toml``.

    Returns
    -------
    dict of str to (bool, int, float or str)

    Raises
    ------
    ConfigError
        If the directory holds no Flower app.
    """
    file = app / "pyproject.toml"
    try:
        project: dict[str, Any] = read_toml(file)
        return flatten(project["tool"]["flwr"]["app"].get("config", {}))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{file} has no [tool.flwr.app], so this is no Flower app"
        ) from None


def merge_run_config(
    app: Path,
    run_config: Path | None,
    overrides: Sequence[str],
    resume: Path | None = None,
) -> str:
    """Merge a TOML file with pairs; flwr does not accept both together.

    Parameters
    ----------
    app : Path
        Folder of the app; its ``pyproject.toml`` declares every valid key.
    run_config : Path | None
        A TOML file of run configuration keys.
    overrides : Sequence[str]
        Pairs as in `parse_overrides`; they take precedence over the file.
    resume : Path | None
        Folder of an interrupted run. File and pairs take precedence over its
        configuration.

    Returns
    -------
    str
        TOML text with one dotted key per line.

    Raises
    ------
    ConfigError
        If a file or value cannot be read, or the app has no such key (Flower's own
        message for that does not name the key).
    """
    known = default_settings(app)
    merged: dict[str, object] = {}
    if resume is not None:
        merged |= _known(
            _interrupted_config(resume), known, f"--resume {_named(resume)}: "
        )
    if run_config is not None:
        source = f"--run-config {_named(run_config)}: "
        try:
            table = read_toml(run_config)
            _refuse_tables(table, known)
            found = flatten(table)
        except ConfigError as error:
            raise ConfigError(f"{source}{error}") from None
        merged |= _known(found, known, source)
    merged |= _known(parse_overrides(overrides), known, "")
    return "".join(f"{toml_pair(key, value)}\n" for key, value in merged.items())


def toml_pair(key: str, value: object) -> str:
    """Return a dotted key and its value, a scalar, as TOML and `parse_overrides` read.

    JSON writes booleans, numbers and strings exactly as TOML does, except for one
    character that only TOML forbids.
    """
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"{key} = {text}"


def complete_config(merged: str) -> RunConfig:
    """Return the checked configuration that a run of this program would use.

    Parameters
    ----------
    merged : str
        The return value of `merge_run_config`.

    Returns
    -------
    RunConfig

    Raises
    ------
    ConfigError
        Names each invalid key, its value and what is allowed.
    """
    flat = {**defaults(), **flatten(tomllib.loads(merged))}
    return RunConfig.from_run_config(cast(dict[str, Scalar], flat))


def _known(
    found: Mapping[str, object], known: Mapping[str, object], source: str
) -> Mapping[str, object]:
    for key in sorted(found.keys() - known.keys()):
        near = nearest(key, known)
        hint = f"did you mean {near!r}?" if near else "pyproject.toml has all keys"
        raise ConfigError(
            f"{source}run configuration key {shown(key)} does not exist; {hint}"
        )
    return found


def _named(path: Path) -> str:
    """Return a path as text for a message of one line."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def _refuse_tables(table: Mapping[str, object], known: Mapping[str, object]) -> None:
    """Refuse a table, even an empty one, in the place of a value."""
    for key in known:
        found: object = table
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping):
            raise ConfigError(f"{key} is a table, but it must be {SCALAR}")


def _interrupted_config(folder: Path) -> dict[str, object]:
    """Return the configuration of the run in a folder, set to resume there."""
    file = folder.absolute() / "config.json"
    try:
        try:
            config: dict[str, object] = {**json.loads(read_text(file))["config"]}
        except RecursionError:
            raise ConfigError("is nested too deeply") from None
        for key, value in config.items():
            if wanted := scalar_problem(value):
                raise ConfigError(
                    f"{shown_key(key)} = {shown(value)}, but it must be {wanted}"
                )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--resume {_named(folder)}: {_named(file)} cannot be read ({error}). "
            "Give the folder of a run; one that was stopped before it had this file is "
            "started anew"
        ) from None
    return {**config, "run.resume": str(file.parent)}
