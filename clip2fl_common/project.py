"""Where this program's own pyproject.toml and experiments lie."""

import subprocess
import tomllib
from pathlib import Path
from typing import Any

from clip2fl_common.provenance import PACKAGE_ROOT

# A wheel carries them, since the folder of installed packages has none.
_SHIPPED = Path(__file__).resolve().parent / "shipped"

PROJECT = _SHIPPED if _SHIPPED.is_dir() else PACKAGE_ROOT
"""Folder of pyproject.toml, LICENSE and README.md, and of the experiments in conf/."""


def metadata() -> dict[str, Any]:
    """Return the tables of this program's pyproject.toml."""
    return tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))


def version() -> str:
    """Return this program's version, whether it is installed or a checkout."""
    return str(metadata()["project"]["version"])


def commit() -> str | None:
    """Return the commit of this program's code, with ``-dirty`` if it was changed.

    An app's folder has it in its pyproject.toml (`write_app_folder`), since nodes and
    the ServerApp run a copy without a repository.

    Returns
    -------
    str or None
        None if it is not known: for example in an installation from a wheel.
    """
    noted = metadata().get("tool", {}).get("clip2fl", {}).get("commit")
    if noted is not None:
        return str(noted)
    # Another project's repository may contain the folder of installed packages.
    if not (PACKAGE_ROOT / ".git").exists():
        return None
    command = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        found = subprocess.run(
            ["git", "-C", str(PACKAGE_ROOT), *command],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def experiments() -> list[str]:
    """Return the names of the experiments that come with the program, sorted."""
    return sorted(file.stem for file in (PROJECT / "conf").glob("*.toml"))


def experiment(path: Path, folder: Path = Path()) -> Path:
    """Return the file of an experiment that may come with the program.

    Parameters
    ----------
    path : Path
        A file, or a name such as ``demo`` for the ``conf/demo.toml`` of the program.
        An existing file of that name is used first.
    folder : Path
        Folder to which ``path`` is relative.

    Returns
    -------
    Path
        The path in the folder, if it is no experiment's name.
    """
    place = folder / path
    if str(path) in experiments() and (place.is_dir() or not place.exists()):
        return PROJECT / "conf" / f"{path}.toml"
    return place
