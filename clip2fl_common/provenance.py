"""Identify the code that runs. Client and server must run the same code."""

import hashlib
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
SHARED_BY_BOTH_SIDES = ("clip2fl_common", "client_app")
# Packages that decide numbers, or whether messages are understood.
PACKAGES = ("flwr", "torch", "torchvision", "numpy", "pillow", "open_clip_torch")
ALL_CODE = (*SHARED_BY_BOTH_SIDES, "server_app", "strategy")
# Folder in which simulated clients keep the results of their training for other runs.
# `clip2fl compare` sets it for its own simulations. No server can set it on a node.
SHARED_TRAINING_VARIABLE = "CLIP2FL_SHARED_TRAINING"


@lru_cache
def code_fingerprint(
    root: Path = PACKAGE_ROOT, packages: tuple[str, ...] = SHARED_BY_BOTH_SIDES
) -> str:
    """Return a hash of the client's code and the code that it shares with the server.

    Flower's managed simulation imports client code from the folder in which its
    SuperLink was started, before the bundle of the current run. The server sends this
    hash with each request. A client that runs the code of another checkout then refuses
    the request, instead of returning numbers of unknown origin.

    Parameters
    ----------
    root : Path
        Folder of the packages.
    packages : tuple of str
        Packages to hash; `ALL_CODE` includes the server's own code.

    Returns
    -------
    str
    """
    digest = hashlib.sha256()
    for package in packages:
        for file in sorted((root / package).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def versions_here() -> dict[str, str]:
    """Return the versions of code, Python and packages on this machine, by name.

    A package that is not installed is missing.
    """
    found = {"code": code_fingerprint(), "python": python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def differences(there: dict[str, str], here: dict[str, str]) -> str:
    """Return how the versions at a site differ from the server's, in words.

    Parameters
    ----------
    there, here : dict of str to str
        As `versions_here` returns them. Names that only one of them has do not count.

    Returns
    -------
    str
        Such as ``torch 2.1.0 (server 2.2.0)``; empty if nothing differs.
    """
    return ", ".join(
        f"{name} {version} (server {here[name]})"
        for name, version in there.items()
        if version != here.get(name, version)
    )
