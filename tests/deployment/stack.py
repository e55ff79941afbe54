"""A server and nodes as real processes, each in a network namespace of its own.

The machines are joined by a bridge in one more namespace, so no packet leaves them.
The server is set up as docs/deployment.md says: SuperLink on its own loopback only,
nginx with the repository's configuration in front. Each node makes its own key; names
are bound to keys by the registry that `clip2fl site register` writes.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from clip2fl_cli.live import RunWatch
from clip2fl_cli.watch import Views
from tests.defaults import ROOT
from tests.tools import cannot_run, find_tool, needed_tool

SERVER_IP = "10.77.0.1"
PORT = 9092
BIN = Path(sys.executable).parent


def missing() -> str:
    """Return why such a federation cannot be started here; empty: it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "nginx", "openssl", "ssh-keygen"):
        if find_tool(tool) is None:
            return f"{tool} is not installed"
    name = f"c2f{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True)
    if made.returncode:
        return "network namespaces cannot be made here"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


def wait_for(what: str, condition: Callable[[], object], seconds: float) -> None:
    """Wait until a condition holds; fail with its name."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)


@dataclass
class Machine:
    """A network namespace with a folder, and the processes that run in it."""

    name: str
    folder: Path
    environment: Mapping[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        """Name of the network namespace."""
        return f"c2f{os.getpid()}-{self.name}"

    def command(self, arguments: Sequence[object]) -> list[str]:
        """Return a command line that runs in the machine."""
        return ["ip", "netns", "exec", self.namespace, *map(str, arguments)]

    def start(self, label: str, *arguments: object) -> None:
        """Start a process whose output goes to ``LABEL.log``."""
        log: IO[bytes] = (self.folder / f"{label}.log").open("ab")
        with log:
            self.processes[label] = subprocess.Popen(
                self.command(arguments),
                cwd=self.folder,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, *arguments: object, timeout: float = 120) -> str:
        """Run a command to its end and return what it printed."""
        done = subprocess.run(
            self.command(arguments),
            cwd=self.folder,
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=timeout,
        )
        return done.stdout

    def log(self, label: str) -> str:
        """Return what a process has printed so far."""
        return (self.folder / f"{label}.log").read_text("utf-8", "replace")

    def kill(self, label: str, signum: int = signal.SIGKILL) -> None:
        """Kill a process and all that it started."""
        process = self.processes.pop(label)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        process.wait()

    def kill_all(self) -> None:
        """Kill everything in the namespace, and nothing else."""
        for label in list(self.processes):
            self.kill(label)
        found = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True
        )
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def link(self, up: bool) -> None:
        """Plug the machine in, or pull the plug."""
        self.run("ip", "link", "set", "eth0", "up" if up else "down")


class Stack:
    """A server, a key folder and nodes.

    Parameters
    ----------
    folder : Path
        Where everything is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = folder / "keys"
        self.ca = self.keys / "trust" / "ca.crt"
        self.registry = self.keys / "registry" / "sites.json"
        self._hub = Machine("hub", folder, {})
        self._machines: list[Machine] = []
        self._ip("netns", "add", self._hub.namespace)
        self._in_hub("link", "add", "br0", "type", "bridge")
        self._in_hub("link", "set", "br0", "up")
        self.server = self._machine("server", SERVER_IP)
        self.nodes: dict[str, Machine] = {}
        self.make_keys = ROOT / "deploy" / "make-keys.sh"
        self._run(self.make_keys, "server", self.keys, SERVER_IP)

    def _run(self, *arguments: object) -> None:
        subprocess.run([str(a) for a in arguments], check=True, capture_output=True)

    def _ip(self, *arguments: str) -> None:
        self._run("ip", *arguments)

    def _in_hub(self, *arguments: str) -> None:
        self._ip("-n", self._hub.namespace, *arguments)

    def _machine(self, name: str, address: str, programs: Path = BIN) -> Machine:
        folder = self.folder / name
        folder.mkdir()
        environment = {
            "PATH": f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(folder),
            "FLWR_HOME": str(folder / "flwr"),
            "CLIP2FL_CACHE_DIR": str(folder / "cache"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        machine = Machine(name, folder, environment)
        number = len(self._machines)
        self._machines.append(machine)
        self._ip("netns", "add", machine.namespace)
        peer = f"port{number}"
        self._in_hub("link", "add", peer, "type", "veth", "peer", "name", "eth0",
                     "netns", machine.namespace)  # fmt: skip
        self._in_hub("link", "set", peer, "master", "br0", "up")
        for command in (
            ["addr", "add", f"{address}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
        ):
            self._ip("-n", machine.namespace, *command)
        return machine

    def start_server(self) -> None:
        """Start SuperLink, SuperExec and proxy, and wait until they answer."""
        self.start_superlink()
        self.server.start(
            *("superexec", BIN / "flower-superexec"),
            *("--root-certificates", self.ca),
            *("--runtime-api-address", "127.0.0.1:8000"),
            *(
                "--superexec-auth-secret-file",
                self.keys / "superexec" / "superexec.secret",
            ),
        )
        self.start_proxy()

    def start_proxy(self) -> None:
        """Start nginx in front of port 8000."""
        server = self.server
        config = (ROOT / "deploy" / "nginx.conf").read_text("utf-8")
        for old, new in (
            ("server superlink:8000;", "server 127.0.0.1:8000;"),
            ("/keys/", f"{self.keys}/"),
            # Its own, as the tests may run next to another nginx.
            ("/tmp/nginx", f"{server.folder}/nginx"),
        ):
            assert old in config
            config = config.replace(old, new)
        # Root would give the workers another user, who may not see the folder.
        config = f"user root;\n{config}"
        (server.folder / "nginx.conf").write_text(config, "utf-8")
        server.start(
            *("nginx", needed_tool("nginx"), "-c", server.folder / "nginx.conf"),
            *("-e", "stderr", "-g", "daemon off;"),
        )

    def start_superlink(self) -> None:
        """Start the SuperLink on its own loopback, and wait until it answers."""
        superlink = self.keys / "superlink"
        self.server.start(
            *("superlink", sys.executable, ROOT / "deploy" / "superlink.py"),
            *("--ssl-ca-certfile", self.ca),
            *("--ssl-certfile", superlink / "server.crt"),
            *("--ssl-keyfile", superlink / "server.key"),
            *("--host", "127.0.0.1", "--port", "8000", "--isolation", "process"),
            *("--superexec-auth-secret-file", superlink / "superexec.secret"),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
            *("--database", self.server.folder / "state.db"),
        )
        code = (
            "import ssl, urllib.request as r; "
            f"c = ssl.create_default_context(cafile={str(self.ca)!r}); "
            "print(r.urlopen('https://127.0.0.1:8000/health', context=c).status)"
        )
        wait_for(
            "SuperLink",
            lambda: "200" in self.server.run(sys.executable, "-c", code).split(),
            90,
        )

    def add_node(
        self, name: str, register: bool = True, programs: Path = BIN
    ) -> Machine:
        """Make a machine for a node, which makes its key, and register the key.

        ``programs`` is the folder of its Python and of Flower's commands.
        """
        node = self._machine(name, f"10.77.0.{10 + len(self.nodes)}", programs)
        self.nodes[name] = node
        self._run(self.make_keys, "own-key", node.folder / "keys", name)
        shutil.copy(self.ca, node.folder / "keys")
        if register:
            printed = self.register(name)
            assert f"{name}: registered" in printed, printed
        return node

    def public_key(self, name: str) -> Path:
        """Return the public half of a node's key."""
        return self.nodes[name].folder / "keys" / f"{name}.pub"

    def register(self, *names: str) -> str:
        """Register nodes' keys at the server."""
        return self.run_site("register", *(f"{n}={self.public_key(n)}" for n in names))

    def run_site(self, *arguments: object) -> str:
        """Return what ``clip2fl site`` prints at the server."""
        return self.server.run(
            *("env", f"--chdir={ROOT}", f"CLIP2FL_SERVER_FOLDER={self.keys}"),
            *(sys.executable, "-m", "clip2fl_cli.app", "site", *arguments),
        )

    def flwr(self, *arguments: object) -> str:
        """Return what a ``flwr`` command prints at the server."""
        home = self.server.folder / "flwr"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            '[superlink.server]\naddress = "127.0.0.1:8000"\n'
            f'root-certificates = "{self.ca}"\n'
        )
        return self.server.run(BIN / "flwr", *arguments)

    def start_node(
        self, name: str, data: Path, site: str = "", ca: Path | None = None
    ) -> None:
        """Start a node by its command, again and again as systemd would.

        It calls itself ``site``, or else by its own name.
        """
        node = self.nodes[name]
        keys = node.folder / "keys"
        node.start(
            *("supernode", "/bin/sh", "-c", 'while :; do "$@"; sleep 10; done', "-"),
            *("env", f"--chdir={ROOT}", f"SUPERLINK={SERVER_IP}:{PORT}"),
            *(f"SITE={site or name}", f"DATA_PATH={data}", f"KEYS={keys}"),
            f"CA={ca or keys / 'ca.crt'}",
            *(sys.executable, "-m", "clip2fl_cli.app", "site", "start"),
        )

    def write_secure_rules(self, name: str) -> None:
        """Write a node's policy for secure sums, with the registered sites trusted."""
        node = self.nodes[name]
        # Each site has its own copy, which its people have compared with the others.
        trusted = node.folder / "trusted.json"
        shutil.copy(self.registry, trusted)
        rules = (
            "secure-only = true",
            f'identity-key = "{node.folder / "keys" / name}"',
            f'trusted-sites = "{trusted}"',
        )
        policy = node.folder / "keys" / "policy.toml"
        policy.write_text("\n".join(rules), "utf-8")

    def wait_until_online(self, number: int, seconds: float) -> None:
        """Wait until the SuperLink has a number of nodes online."""
        wait_for(
            f"{number} nodes",
            lambda: self.run_site("list").count("online") == number,
            seconds,
        )

    def start_run(self, settings: str) -> None:
        """Start a run at the server; it is followed to its end."""
        self.server.start(
            *("run", "env", f"--chdir={ROOT}"),
            *(sys.executable, "-m", "clip2fl_cli.app", "federate"),
            *("--root-certificates", self.ca),
            *("--run-config", ROOT / "conf" / "sites.toml", "--set", settings),
            *("--set", f'run.dir="{self.results.parent}" run.name="run"'),
            *("--set", f'federation.site-registry="{self.registry}"'),
        )

    @property
    def results(self) -> Path:
        """Folder of the run."""
        return self.folder / "results" / "run"

    def rounds(self) -> list[dict[str, Any]]:
        """Return the metrics of the rounds so far."""
        try:
            text = (self.results / "metrics.jsonl").read_text("utf-8")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines()]

    def events(self) -> list[dict[str, Any]]:
        """Return the events so far."""
        try:
            text = (self.results / "events.jsonl").read_text("utf-8")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines()]

    def told(
        self, what: str, site: str | None, since: datetime, seconds: float
    ) -> dict[str, Any]:
        """Wait for an event after some time and return it.

        It has two more fields: ``after``, its seconds after that time, and ``shown``,
        which a moment later is on the live page, by site.
        """

        def later() -> list[dict[str, Any]]:
            return [
                event
                for event in self.events()
                if (event["what"], event.get("site")) == (what, site)
                and datetime.fromisoformat(event["time"]) > since
            ]

        wait_for(f"{what} {site or ''}", later, seconds)
        event = later()[0]
        after = (datetime.fromisoformat(event["time"]) - since).total_seconds()
        page = Views(RunWatch(self.results)).view()
        print(f"{what} {site or ''} {after:.1f} s after the fault")  # read with -rP
        return {**event, "after": after, "shown": {s["name"]: s for s in page["sites"]}}

    def status(self) -> dict[str, Any]:
        """Return what ``clip2fl status`` prints as JSON at the server."""
        printed = self.server.run(
            *("env", f"--chdir={ROOT}", sys.executable, "-m", "clip2fl_cli.app"),
            *("status", "--json", self.results),
        )
        found: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return found

    def wait_for_round(self, number: int, seconds: float) -> None:
        """Wait until a round has ended."""
        wait_for(f"round {number}", lambda: len(self.rounds()) >= number, seconds)

    def wait_for_run(self, seconds: float) -> int:
        """Wait for the run's end and return the exit status."""
        return self.server.processes["run"].wait(seconds)

    def close(self) -> None:
        """End all processes and remove the namespaces."""
        for machine in [*self._machines, self._hub]:
            machine.kill_all()
            subprocess.run(["ip", "netns", "del", machine.namespace])


@contextlib.contextmanager
def stack(folder: Path) -> Iterator[Stack]:
    """Make a stack and remove it afterwards, whatever happens.

    Where it cannot be started, the running test skips, or fails under CI.
    """
    if reason := missing():
        cannot_run(reason)
    made = Stack(folder)
    try:
        yield made
    finally:
        made.close()
