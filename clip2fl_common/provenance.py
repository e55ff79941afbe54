"""Identify the code that runs. Client and server must run the same code."""

import hashlib
from functools import lru_cache
from pathlib import Path

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
SHARED_BY_BOTH_SIDES = ("clip2fl_common", "client_app")
ALL_CODE = (*SHARED_BY_BOTH_SIDES, "server_app", "strategy")


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
