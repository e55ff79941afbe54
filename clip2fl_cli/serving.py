"""All parts of a server on one machine, as one command: SuperLink, SuperExec, proxy.

The parts are those of docs/deployment.md, with the same certificates, limits and closed
interfaces. They run as one user: a server with more than a few sites, or with other
users, gives each part its own (deploy/systemd).
"""

import contextlib
import getpass
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from clip2fl_cli import console
from clip2fl_cli.flower_command import environment, executable
from clip2fl_cli.signals import HURRYING, Interrupted, NotedSignals, interrupting
from clip2fl_cli.sites.certificates import endings, is_named, names_of
from clip2fl_common.files import private_folder, replacing
from clip2fl_common.provenance import PACKAGE_ROOT

DEPLOY = PACKAGE_ROOT / "deploy"
START_SECONDS = 180.0
STOP_SECONDS = 15.0
POLL_SECONDS = 0.2
# Administrators' folders, which Debian leaves out of other users' PATH.
MORE_FOLDERS = ("/usr/sbin", "/sbin")


class ServerError(RuntimeError):
    """The server cannot be started, or a part of it has ended; says why."""


@dataclass(frozen=True)
class Serving:
    """What is served, and where.

    Attributes
    ----------
    folder : Path
        Keys, database, registry and logs of the server.
    names : sequence of str
        DNS names and IP addresses by which nodes reach this machine.
    port : int
        Port that nodes connect to.
    superlink_port : int
        Port of the SuperLink on this machine's loopback.
    """

    folder: Path
    names: Sequence[str]
    port: int
    superlink_port: int

    def __post_init__(self) -> None:
        """Work with absolute paths, since the parts run in the server's folder."""
        object.__setattr__(self, "folder", self.folder.absolute())

    @property
    def certificate(self) -> Path:
        """The certificate of the federation's CA."""
        return self.folder / "trust" / "ca.crt"


def serve(serving: Serving) -> None:
    """Make what is missing, start all parts, and wait for Ctrl-C.

    Raises
    ------
    ServerError
        If a program is missing, or a part does not start or ends.
    """
    nginx = _program("nginx", "nginx-light")
    _check_free(serving)
    if not serving.certificate.exists():
        _make_keys(serving)
    names = _names(serving)
    for text in endings(serving.folder, datetime.now(UTC)):
        console.tell(f"clip2fl: {text}", "bold red")
    for name in ("registry", "runs", "logs"):
        (serving.folder / name).mkdir(exist_ok=True)
    # The database has messages of runs.
    private_folder(serving.folder / "state")
    configuration = serving.folder / "nginx.conf"
    with replacing(configuration) as file:
        file.write(nginx_configuration(serving).encode())
    proxy = [nginx, "-c", str(configuration), "-e", "stderr", "-g", "daemon off;"]
    with interrupting(), _Parts(serving) as parts:
        try:
            parts.start("superlink", superlink_command(serving))
            # The others would wait longer and longer between their attempts.
            parts.wait_for(serving.superlink_port)
            parts.start("superexec", superexec_command(serving))
            parts.start("proxy", proxy)
            parts.wait_for(serving.port)
            console.tell(
                f"clip2fl: the server is ready on port {serving.port}, for nodes that "
                f"call it {', '.join(serving.names or names)}; Ctrl-C ends it"
            )
            while True:
                parts.check()
                time.sleep(POLL_SECONDS)
        except Interrupted:
            console.tell("clip2fl: the server ends")


def superlink_command(serving: Serving) -> list[str]:
    """Return the command line of the SuperLink."""
    keys = serving.folder / "superlink"
    return [
        *(sys.executable, str(DEPLOY / "superlink.py")),
        *("--host", "127.0.0.1", "--port", str(serving.superlink_port)),
        *("--ssl-ca-certfile", str(serving.certificate)),
        *("--ssl-certfile", str(keys / "server.crt")),
        *("--ssl-keyfile", str(keys / "server.key")),
        *("--isolation", "process", "--enable-supernode-auth"),
        *("--superexec-auth-secret-file", str(keys / "superexec.secret")),
        "--disable-runtime-dependency-installation",
        *("--database", str(serving.folder / "state" / "state.db")),
    ]


def superexec_command(serving: Serving) -> list[str]:
    """Return the command line of the SuperExec."""
    secret = serving.folder / "superexec" / "superexec.secret"
    return [
        executable("flower-superexec"),
        *("--runtime-api-address", f"127.0.0.1:{serving.superlink_port}"),
        *("--root-certificates", str(serving.certificate)),
        *("--superexec-auth-secret-file", str(secret)),
    ]


def nginx_configuration(serving: Serving) -> str:
    """Return deploy/nginx.conf with this server's paths and ports."""
    text = (DEPLOY / "nginx.conf").read_text("utf-8")
    state = serving.folder / "state"
    for old, new in (
        ("server superlink:8000;", f"server 127.0.0.1:{serving.superlink_port};"),
        ("listen 9092 ssl;", f"listen {serving.port} ssl;"),
        ("/keys/", f"{serving.folder}/"),
        ("/tmp/nginx", f"{state}/nginx"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    # Root would give nginx's workers another user, who may not enter the folder.
    user = f"user {getpass.getuser()};\n" if os.geteuid() == 0 else ""
    return user + text


def _program(name: str, package: str) -> str:
    folders = [os.environ.get("PATH", os.defpath), *MORE_FOLDERS]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise ServerError(f"{name} is not installed: apt-get install {package}")
    return found


def _check_free(serving: Serving) -> None:
    if not DEPLOY.is_dir():
        raise ServerError(
            f"{DEPLOY} is not there: a server needs the whole checkout of this program"
        )
    # nginx reads the path as text.
    if any(c.isspace() or c in "\"'\\;{}$" for c in str(serving.folder)):
        raise ServerError(
            f"{str(serving.folder)!r} has spaces or characters that nginx would "
            "misread: use another folder"
        )
    for port in (serving.port, serving.superlink_port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise ServerError(
                    f"port {port} cannot be used ({error.strerror}): end what uses it, "
                    "or give another with --port or --superlink-port"
                ) from None


def _make_keys(serving: Serving) -> None:
    names = serving.names or ["localhost"]
    done = subprocess.run(
        [str(DEPLOY / "make-keys.sh"), "server", str(serving.folder), *names],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ServerError(f"the keys cannot be made: {done.stderr.strip()}")
    console.tell(
        f"clip2fl: the server's keys are made. {serving.folder / 'ca' / 'ca.key'} "
        "signs certificates: move it to a medium that you lock away"
    )


def _names(serving: Serving) -> list[str]:
    """Return the names in the proxy's certificate, which nodes may call it by."""
    path = serving.folder / "proxy" / "proxy.crt"
    try:
        names = names_of(x509.load_pem_x509_certificate(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise ServerError(f"{path} cannot be read as a certificate ({error})") from None
    missing = [name for name in serving.names if not is_named(name, names)]
    if missing:
        raise ServerError(
            f"the server's certificate was made for {', '.join(names)}, and nodes that "
            f"call it {missing[0]} would refuse it: put ca.key back into "
            f"{serving.folder / 'ca'} and make another one with deploy/make-keys.sh "
            f"renew {serving.folder} {' '.join([*names, *missing])}"
        )
    return names


class _Parts:
    """The server's processes; when the block ends, all of them have ended."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "_Parts":
        return self

    def __exit__(self, *_: object) -> None:
        with NotedSignals(HURRYING) as signals:
            for process in reversed(self._processes.values()):
                process.terminate()
            end = time.monotonic() + STOP_SECONDS
            while signals.first is None and time.monotonic() < end:
                if all(p.poll() is not None for p in self._processes.values()):
                    break
                time.sleep(POLL_SECONDS)
            for process in self._processes.values():
                process.kill()
                process.wait()

    def start(self, name: str, command: list[str]) -> None:
        """Start a part, whose output goes to a file."""
        folder = self._serving.folder
        commands = str(Path(sys.executable).parent)
        with self._log(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command,
                cwd=folder,
                env={
                    **environment(folder / "state" / "flwr"),
                    "PATH": f"{commands}{os.pathsep}"
                    f"{os.environ.get('PATH', os.defpath)}",
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for this process, which ends them in order.
                start_new_session=True,
            )

    def wait_for(self, port: int) -> None:
        """Wait until the SuperLink answers on a port."""
        context = ssl.create_default_context(cafile=self._serving.certificate)
        # Without a proxy of the environment: the server is on this machine.
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}),
            urllib.request.HTTPSHandler(context=context),
        )
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            self.check()
            with (
                contextlib.suppress(OSError),
                opener.open(f"https://127.0.0.1:{port}/health", timeout=5),
            ):
                return
            time.sleep(POLL_SECONDS)
        raise ServerError(
            f"nothing answered on port {port} in {START_SECONDS:.0f} s: "
            f"{self._log('superlink').parent} says more"
        )

    def check(self) -> None:
        """Raise `ServerError` if a part has ended."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                log = self._log(name)
                last = log.read_text("utf-8", "replace").strip().splitlines()[-3:]
                raise ServerError(
                    f"the {name} has ended (status {process.returncode}); {log}: "
                    f"{' '.join(last)}"
                )

    def _log(self, name: str) -> Path:
        return self._serving.folder / "logs" / f"{name}.log"
