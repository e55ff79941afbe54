"""What tests need of the machine: programs, packages, and the rights of root.

Without it a test skips. Under continuous integration (``CI=true``) it fails instead:
nobody reads the reasons for skips there, and the machine can be set up.
"""

import os
import shutil
from importlib.util import find_spec
from typing import NoReturn

import pytest


def cannot_run(reason: str) -> NoReturn:
    """Skip the test that is running; where ``CI`` is ``true``, fail it.

    Parameters
    ----------
    reason : str
        What is missing.
    """
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}; with CI=true a test does not skip", pytrace=False)
    pytest.skip(reason)


def find_tool(name: str) -> str | None:
    """Return the path of a program, if it is installed.

    Administrators' folders count, too: Debian's nginx is not in other users' PATH.
    """
    folders = [os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
    return shutil.which(name, path=os.pathsep.join(folders))


def needed_tool(name: str) -> str:
    """Return the path of a program without which the running test cannot run."""
    found = find_tool(name)
    if found is None:
        cannot_run(f"{name} is not installed")
    return found


def need_package(name: str) -> None:
    """End the running test unless a package of an optional extra is installed."""
    if find_spec(name) is None:
        cannot_run(f"the package {name} is not installed")


def need_root(purpose: str) -> None:
    """End the running test unless root runs it.

    Parameters
    ----------
    purpose : str
        What needs root, as a verb and its object.
    """
    if os.geteuid() != 0:
        cannot_run(f"only root can {purpose}")
