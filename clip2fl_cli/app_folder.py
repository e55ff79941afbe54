"""The input of Flower: a folder with the app's packages, and a run's configuration."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from clip2fl_common.config import ConfigError, Dataset
from clip2fl_common.config.checks import HUB, HUGGING_FACE, LISTED
from clip2fl_common.config.files import complete_config, merge_run_config
from clip2fl_common.project import PROJECT, commit, experiment
from clip2fl_common.provenance import ALL_CODE, PACKAGE_ROOT
from clip2fl_common.shown import short
from strategy.registry import refuse_unknown_method

BUNDLED = (".py", ".toml", ".md", ".yaml", ".yml", ".json", ".jsonl")
"""Types of files that Flower allows in an app's bundle."""


def checked_run_config(
    app: Path,
    run_config: Path | None,
    overrides: Sequence[str],
    resume: Path | None = None,
    *,
    images_here: bool = False,
) -> str:
    """Merge a run's configuration, and check it if the app is this program.

    Parameters
    ----------
    app : Path
        Folder of the app; the configuration of another app is not checked.
    run_config, overrides, resume
        As `clip2fl_cli.simulation.simulate`.
    images_here : bool
        Whether the run reads its images on this machine.

    Returns
    -------
    str
        TOML text with one dotted key per line.

    Raises
    ------
    ConfigError
        Names each invalid key, its value and what is allowed.
    """
    file = None if run_config is None else experiment(run_config)
    merged = merge_run_config(app, file, overrides, resume)
    if _is_own(app):
        config = complete_config(merged)
        refuse_unknown_method(config.method)
        if images_here:
            refuse_missing_images(config.dataset)
    return merged


def refuse_missing_images(dataset: Dataset) -> None:
    """Raise if images are not where they must be; others are downloaded or drawn.

    Parameters
    ----------
    dataset : Dataset
        The ``dataset`` group of the run configuration.

    Raises
    ------
    ConfigError
        Names the key and the path.
    """
    places: dict[str, str] = {}
    if dataset.name in ("image-folder", "imagenet-lt", LISTED, HUGGING_FACE):
        places["root"] = dataset.root
    if dataset.name in ("imagenet-lt", LISTED):
        places |= {"train-list": dataset.train_list, "test-list": dataset.test_list}
    for name, path in places.items():
        is_there = os.path.isdir if name == "root" else os.path.exists
        if path and not path.startswith(HUB) and not is_there(os.path.expanduser(path)):
            raise ConfigError(
                f"dataset.{name} = {short(path)} is not there; give the absolute "
                "path of this machine's images"
            )


def write_app_folder(app: Path, folder: Path) -> None:
    """Write the folder from which Flower reads an app.

    Flower lists every file of the given folder. In a checkout these are about ten
    thousand files of the virtual environment, which takes seconds. An installed program
    has no such folder: its packages lie among other packages.

    Parameters
    ----------
    app : Path
        Folder of the app. For this program, `PROJECT`, the packages are copied from
        where they are, in a checkout or in an installation.
    folder : Path
        The folder to create.
    """
    if not _is_own(app):
        shutil.copytree(app, folder, ignore=_left_out)
        return
    folder.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(PROJECT / name, folder / name)
    if known := commit():
        with (folder / "pyproject.toml").open("a", encoding="utf-8") as file:
            file.write(f"\n[tool.clip2fl]\ncommit = {json.dumps(known)}\n")
    for package in ALL_CODE:
        shutil.copytree(PACKAGE_ROOT / package, folder / package, ignore=_left_out)


def _is_own(app: Path) -> bool:
    """Return whether a folder contains this program, not another Flower app."""
    return app.resolve() == PROJECT


def _left_out(folder: str, names: list[str]) -> list[str]:
    """Return the names that no bundle may contain."""
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
