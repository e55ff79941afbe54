"""Register sites' public keys at the SuperLink, and record them in the registry."""

import fcntl
import itertools
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip2fl_cli import console
from clip2fl_cli.flower_command import (
    ANSI,
    environment,
    executable,
    parsed,
    write_connection,
)
from clip2fl_cli.sites.keys import fingerprint, public_key
from clip2fl_common.files import replacing
from clip2fl_common.site_registry import Site, SiteRegistry

CONNECTION = "server"
REMOVED = "unregistered"
# Flower's code of the error "Public key already in use".
KEY_IN_USE = "[code: 23]"


class RegistrationError(ValueError):
    """A registration failed; says why and what to do."""


class Flower:
    """Flower's commands that register nodes.

    Parameters
    ----------
    superlink : str
        ``HOST:PORT`` of the SuperLink.
    certificates : Path
        The federation's ca.crt.
    folder : Path
        An empty folder for the files that Flower needs.
    """

    def __init__(self, superlink: str, certificates: Path, folder: Path) -> None:
        write_connection(
            folder,
            CONNECTION,
            address=superlink,
            root_certificates=str(certificates.resolve()),
        )
        self._folder = folder

    def register(self, name: str, key: str) -> int | None:
        """Register a key; return its new node's id, or None if the key is in use."""
        half = self._folder / "key.pub"
        half.write_text(f"{key}\n", "utf-8")
        answer = self._ask("register", str(half), CONNECTION, "--name", name)
        if answer.get("success"):
            return int(answer["node-id"])
        if KEY_IN_USE in _reason(answer):
            return None
        raise RegistrationError(f"{name} is not registered: {_reason(answer)}")

    def nodes(self) -> dict[int, str]:
        """Return id and status of every node that was ever registered."""
        answer = self._ask("list", CONNECTION)
        if not answer.get("success"):
            raise RegistrationError(f"the nodes cannot be listed: {_reason(answer)}")
        return {int(n["node-id"]): str(n["status"]) for n in answer["nodes"]}

    def remove(self, site: Site) -> None:
        """Block a node from connecting; it may already be blocked."""
        answer = self._ask("unregister", str(site.node), CONNECTION)
        if answer.get("success"):
            return
        if self.nodes().get(site.node, REMOVED) != REMOVED:
            raise RegistrationError(f"{site.name} is not removed: {_reason(answer)}")

    def _ask(self, *arguments: str) -> dict[str, Any]:
        done = subprocess.run(
            [executable("flwr"), "supernode", *arguments, "--format", "json"],
            env=environment(self._folder),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        told = ANSI.sub("", done.stderr or done.stdout).strip()
        return parsed(done.stdout) or {"error-message": told}


def _reason(answer: dict[str, Any]) -> str:
    return " ".join(str(answer.get("error-message", answer)).split())


@dataclass(frozen=True)
class Server:
    """The server's public files, and the address of its SuperLink.

    Attributes
    ----------
    folder : Path
        Folder of the server, as ``deploy/make-keys.sh server`` makes it.
    superlink : str
        ``HOST:PORT`` of the SuperLink itself, which only the server reaches.
    """

    folder: Path
    superlink: str

    @property
    def certificate(self) -> Path:
        """The certificate of the federation's CA, which is public."""
        return self.folder / "trust" / "ca.crt"

    @property
    def registry(self) -> Path:
        """The file that binds names to keys."""
        return self.folder.absolute() / "registry" / "sites.json"

    @contextmanager
    def flower(self) -> Iterator[Flower]:
        """Lend Flower's commands, which need a temporary folder.

        Raises
        ------
        RegistrationError
            If the folder is no server's.
        """
        if not self.certificate.is_file():
            raise RegistrationError(
                f"{self.certificate} is not there: give the server's folder with "
                "--server, or make it with 'clip2fl serve' or deploy/make-keys.sh"
            )
        with tempfile.TemporaryDirectory(prefix="clip2fl-") as folder:
            yield Flower(self.superlink, self.certificate, Path(folder))


@contextmanager
def opened(path: Path) -> Iterator[SiteRegistry]:
    """Lend the registry, locked for other processes; empty if the file is missing."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
        # Readable for other users, since the ServerApp may run as one.
        path.parent.chmod(0o755)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield SiteRegistry.read(path) if os.path.lexists(path) else SiteRegistry()
    finally:
        os.close(folder)


def write(registry: SiteRegistry, path: Path) -> None:
    """Write a registry, completely or not at all, readable for the ServerApp's user."""
    with replacing(path, 0o644, only_writer=True) as file:
        file.write(registry.text().encode())


def register(
    registry: SiteRegistry,
    wanted: Sequence[tuple[str, str]],
    flower: Flower,
    path: Path,
    node: int | None = None,
) -> None:
    """Register sites, and write the registry after each site.

    Parameters
    ----------
    registry : SiteRegistry
        The current registry.
    wanted : sequence of tuple of str
        Name and key of each site.
    flower : Flower
        Connection to the SuperLink that registers the keys.
    path : Path
        File of the registry.
    node : int or None
        Id of a node whose key Flower knows, but the registry does not.

    Raises
    ------
    RegistryError
        If a name or a key belongs to another site; then no site is registered.
    RegistrationError
        If Flower refuses a registration.
    """
    trial = registry
    for name, key in wanted:
        known = trial.named(name)
        free = next(n for n in itertools.count(1) if trial.name_of(n) is None)
        trial = trial.with_site(Site(name, key, known.node if known else free))
    for name, key in wanted:
        known = registry.named(name)
        new = flower.register(name, key)
        what = "registered"
        if new is None:
            new = _known_node(registry, name, flower, node)
            what = "was registered before" if known else "written down"
        site = Site(name, key, new)
        if site != known:
            registry = registry.with_site(site)
            write(registry, path)
        console.answer(f"{name}: {what}, node {new}, key {fingerprint(key)}")


def _known_node(
    registry: SiteRegistry, name: str, flower: Flower, node: int | None
) -> int:
    """Return the node of a key that Flower already knows.

    Flower does not tell which node a key belongs to. A registration that was
    interrupted before the registry was written leaves one node without a site: this is
    the node.
    """
    status = flower.nodes()
    known = registry.named(name)
    if known and known.node in status:
        if status[known.node] != REMOVED:
            return known.node
        raise RegistrationError(
            f"{name} was removed at the SuperLink, where its key is of no use from "
            f"then on: clip2fl site remove {name}, and register a new key"
        )
    taken = {site.node for site in registry.sites if site.name != name}
    open_ids = sorted(n for n, s in status.items() if s != REMOVED and n not in taken)
    if not open_ids:
        raise RegistrationError(
            f"the key of {name} was removed before, and is of no use from then on: "
            "make another kit, or have the site make another key"
        )
    if node in open_ids:
        return node
    if node is None and len(open_ids) == 1 and REMOVED not in status.values():
        return open_ids[0]
    raise RegistrationError(
        f"the key of {name} is known to the SuperLink, but not which node it has"
        + (f" ({node} is none of them)" if node is not None else "")
        + ". If it is one of "
        f"{', '.join(map(str, open_ids))}, register it alone with "
        "--node-id ID (the site's log has it: 'SuperNode ID'); if it was removed, it "
        "is of no use any more: have the site make another one"
    )


def remove(
    registry: SiteRegistry, names: Sequence[str], flower: Flower, path: Path
) -> None:
    """Remove sites at Flower and from the registry.

    Raises
    ------
    RegistrationError
        If there is no such site, or if Flower refuses.
    """
    for name in names:
        site = registry.named(name)
        if site is None or site.name != name:
            raise RegistrationError(f"there is no site {name!r} in {path}")
    for name in names:
        site = registry.named(name)
        if site is not None:  # a name may be given twice
            flower.remove(site)
            registry = registry.without(name)
            write(registry, path)
        console.answer(f"{name}: removed")


def wanted(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Return names and keys of arguments ``SITE=KEY``.

    Raises
    ------
    RegistrationError, KeyFileError
        If an argument has another form, or its key cannot be used.
    """
    pairs = []
    for argument in arguments:
        name, equals, key = argument.partition("=")
        if not equals:
            raise RegistrationError(
                f"{argument!r} is not SITE=KEY, for example site-a=site-a.pub"
            )
        pairs.append((name, public_key(key)))
    return pairs
