"""Where this program's own pyproject.toml and experiments lie."""

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


def experiments() -> list[str]:
    """Return the names of the experiments that come with the program, sorted."""
    return sorted(file.stem for file in (PROJECT / "conf").glob("*.toml"))


def experiment(path: Path) -> Path:
    """Return the file of an experiment that may come with the program.

    Parameters
    ----------
    path : Path
        A file, or a name such as ``demo`` for the ``conf/demo.toml`` of the program.
        An existing file of that name is used first.

    Returns
    -------
    Path
        ``path`` itself, if it is no experiment's name.
    """
    if str(path) in experiments() and not path.exists():
        return PROJECT / "conf" / f"{path}.toml"
    return path
