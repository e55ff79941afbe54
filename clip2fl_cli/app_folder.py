"""What Flower is given: a folder with the app's packages, and a run's configuration."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from clip2fl_common.config.files import complete_config, merge_run_config
from clip2fl_common.project import PROJECT, experiment
from clip2fl_common.provenance import ALL_CODE, PACKAGE_ROOT

BUNDLED = (".py", ".toml", ".md", ".yaml", ".yml", ".json", ".jsonl")
"""Kinds of files that Flower lets into an app's bundle."""


def checked_run_config(
    app: Path,
    run_config: Path | None,
    overrides: Sequence[str],
    resume: Path | None = None,
) -> str:
    """Merge a run's configuration; refuse what this program's own run would refuse.

    Parameters
    ----------
    app : Path
        Folder of the app; another app's configuration is its own affair.
    run_config, overrides, resume
        As `clip2fl_cli.simulation.simulate` takes them.

    Returns
    -------
    str
        TOML text with one dotted key per line.

    Raises
    ------
    ConfigError
        Names each offending key, what was found and what is allowed.
    """
    file = None if run_config is None else experiment(run_config)
    merged = merge_run_config(app, file, overrides, resume)
    if _is_own(app):
        config = complete_config(merged)
        # torch and flwr take two seconds, for which a wrong key need not wait.
        from strategy.registry import method_named

        method_named(config.method)
    return merged


def write_app_folder(app: Path, folder: Path) -> None:
    """Write the folder in which Flower finds an app.

    Flower walks through every file of the folder that it is given; in a checkout that
    means some ten thousand files of the virtual environment, and seconds. An installed
    program has no such folder: its packages lie among others.

    Parameters
    ----------
    app : Path
        Folder of the app. Of this program's own, `PROJECT`, the packages are found by
        themselves, be they in a checkout or installed.
    folder : Path
        Is made.
    """
    if not _is_own(app):
        shutil.copytree(app, folder, ignore=_left_out)
        return
    folder.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(PROJECT / name, folder / name)
    for package in ALL_CODE:
        shutil.copytree(PACKAGE_ROOT / package, folder / package, ignore=_left_out)


def _is_own(app: Path) -> bool:
    """Tell whether a folder is this program's, and no other Flower app's."""
    return app.resolve() == PROJECT


def _left_out(folder: str, names: list[str]) -> list[str]:
    """Return what no bundle may contain."""
    return [
        name
        for name in names
        if name not in (".gitignore", "LICENSE")
        and (
            name.startswith(".")
            or name == "__pycache__"
            or (Path(name).suffix not in BUNDLED and not Path(folder, name).is_dir())
        )
    ]
