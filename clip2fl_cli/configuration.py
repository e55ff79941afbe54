"""The complete run configuration, from defaults, a file and settings."""

import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from clip2fl_common.config import ConfigError, RunConfig, Scalar, defaults
from clip2fl_common.config.dotted_keys import flatten
from clip2fl_common.config.files import parse_overrides, toml_pair
from clip2fl_common.project import experiment
from clip2fl_common.shown import shown
from server_app.foreign_files import (
    MEGABYTE,
    ForeignFileError,
    read_text,
)
from strategy.registry import refuse_unknown_method

MAX_TOML_BYTES = MEGABYTE
# Depth of nested tables; the parser's time grows with the square of a key's depth.
MAX_DOTS = 1000


def read_toml(file: Path) -> dict[str, Any]:
    """Read a TOML file from an untrusted source.

    Parameters
    ----------
    file : Path
        A file of at most `MAX_TOML_BYTES`.

    Returns
    -------
    dict

    Raises
    ------
    ForeignFileError
        If it cannot be read, or is not TOML.
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
    """Return the dotted keys in TOML tables; their values must be scalars.

    Parameters
    ----------
    table : mapping
        As `read_toml` returns it.
    where : str
        Name of the place, for errors.

    Returns
    -------
    dict of str to Scalar

    Raises
    ------
    ConfigError
        If a key is not bare, or a value is not a scalar allowed in a run.
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
    """Return the checked configuration that a run would use.

    All of the command's configurations come from this function, and a run accepts each
    of them.

    Parameters
    ----------
    run_config : Path or None
        TOML file of run configuration keys, or the name of an experiment that comes
        with the program.
    overrides : sequence of str
        ``key=value`` pairs, which take precedence over the file and ``own``.
    own : mapping or None
        Further keys, which take precedence over the file.

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
        refuse_unknown_method(config.method)
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
        for key, value in config.to_flat().items():
            file.write(f"{toml_pair(key, value)}\n")
        file.flush()
        yield Path(file.name)
