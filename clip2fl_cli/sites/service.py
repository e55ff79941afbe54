"""Files that start a site's node at every boot: a systemd unit, a compose file."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from clip2fl_cli.sites.folder import CACHE, STATE
from clip2fl_cli.sites.node import NOTHING_HELPS, Node
from clip2fl_common.provenance import PACKAGE_ROOT

UNIT_FOLDER = Path("/etc/systemd/system")
SERVER_PARTS = ("proxy", "superexec", "superlink")
"""The server has units of these names (deploy/systemd)."""
COMPOSE_FILE = "compose.yaml"
# Of the image that deploy/Dockerfile builds: the health check asks there.
NODE_PORT = 9094
# What needs no quotes in a unit; % and \ would be read as something else.
_PLAIN_PATH = re.compile(r"[\w/.+,:@=-]+")


class ServiceError(ValueError):
    """A service that cannot be set up; says why and what to do."""


def unit_name(site: str) -> str:
    """Return the name of a site's systemd unit.

    Raises
    ------
    ServiceError
        If a part of the server has a unit of this name.
    """
    if site in SERVER_PARTS:
        raise ServiceError(
            f"clip2fl-{site}.service is the unit of the server's own {site}: register "
            "the site under another name, or start it otherwise (--start)"
        )
    return f"clip2fl-{site}.service"


def unit(site: str, folder: Path, user: str, mounts: Sequence[Path] = ()) -> str:
    """Return a systemd unit that runs a site's node.

    Parameters
    ----------
    site : str
        The site's name.
    folder : Path
        The site's folder.
    user : str
        The user who owns the folder.
    mounts : sequence of Path
        Paths that may lie on a network share, which is mounted before the node starts.

    Raises
    ------
    ServiceError
        If a path has characters that a unit would misread.
    """
    for path in (folder, Path(sys.executable), PACKAGE_ROOT):
        if not _PLAIN_PATH.fullmatch(str(path)):
            raise ServiceError(
                f"{str(path)!r} has characters that systemd would misread: use a path "
                "of letters, digits and /._+,:@=-"
            )
    cache = folder / CACHE
    # The unit works without a path that systemd would misread.
    shares = " ".join(filter(_PLAIN_PATH.fullmatch, map(str, mounts)))
    requires = f"RequiresMountsFor={shares}\n" if shares else ""
    return f"""\
# Written by clip2fl site join.
[Unit]
Description=CLIP2FL node {site}
After=network-online.target
Wants=network-online.target
{requires}
[Service]
User={user}
WorkingDirectory={PACKAGE_ROOT}
Environment=CLIP2FL_CACHE_DIR={cache} HF_HOME={cache}/huggingface
ExecStart={sys.executable} -m clip2fl_cli.app site start {folder}
Restart=always
# After a kill the server refuses a node that it still counts as connected.
RestartSec=10
# The check before the start has found what somebody must mend.
RestartPreventExitStatus={NOTHING_HELPS}
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={cache} {folder / STATE}
PrivateTmp=true
NoNewPrivileges=true

[Install]
WantedBy=multi-user.target
"""


def compose(node: Node, folder: Path, owner: tuple[int, int], image: str) -> str:
    """Return a compose file that runs a site's node in a container.

    Folders have the same paths inside and outside, so that `clip2fl site` works on both
    sides.

    Parameters
    ----------
    node : Node
        The node.
    folder : Path
        The site's folder.
    owner : tuple of int
        User and group who own the folder.
    image : str
        The image that deploy/Dockerfile builds.
    """
    read_only = [folder, node.data, *([node.teacher] if node.teacher else [])]
    volumes = [_bind(path, read_only=True) for path in dict.fromkeys(read_only)]
    volumes += [_bind(folder / name, read_only=False) for name in (CACHE, STATE)]
    cache = folder / CACHE
    service = {
        "image": image,
        "user": f"{owner[0]}:{owner[1]}",
        "command": [
            *("python", "-m", "clip2fl_cli.app", "site", "start", "--hold"),
            *("--port", str(NODE_PORT), _literal(folder)),
        ],
        "environment": {
            "CLIP2FL_CACHE_DIR": _literal(cache),
            "HF_HOME": _literal(cache / "huggingface"),
        },
        "volumes": volumes,
        "restart": "unless-stopped",
        "read_only": True,
        "tmpfs": ["/tmp:size=512m"],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "mem_limit": "${CLIP2FL_NODE_MEMORY:-4g}",
        "pids_limit": 1024,
        "logging": {"driver": "local"},
    }
    text = yaml.safe_dump({"services": {"node": service}}, sort_keys=False)
    return f"# Written by clip2fl site join.\n{text}"


def _bind(path: Path, *, read_only: bool) -> dict[str, Any]:
    place = _literal(path)
    return {"type": "bind", "source": place, "target": place, "read_only": read_only}


def _literal(path: Path) -> str:
    """Return a path in which compose replaces no variable."""
    return str(path).replace("$", "$$")
