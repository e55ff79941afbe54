"""The run configuration as a run would have it: defaults, file and settings."""

import json
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from clip2fl_common.config import ConfigError, RunConfig, Scalar, defaults
from clip2fl_common.config.dotted_keys import flatten
from clip2fl_common.config.files import parse_overrides
from clip2fl_common.project import experiment
from clip2fl_common.shown import shown
from server_app.foreign_files import (
    MEGABYTE,
    ForeignFileError,
    read_text,
)
from strategy.registry import method_named

MAX_TOML_BYTES = MEGABYTE
# Tables in tables; the parser takes time that grows with the square of a key's depth.
MAX_DOTS = 1000


def read_toml(file: Path) -> dict[str, Any]:
    """Read a TOML file that may come from anybody.

    Parameters
    ----------
    file : Path
        At most `MAX_TOML_BYTES`.

    Returns
    -------
    dict

    Raises
    ------
    ForeignFileError
        If it cannot be read, or is no TOML.
    """
    text = read_text(file, MAX_TOML_BYTES)
    where = shown(file)
    if any(line.split('"')[0].count(".") > MAX_DOTS for line in text.split("\n")):
        raise ForeignFileError(f"{where} is nested too deeply")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ForeignFileError(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise ForeignFileError(f"{where}: {shown(error)}") from None


def flat_settings(table: Mapping[str, object], where: str) -> dict[str, Scalar]:
    """Return the dotted keys in TOML tables, whose values must be scalars.

    Parameters
    ----------
    table : mapping
        As `read_toml` returns it.
    where : str
        Names its place in errors.

    Returns
    -------
    dict of str to Scalar

    Raises
    ------
    ConfigError
        If a key is not bare, or a value is no scalar that a run may have.
    """
    try:
        return cast(dict[str, Scalar], flatten(table))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def resolve(
    run_config: Path | None,
    overrides: Sequence[str],
    own: Mapping[str, Scalar] | None = None,
) -> RunConfig:
    """Return the configuration that a run would get, checked.

    This is the one place where the command's configurations come from: what it
    returns, a run accepts.

    Parameters
    ----------
    run_config : Path or None
        TOML file of run configuration keys, or the name of an experiment that comes
        with the program.
    overrides : sequence of str
        ``key=value`` pairs that win over the file and over ``own``.
    own : mapping or None
        Further keys that win over the file.

    Returns
    -------
    RunConfig

    Raises
    ------
    ValueError
        If a key or the method does not exist, a value is not allowed, or the file
        cannot be read.
    """
    run_config = run_config and experiment(run_config)
    of_file = (
        {}
        if run_config is None
        else flat_settings(read_toml(run_config), shown(run_config))
    )
    of_pairs = cast(dict[str, Scalar], parse_overrides(overrides))
    try:
        config = RunConfig.from_run_config(
            {**defaults(), **of_file, **(own or {}), **of_pairs}
        )
        method_named(config.method)
    except ConfigError as error:
        won = {*(own or {}), *of_pairs}
        if run_config and any(key in str(error) for key in of_file.keys() - won):
            raise ConfigError(f"{shown(run_config)}: {error}") from None
        raise
    return config


@contextmanager
def as_file(config: RunConfig) -> Iterator[Path]:
    """Write a configuration to a temporary TOML file, as a run reads it."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
        # JSON writes booleans, numbers and strings exactly as TOML does, but for one
        # character that only TOML forbids.
        for key, value in config.to_flat().items():
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            file.write(f"{key} = {text}\n")
        file.flush()
        yield Path(file.name)
