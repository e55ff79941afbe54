"""Register sites' public keys and update the registry: see register.sh."""

import argparse
import base64
import fcntl
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    SECP384R1,
    SECP521R1,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clip2fl_common.files import replacing
from clip2fl_common.site_registry import RegistryError, Site, SiteRegistry

PROFILE = "server"
# Larger files are refused; a public key has a few hundred bytes.
LARGEST_KEY = 16 * 1024
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
        (folder / "config.toml").write_text(
            f"[superlink.{PROFILE}]\n"
            f"address = {json.dumps(superlink)}\n"
            f"root-certificates = {json.dumps(str(certificates.resolve()))}\n",
            "utf-8",
        )
        self._folder = folder
        self._flwr = str(Path(sys.executable).with_name("flwr"))

    def register(self, name: str, key: str) -> int | None:
        """Register a key; return its new node's id, or None if the key is in use."""
        half = self._folder / "key.pub"
        half.write_text(f"{key}\n", "utf-8")
        answer = self._ask("register", str(half), PROFILE, "--name", name)
        if answer.get("success"):
            return int(answer["node-id"])
        if KEY_IN_USE in _reason(answer):
            return None
        raise RegistrationError(f"{name} is not registered: {_reason(answer)}")

    def nodes(self) -> dict[int, str]:
        """Return id and status of every node that was ever registered."""
        answer = self._ask("list", PROFILE)
        if not answer.get("success"):
            raise RegistrationError(f"the nodes cannot be listed: {_reason(answer)}")
        return {int(n["node-id"]): str(n["status"]) for n in answer["nodes"]}

    def remove(self, site: Site) -> None:
        """Block a node from connecting; it may already be blocked."""
        answer = self._ask("unregister", str(site.node), PROFILE)
        if answer.get("success"):
            return
        if self.nodes().get(site.node, REMOVED) != REMOVED:
            raise RegistrationError(f"{site.name} is not removed: {_reason(answer)}")

    def _ask(self, *arguments: str) -> dict[str, Any]:
        done = subprocess.run(
            [self._flwr, "supernode", *arguments, "--format", "json"],
            env={
                **os.environ,
                "FLWR_HOME": str(self._folder),
                "FLWR_TELEMETRY_ENABLED": "0",
                "FLWR_DISABLE_UPDATE_CHECK": "1",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            answer = None
        if isinstance(answer, dict):
            return answer
        return {"error-message": (done.stderr or done.stdout).strip()}


def _reason(answer: dict[str, Any]) -> str:
    return " ".join(str(answer.get("error-message", answer)).split())


def public_key(path: Path) -> str:
    """Return a public key in the format of the registry.

    Parameters
    ----------
    path : Path
        File with one line, as ssh-keygen writes it; ``-`` is the standard input.

    Returns
    -------
    str
        Type and base64 of the key.

    Raises
    ------
    RegistrationError
        If it is not a public key that Flower accepts.
    """
    try:
        with open(0 if path == Path("-") else path, "rb") as file:
            content = file.read(LARGEST_KEY + 1)
    except OSError as error:
        raise RegistrationError(f"{path}: {error.strerror}") from None
    if b"PRIVATE KEY" in content:
        raise RegistrationError(
            f"{path} is a private key, which must never leave its site. Delete it "
            "here, have the site make another one, and take the .pub"
        )
    lines = content.strip().splitlines()
    try:
        if len(content) > LARGEST_KEY or len(lines) != 1:
            raise ValueError(f"{len(lines)} lines, expected one")
        key = load_ssh_public_key(lines[0])
    except (ValueError, UnsupportedAlgorithm) as error:
        raise RegistrationError(
            f"{path} is no public key ({error}): take the .pub that "
            "'deploy/make-keys.sh own-key' has made at the site"
        ) from None
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(
        key.curve, SECP256R1 | SECP384R1 | SECP521R1
    ):
        raise RegistrationError(
            f"{path} is no key of a NIST elliptic curve, and Flower takes no other: "
            "have one made with 'deploy/make-keys.sh own-key'"
        )
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def fingerprint(key: str) -> str:
    """Return the fingerprint that ``ssh-keygen -l`` shows, to compare by telephone."""
    digest = hashlib.sha256(base64.b64decode(key.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


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
        print(f"{name}: {what}, node {new}, key {fingerprint(key)}", flush=True)


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
            f"then on: deploy/register.sh --remove {name}, and register a new key"
        )
    taken = {site.node for site in registry.sites if site.name != name}
    open_ids = sorted(n for n, s in status.items() if s != REMOVED and n not in taken)
    if not open_ids:
        raise RegistrationError(
            f"the key of {name} was removed before, and is of no use from then on: "
            "have the site make another one"
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
        print(f"{name}: removed", flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="register.sh",
        description="Bind sites' names to their public keys.",
        epilog="SUPERLINK, CA and REGISTRY of the environment are the defaults.",
    )
    parser.add_argument(
        "sites", nargs="*", metavar="SITE=KEY.pub", help="with --remove: SITE"
    )
    parser.add_argument("--remove", action="store_true", help="remove sites")
    parser.add_argument("--list", action="store_true", help="show the registry")
    parser.add_argument(
        "--node-id", type=int, metavar="ID", help="of one key that Flower knows already"
    )
    for option, variable, default in (
        ("--superlink", "SUPERLINK", "127.0.0.1:8000"),
        ("--root-certificates", "CA", "/etc/clip2fl/trust/ca.crt"),
        ("--registry", "REGISTRY", "/etc/clip2fl/registry/sites.json"),
    ):
        parser.add_argument(
            option,
            default=os.environ.get(variable) or default,
            metavar="HOST:PORT" if variable == "SUPERLINK" else "FILE",
            help="default: %(default)s",
        )
    options = parser.parse_args(arguments)
    if options.list == bool(options.sites) or (options.list and options.remove):
        parser.error("give sites, or --list and nothing else")
    if options.node_id is not None and (options.remove or len(options.sites) != 1):
        parser.error("--node-id goes with one site")
    return options


def _wanted(arguments: Sequence[str]) -> list[tuple[str, str]]:
    wanted = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals:
            raise RegistrationError(
                f"{argument!r} is not SITE=KEY.pub, for example site-a=site-a.pub"
            )
        wanted.append((name, public_key(Path(path))))
    return wanted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parse(arguments)
    path = Path(options.registry).absolute()
    try:
        if options.list:
            for site in SiteRegistry.read(path).sites:
                print(f"{site.name}  node {site.node}  key {fingerprint(site.key)}")
            return 0
        wanted = [] if options.remove else _wanted(options.sites)
        with (
            tempfile.TemporaryDirectory(prefix="clip2fl-") as folder,
            opened(path) as registry,
        ):
            flower = Flower(
                options.superlink, Path(options.root_certificates), Path(folder)
            )
            if options.remove:
                remove(registry, options.sites, flower, path)
            else:
                register(registry, wanted, flower, path, options.node_id)
    except (RegistryError, RegistrationError, OSError) as error:
        print(f"register.sh: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
