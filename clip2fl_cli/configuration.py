"""The run configuration as a run would have it: defaults, file and settings."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from clip2fl_common.config import RunConfig, Scalar
from clip2fl_common.dotted_keys import flatten
from scripts.simulate import ROOT, merge_run_config


def defaults() -> dict[str, Scalar]:
    """Return every dotted key with its default in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    return cast(dict[str, Scalar], flatten(project["tool"]["flwr"]["app"]["config"]))


def resolve(
    run_config: Path | None,
    overrides: Sequence[str],
    own: Mapping[str, Scalar] | None = None,
) -> RunConfig:
    """Return the configuration that a run would get, checked.

    Parameters
    ----------
    run_config : Path or None
        TOML file of run configuration keys.
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
        If a key does not exist or a value is not allowed.
    """
    of_file = tomllib.loads(merge_run_config(ROOT, run_config, []))
    of_pairs = tomllib.loads(merge_run_config(ROOT, None, overrides))
    flat = {**defaults(), **flatten(of_file), **(own or {}), **flatten(of_pairs)}
    return RunConfig.from_run_config(cast(dict[str, Scalar], flat))
