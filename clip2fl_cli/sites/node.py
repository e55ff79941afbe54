r"""A site's node: what it is started with, its check before the start, its process.

Flower splits ``--node-config`` at spaces and quotes, even at escaped quotes, and reads
each value as TOML. So special characters are written as TOML escapes such as
``\U00000022``.
"""

import contextlib
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from clip2fl_cli import console
from clip2fl_cli.flower_command import executable
from clip2fl_cli.proxies import direct_here
from clip2fl_cli.signals import Interrupted, interrupting
from clip2fl_common.config import ConfigError
from clip2fl_common.files import CACHE_VARIABLE

NOT_PLAIN = re.compile(r"[^A-Za-z0-9 ./_+=,:@~-]")
WAITING = ("server", "clock")
"""Checks whose problems may pass by themselves: the node may be started again."""
TRY_AGAIN, NOTHING_HELPS = 75, 78
"""Exit statuses of a node that did not start (EX_TEMPFAIL and EX_CONFIG): a service
manager may start it again, or must not, since somebody has to mend something first."""


class NodeError(ValueError):
    """A node that cannot be started like this; says why and what to do."""


@dataclass(frozen=True)
class Node:
    """What a node is started with.

    Attributes
    ----------
    site : str
        Name of the site.
    superlink : str
        ``HOST:PORT`` of the server's proxy.
    data : Path
        Folder with ``<class>/<image>``.
    key, certificate : Path
        The site's private key, and the certificate of the federation's CA.
    run_config : Path or None
        Configuration of the run: classes, image size and teacher are checked with it.
    policy : Path or None
        The site's own rules.
    teacher : Path or None
        The site's own folder of the teacher.
    teacher_fingerprint : str
        The fingerprint that the teacher must have; empty if it is not known.
    trusted_entities : Path or None
        Keys whose signed code may run here; None: the server's code runs unsigned.
    state, cache : Path or None
        Folders of the record of what the site has answered, and of the caches; None:
        those of the user.
    """

    site: str
    superlink: str
    data: Path
    key: Path
    certificate: Path
    run_config: Path | None = None
    policy: Path | None = None
    teacher: Path | None = None
    teacher_fingerprint: str = ""
    trusted_entities: Path | None = None
    state: Path | None = None
    cache: Path | None = None

    @classmethod
    def of_environment(cls, variables: Mapping[str, str]) -> "Node":
        """Return the node that environment variables describe.

        Parameters
        ----------
        variables : mapping of str to str
            ``SUPERLINK`` and ``SITE``; ``DATA_PATH`` (default ``/data``), ``KEYS``
            (``/keys``), ``CA`` (``$KEYS/ca.crt``); optionally ``RUN_CONFIG``,
            ``POLICY`` (``$KEYS/policy.toml`` if it exists), ``TEACHER_PATH`` and
            ``TRUSTED_ENTITIES``. The key is ``$KEYS/$SITE``.

        Raises
        ------
        NodeError
            If one is missing.
        """

        def path(name: str, default: Path | None = None) -> Path | None:
            return Path(variables[name]) if variables.get(name) else default

        for name in ("SUPERLINK", "SITE"):
            if not variables.get(name):
                raise NodeError(
                    f"the environment has no {name}: set SUPERLINK and SITE, or give "
                    "the folder that 'clip2fl site join' has made"
                )
        keys = path("KEYS") or Path("/keys")
        beside = keys / "policy.toml"
        return cls(
            site=variables["SITE"],
            superlink=variables["SUPERLINK"],
            data=path("DATA_PATH") or Path("/data"),
            key=keys / variables["SITE"],
            certificate=path("CA") or keys / "ca.crt",
            run_config=path("RUN_CONFIG"),
            # A broken link is an error, since it must not mean "no policy".
            policy=path("POLICY", beside if os.path.lexists(beside) else None),
            teacher=path("TEACHER_PATH"),
            trusted_entities=path("TRUSTED_ENTITIES"),
        )

    def __post_init__(self) -> None:
        """Check what Flower or the ClientApp would misunderstand."""
        for what, path in (
            ("data folder", self.data),
            ("policy", self.policy),
            ("teacher's folder", self.teacher),
            ("folder of the site's record", self.state),
        ):
            if path is None:
                continue
            if not path.is_absolute():
                raise NodeError(
                    f"the {what} {str(path)!r} is relative, and Flower runs in a "
                    "folder of its own: give an absolute path"
                )
            try:
                str(path).encode()
            except UnicodeEncodeError:
                raise NodeError(
                    f"the {what} {str(path)!r} is no UTF-8: rename it"
                ) from None
        if self.policy is not None and not self.policy.is_file():
            raise NodeError(f"the policy {self.policy} is no file")
        if self.trusted_entities is not None:
            check_trusted_entities(self.trusted_entities)

    @property
    def node_config(self) -> str:
        """The text for Flower's ``--node-config``."""
        values = {
            "data-path": self.data,
            "site": self.site,
            "policy": self.policy,
            "teacher-path": self.teacher,
            "site-state": self.state,
        }
        return " ".join(
            f"{key}={toml_string(str(value))}"
            for key, value in values.items()
            if value is not None
        )

    def command(self, port: int) -> list[str]:
        """Return the command line of the node's process.

        Parameters
        ----------
        port : int
            Port on this machine's loopback for the node's own processes.
        """
        return [
            executable("flower-supernode"),
            *("--superlink", self.superlink),
            *("--root-certificates", str(self.certificate)),
            *("--auth-supernode-private-key", str(self.key)),
            *("--node-config", self.node_config),
            *("--port", str(port)),
            *_option("--trusted-entities", self.trusted_entities),
        ]

    def environment(self) -> dict[str, str]:
        """Return the environment of the node's process."""
        commands = str(Path(sys.executable).parent)
        own = {}
        if self.cache is not None:
            own = {
                CACHE_VARIABLE: str(self.cache),
                "FLWR_HOME": str(self.cache / "flwr"),
            }
        return {
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            **own,
            **os.environ,
            **direct_here(os.environ),
            # Flower finds its own commands there.
            "PATH": f"{commands}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        }

    def doctor_arguments(self) -> list[str]:
        """Return the options with which doctor checks this node."""
        return [
            *("--data-path", str(self.data), "--superlink", self.superlink),
            *("--root-certificates", str(self.certificate)),
            *("--private-key", str(self.key)),
            *_option("--run-config", self.run_config),
            *_option("--policy", self.policy),
            *_option("--site-state", self.state),
            *_option("--teacher-path", self.teacher),
            *_option("--teacher-fingerprint", self.teacher_fingerprint or None),
        ]


def _option(name: str, value: object) -> list[str]:
    return [] if value is None else [name, str(value)]


def toml_string(text: str) -> str:
    """Return a text as a TOML string that contains no further quote or backslash."""
    return '"' + NOT_PLAIN.sub(lambda m: f"\\U{ord(m[0]):08X}", text) + '"'


def check_trusted_entities(path: Path) -> None:
    """Check that a file for --trusted-entities contains at least one key.

    Flower ignores an empty file, and would then run any code.

    Raises
    ------
    NodeError
        If the file is not a mapping of ids to ssh-ed25519 keys, or is empty.
    """
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise NodeError(f"the trusted entities {path}: {reason}") from None
    if (
        not isinstance(found, dict)
        or not found
        or not all(
            isinstance(name, str)
            and isinstance(key, str)
            and key.startswith("ssh-ed25519 ")
            for name, key in found.items()
        )
    ):
        raise NodeError(
            f"the trusted entities {path} must have at least one line "
            "fpk_...: 'ssh-ed25519 KEY'"
        )


def check(node: Node, *, all_checks: bool) -> int:
    """Check a node as doctor does, and print what to fix.

    Parameters
    ----------
    node : Node
        The node.
    all_checks : bool
        Whether to go on if the server cannot be reached. Reading all images takes long,
        and a service manager will start the node again.

    Returns
    -------
    int
        0: it can start; `TRY_AGAIN` or `NOTHING_HELPS`: it cannot.
    """
    from client_app import doctor

    os.environ.update(node.environment())
    try:
        found = doctor.examine(
            node.doctor_arguments(),
            "clip2fl site",
            stop_at=() if all_checks else WAITING,
        )
    except ConfigError as error:
        console.tell(f"clip2fl: {error}", "bold red")
        return NOTHING_HELPS
    problems = {finding.check for finding in found if finding.level == "problem"}
    if not problems:
        return 0
    return TRY_AGAIN if problems <= set(WAITING) else NOTHING_HELPS


def run(node: Node, port: int | None) -> NoReturn:
    """Become the node's process.

    Parameters
    ----------
    node : Node
        The node.
    port : int or None
        As in `Node.command`; None: one that is free.
    """
    command = node.command(free_port() if port is None else port)
    console.tell(f"clip2fl: starting the node of {node.site}; Ctrl-C ends it")
    sys.stdout.flush()
    os.execve(command[0], command, node.environment())


def free_port() -> int:
    """Return a free port, so that several nodes can run on one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def hold() -> None:
    """Wait until somebody ends the process.

    A container engine starts a container again whatever its exit status, unless it was
    ended by hand. A node that cannot start would then read all images again and again.
    """
    with contextlib.suppress(Interrupted), interrupting():
        console.tell(
            "clip2fl: the node waits and does nothing. Mend what is listed above, then "
            "start it again: docker restart checks anew"
        )
        while True:
            # Short, since another thread may have been given the signal.
            time.sleep(0.5)


def shell_line(command: list[str]) -> str:
    """Return a command as a person would type it."""
    return shlex.join(command)
