"""The site registry: a file that binds each site's name to its key and node.

Flower gives a node its id when its public key is registered, and the id stays the same.
On each connection the node proves with its key that it has this id. So the node id
binds a name to a key. `clip2fl site register` and `clip2fl site kit` write the file::

    {"format": 1, "sites": [
        {"name": "site-a", "node": "17264013853174281906",
         "key": "ecdsa-sha2-nistp384 AAAA..."}]}
"""

import errno
import json
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clip2fl_common.shown import quoted
from clip2fl_common.site_names import NAME_RULE, clashing, is_site_name

FORMAT = 1
# Bytes; far above what thousands of sites need.
LARGEST_FILE = 4 * 2**20
LARGEST_NODE = 2**64 - 1


class RegistryError(ValueError):
    """A registry that cannot be used, or that refuses a change; says why."""


@dataclass(frozen=True)
class Site:
    """One site in the registry.

    Attributes
    ----------
    name : str
        The site's name.
    key : str
        Public key: type and base64, as in the first two words of a .pub file.
    node : int
        Id that Flower gave to the key's node, from 1 to 2^64 - 1.
    """

    name: str
    key: str
    node: int


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    node: Annotated[str, Field(pattern=r"^[0-9]{1,20}$")]
    key: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64} [A-Za-z0-9+/]{1,1024}={0,2}$")]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1]
    sites: list[_Entry]


@dataclass(frozen=True)
class SiteRegistry:
    """Sites, each with a name, a key and a node of its own.

    Attributes
    ----------
    sites : tuple of Site
        In the order of registration.

    Raises
    ------
    RegistryError
        If a name is not valid, or if two sites share a name (ignoring case), a key or a
        node.
    """

    sites: tuple[Site, ...] = ()
    _by_node: dict[int, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check that no two sites share a name, a key or a node."""
        names: dict[str, Site] = {}
        keys: dict[str, Site] = {}
        nodes: dict[int, Site] = {}
        for site in self.sites:
            if not is_site_name(site.name):
                raise RegistryError(
                    f"{quoted(site.name)} is no name of a site; expected {NAME_RULE}"
                )
            other = names.setdefault(clashing(site.name), site)
            if other is not site:
                raise RegistryError(_taken(site.name, other.name))
            if keys.setdefault(site.key, site) is not site:
                raise RegistryError(
                    f"the key of {site.name} is registered for "
                    f"{keys[site.key].name}: each site needs a key of its own"
                )
            if not 0 < site.node <= LARGEST_NODE:
                raise RegistryError(f"{site.name} has the node {site.node}")
            if nodes.setdefault(site.node, site) is not site:
                raise RegistryError(
                    f"{site.name} and {nodes[site.node].name} have the same node "
                    f"{site.node}"
                )
        object.__setattr__(self, "_by_node", {n: s.name for n, s in nodes.items()})

    @classmethod
    def read(cls, path: Path) -> "SiteRegistry":
        """Return the registry in a file.

        Parameters
        ----------
        path : Path
            Absolute path of a regular file of at most 4 MiB, not writable by everybody.

        Returns
        -------
        SiteRegistry

        Raises
        ------
        RegistryError
            One line: the fault of the file, and how to fix it.
        """
        text = _content(path)
        try:
            found = _File.model_validate_json(text)
            return cls(
                tuple(Site(e.name, e.key, int(e.node)) for e in found.sites),
            )
        except ValidationError as error:
            reason = _first_problem(error)
        except RegistryError as error:
            reason = str(error)
        raise RegistryError(
            f"the site registry {path} is damaged ({reason}): restore it from a copy, "
            "or move it away and register the sites again with 'clip2fl site register'"
        )

    def text(self) -> str:
        """Return the content of a registry file."""
        entries = [
            {"name": site.name, "node": str(site.node), "key": site.key}
            for site in self.sites
        ]
        return json.dumps({"format": FORMAT, "sites": entries}, indent=1) + "\n"

    def name_of(self, node: int) -> str | None:
        """Return the name of a node's site; None if the node has none."""
        return self._by_node.get(node)

    def named(self, name: str) -> Site | None:
        """Return the site with this name, ignoring case; None if there is none."""
        wanted = clashing(name)
        return next((s for s in self.sites if clashing(s.name) == wanted), None)

    def with_key(self, key: str) -> Site | None:
        """Return the site with this key; None if there is none."""
        return next((s for s in self.sites if s.key == key), None)

    def check(self, name: str, key: str) -> None:
        """Check that a site may be registered, or is registered with this name and key.

        Parameters
        ----------
        name : str
            The site's name.
        key : str
            Type and base64 of its public key.

        Raises
        ------
        RegistryError
            If the name or the key belongs to another site.
        """
        if (other := self.named(name)) and (other.name, other.key) != (name, key):
            if other.name != name:
                raise RegistryError(_taken(name, other.name))
            raise RegistryError(
                f"{name} is registered with another key. If the site has a new key, "
                f"remove it first: clip2fl site remove {name}"
            )
        if (other := self.with_key(key)) and other.name != name:
            raise RegistryError(
                f"the key of {name} is registered for {other.name}: each site needs a "
                "key of its own"
            )

    def with_site(self, site: Site) -> "SiteRegistry":
        """Return a registry with a site added, or replaced if it has the same name."""
        self.check(site.name, site.key)
        others = tuple(s for s in self.sites if s.name != site.name)
        return SiteRegistry((*others, site))

    def without(self, name: str) -> "SiteRegistry":
        """Return a registry without the site of this name."""
        return SiteRegistry(tuple(s for s in self.sites if s.name != name))


def _taken(name: str, other: str) -> str:
    if name == other:
        return f"the name {name} is there twice"
    return (
        f"the name {name} differs from {other} only in case, and counts as the same: "
        "give the site another"
    )


def _content(path: Path) -> bytes:
    """Return the content of a registry file after checking the file itself."""
    if not path.is_absolute():
        raise RegistryError(
            f"federation.site-registry = {str(path)!r} is relative; the server runs "
            "in a folder of its own, so give an absolute path"
        )
    try:
        # O_NONBLOCK, since opening a pipe would wait for a writer.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        what = "is a link" if error.errno == errno.ELOOP else (error.strerror or "?")
        raise RegistryError(
            f"the site registry {path} cannot be read ({what}): make it with "
            "'clip2fl site register', and give the path of the file itself"
        ) from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise RegistryError(
                f"the site registry {path} is no file: give the path of the file that "
                "'clip2fl site register' has written"
            )
        if status.st_mode & stat.S_IWOTH:
            raise RegistryError(
                f"the site registry {path} can be changed by every user of this "
                f"machine: chmod o-w {path}, and check what it says"
            )
        with open(handle, "rb", closefd=False) as file:
            text = file.read(LARGEST_FILE + 1)
    finally:
        os.close(handle)
    if len(text) > LARGEST_FILE:
        raise RegistryError(
            f"the site registry {path} has more than {LARGEST_FILE} bytes: this is "
            "none that 'clip2fl site register' has written"
        )
    return text


def _first_problem(error: ValidationError) -> str:
    problem: dict[str, Any] = dict(error.errors(include_url=False)[0])
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {problem['msg']}" if place else str(problem["msg"])
