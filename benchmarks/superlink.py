"""Measure CPU time and memory of a SuperLink and its proxy by the number of nodes.

    python -m benchmarks.superlink --nodes 4 16 64

Needs root, nginx and the requirements of `tests/deployment`. Each node is a real
SuperNode with a key of its own, in its own network namespace, over TLS. Its ClientApp
only sends an array back, so that a machine has room for many. Messages have the size of
a round with ResNet-8 slim and the class gradients of ten classes.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measure import markdown, write_results
from tests.deployment.stack import (
    BIN,
    PORT,
    SERVER_IP,
    Machine,
    Stack,
    missing,
    stack,
    wait_for,
)

# Bytes that a node receives and sends in a round: docs/deployment.md, a node's log.
DOWN, UP = 470_000, 710_000
PARTS = {"superlink": "SuperLink", "nginx": "proxy"}
# Nodes that start together, and that are asked together: two cores cannot start 64
# ClientApps at once without the SuperLink missing the ServerApp's heartbeats.
GROUP = 8
TICKS = os.sysconf("SC_CLK_TCK")

PYPROJECT = """
[project]
name = "echo"
version = "1.0.0"
[tool.flwr.app]
publisher = "benchmark"
[tool.flwr.app.components]
serverapp = "echo.server:app"
clientapp = "echo.client:app"
[tool.flwr.app.config]
nodes = 1
rounds = 1
file = ""
"""
CLIENT = f"""
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    noise = np.random.default_rng().integers(256, size={UP}, dtype=np.uint8)
    content = RecordDict({{"arrays": ArrayRecord({{"sent": Array(noise)}})}})
    return Message(content, reply_to=message)
"""
SERVER = f"""
import time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    nodes, rounds = context.run_config["nodes"], context.run_config["rounds"]
    while len(list(grid.get_node_ids())) < nodes:
        time.sleep(1)
    for number in range(rounds):
        noise = np.random.default_rng(number).integers(256, size={DOWN}, dtype=np.uint8)
        content = RecordDict({{"arrays": ArrayRecord({{"model": Array(noise)}})}})
        began, good, there = time.time(), 0, sorted(grid.get_node_ids())
        for start in range(0, len(there), {GROUP}):
            group = there[start : start + {GROUP}]
            messages = [Message(content, node, "train") for node in group]
            replies = grid.send_and_receive(messages, timeout=600)
            good += sum(not reply.has_error() for reply in replies)
        with open(context.run_config["file"], "a") as file:
            print(began, time.time(), good, file=file)
"""


@dataclass(frozen=True)
class Use:
    """What a part of the server has used so far.

    Attributes
    ----------
    cpu : float
        Seconds of CPU, of all of its processes.
    memory : float
        Resident memory in MiB, of all of its processes.
    peak : float
        The same at its largest, process by process.
    """

    cpu: float
    memory: float
    peak: float


def use(pid: int) -> Use:
    """Return what a process and its descendants have used."""
    cpu = memory = peak = 0.0
    for one in [pid, *_descendants(pid)]:
        folder = Path("/proc") / str(one)
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        cpu += (int(fields[11]) + int(fields[12])) / TICKS
        status = dict(
            line.split(":", 1) for line in (folder / "status").read_text().splitlines()
        )
        memory += int(status["VmRSS"].split()[0]) / 1024
        peak += int(status["VmHWM"].split()[0]) / 1024
    return Use(cpu, memory, peak)


def _descendants(pid: int) -> Iterator[int]:
    for task in (Path("/proc") / str(pid) / "task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield child
            yield from _descendants(child)


def write_app(folder: Path) -> Path:
    """Write a Flower app whose clients send an array back."""
    package = folder / "echo"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").touch()
    (package / "client.py").write_text(CLIENT)
    (package / "server.py").write_text(SERVER)
    return folder


def start_nodes(made: Stack, number: int) -> list[Machine]:
    """Start SuperNodes, and wait until the SuperLink has all of them online.

    They start group by group: two cores cannot import Flower 64 times within the time
    that a SuperNode waits for its first answer.
    """
    names = [f"site-{n:02}" for n in range(number)]
    nodes = [made.add_node(name, register=False) for name in names]
    made.register(*names)
    for started, (name, node) in enumerate(zip(names, nodes, strict=True), start=1):
        node.start(
            # Again and again, as systemd would.
            *("supernode", "/bin/sh", "-c", 'while :; do "$@"; sleep 10; done', "-"),
            *(BIN / "flower-supernode", "--superlink", f"{SERVER_IP}:{PORT}"),
            *("--root-certificates", made.ca),
            *("--auth-supernode-private-key", node.folder / "keys" / name),
        )
        if started % GROUP == 0 or started == number:
            made.wait_until_online(started, 600)
    return nodes


def measure(number: int, rounds: int, idle_s: float) -> list[str]:
    """Return a row of the table for one number of nodes."""
    with tempfile.TemporaryDirectory() as folder, stack(Path(folder)) as made:
        made.start_server()
        start_nodes(made, number)
        pids = {part: made.server.processes[part].pid for part in PARTS}
        before = {part: use(pid) for part, pid in pids.items()}
        time.sleep(idle_s)
        idle = {part: use(pid) for part, pid in pids.items()}
        app = write_app(made.folder / "app")
        record = made.folder / "rounds"
        record.touch()
        settings = f'nodes={number} rounds={rounds} file="{record}"'
        made.flwr("run", app, "server", "--run-config", settings)
        wait_for(
            "rounds", lambda: record.read_text().count("\n") == rounds, 1200 * rounds
        )
        after = {part: use(pid) for part, pid in pids.items()}
        seconds = []
        for line in record.read_text().splitlines():
            began, ended, good = line.split()
            assert int(good) == number, record.read_text()
            seconds.append(float(ended) - float(began))
        row = [str(number)]
        for part in PARTS:
            spent = (idle[part].cpu - before[part].cpu) / idle_s
            row.append(f"{100 * spent:.0f} %")
        row += [f"{idle[part].memory:,.0f}" for part in PARTS]
        row += [f"{(after[part].cpu - idle[part].cpu) / rounds:.1f}" for part in PARTS]
        row += [f"{after[part].peak:,.0f}" for part in PARTS]
        database = sum(f.stat().st_size for f in made.server.folder.glob("state.db*"))
        return [*row, f"{database / 2**20:.0f}", f"{statistics.median(seconds):.0f}"]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return the Markdown table."""
    names = list(PARTS.values())
    header = ["nodes", *(f"idle, {name}" for name in names)]
    header += [f"idle MiB, {name}" for name in names]
    header += [f"CPU s a round, {name}" for name in names]
    header += [f"largest MiB, {name}" for name in names]
    return markdown([*header, "database, MiB", "a round, s"], list(map(list, rows)))


def main() -> None:
    """Measure each number of nodes, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle-seconds", type=float, default=60)
    arguments = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    rows = []
    for number in arguments.nodes:
        rows.append(measure(number, arguments.rounds, arguments.idle_seconds))
        print(table(rows[-1:]), flush=True)
    write_results(
        "superlink",
        "CPU time and memory of a SuperLink by number of nodes",
        f"TLS, node authentication, nginx in front, database on the disk; "
        f"{arguments.rounds} rounds to all nodes, {DOWN / 1e6:.2f} MB to each and "
        f"{UP / 1e6:.2f} MB back. Idle: of one core, over "
        f"{arguments.idle_seconds:.0f} s. All nodes and their ClientApps run on the "
        f"same {os.cpu_count()} cores, so the seconds of a round are theirs: from the "
        f"server's side a round of many nodes would be shorter.\n\n{table(rows)}",
        torch.device("cpu"),
    )


if __name__ == "__main__":
    main()
