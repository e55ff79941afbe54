"""Measure the cost of messages at nodes that share a machine, in a TLS federation.

    python -m benchmarks.node_messages

Needs root, nginx and the requirements of `tests/deployment`. A server and nodes, each
in its own network namespace, train for several rounds. Every message is a ClientApp
process. A wrapper around Flower's command records how long each process lives and its
CPU time. `benchmarks.message_cost` splits the time of a single process.
"""

import argparse
import os
import re
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measure import markdown, median_and_spread, write_results
from tests.deployment.conftest import COUNTS, TINY
from tests.deployment.stack import BIN, Machine, Stack, missing, stack
from tests.site_folders import write_site

# `times` prints the shell's own time, and its children's time on the second line.
WRAPPER = """#!/bin/sh
started=$(date +%s.%N)
'{command}' "$@"
status=$?
ended=$(date +%s.%N)
times > '{record}.times'
echo "$started $ended $(tail -n 1 '{record}.times')" >> '{record}'
exit $status
"""
RECORD = re.compile(r"^([\d.]+) ([\d.]+) (\d+)m([\d.]+)s (\d+)m([\d.]+)s$")


@dataclass(frozen=True)
class Life:
    """Start, wall-clock time and CPU time of one ClientApp process.

    Attributes
    ----------
    started : float
        Seconds since the epoch.
    wall, cpu : float
        Seconds from start to end, and seconds of CPU (user and system).
    """

    started: float
    wall: float
    cpu: float

    @classmethod
    def parse(cls, line: str) -> "Life":
        """Return the times in a line of the wrapper."""
        found = RECORD.match(line)
        assert found, line
        started, ended, *parts = map(float, found.groups())
        minutes, seconds = parts[::2], parts[1::2]
        return cls(started, ended - started, 60 * sum(minutes) + sum(seconds))


def wrap_client_app(node: Machine) -> Path:
    """Record a node's ClientApps; return the file with one line per process."""
    folder, record = node.folder / "wrapped", node.folder / "messages"
    folder.mkdir()
    wrapper = folder / "flwr-clientapp"
    wrapper.write_text(WRAPPER.format(command=BIN / wrapper.name, record=record))
    wrapper.chmod(0o755)
    path = f"{folder}:{node.environment['PATH']}"
    node.environment = {**node.environment, "PATH": path}
    return record


def run(made: Stack, nodes: Mapping[str, dict[str, int]], rounds: int) -> list[Path]:
    """Run a federation to its end; return the records of its nodes.

    Raises
    ------
    RuntimeError
        If the run failed.
    """
    made.start_server()
    records = []
    for name, counts in nodes.items():
        node = made.add_node(name)
        records.append(wrap_client_app(node))
        write_site(node.folder / "images", counts)
        made.start_node(name, node.folder / "images")
    made.start_run(
        f"{TINY} federation.clients-per-round={len(nodes)} federation.rounds={rounds}"
    )
    if made.wait_for_run(300 + 60 * rounds):
        raise RuntimeError(made.server.log("run"))
    return records


def result_table(made: Stack, records: list[Path]) -> str:
    """Return a Markdown table of all rounds but the first, which fills the caches."""
    lines = made.rounds()[1:]
    lives = [
        # In each round a node trains, then evaluates.
        [Life.parse(text) for text in record.read_text().splitlines()][
            -2 * len(lines) :
        ]
        for record in records
    ]
    trained = [life for of_node in lives for life in of_node[::2]]
    evaluated = [life for of_node in lives for life in of_node[1::2]]
    work = statistics.fmean(
        (line["seconds"]["clients-gradients"] + line["seconds"]["clients-training"])
        / len(records)
        for line in lines
    )
    waves = [of_node[::2] for of_node in lives]
    apart = [
        max(life.started for life in wave) - min(life.started for life in wave)
        for wave in zip(*waves, strict=True)
    ]
    whole = [line["seconds"]["clients"] for line in lines]
    return markdown(
        ["seconds", "median (least-most)"],
        [
            ["a train message's process, wall", _spread(life.wall for life in trained)],
            ["the same, CPU", _spread(life.cpu for life in trained)],
            ["of which class gradients and training, mean", f"{work:.2f}"],
            [
                "overhead: the rest, wall",
                _spread(life.wall - work for life in trained),
            ],
            [
                "an evaluate message's process, wall",
                _spread(life.wall for life in evaluated),
            ],
            ["between the first and last process's start", _spread(apart)],
            ["a round's training, from the server's side", _spread(whole)],
        ],
    )


def _spread(values: Iterable[float]) -> str:
    return median_and_spread(list(values))


def main() -> None:
    """Run a federation, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    with tempfile.TemporaryDirectory() as folder, stack(Path(folder)) as made:
        records = run(made, COUNTS, arguments.rounds)
        table = result_table(made, records)
    write_results(
        "node-messages",
        "Cost of a message at nodes that share a machine",
        f"{len(COUNTS)} nodes, a server, its proxy and SuperExec on "
        f"{os.cpu_count()} cores, TLS, node authentication; resnet8-slim, one epoch, "
        f"{arguments.rounds} rounds of which the first is left out.\n\n{table}",
        torch.device("cpu"),
    )


if __name__ == "__main__":
    main()
