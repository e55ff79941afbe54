"""Measure what secure aggregation costs a round, beside a plain round.

    python -m benchmarks.secure_rounds --nodes 4
    python -m benchmarks.secure_rounds --simulated 4 16

``--nodes`` needs root, nginx and the requirements of `tests/deployment`. A server and
nodes, each in its own network namespace, train and evaluate over TLS, first without and
then with secure aggregation. Each message starts a process, and on one machine that is
most of a round. ``--simulated`` runs simulated clients through Flower instead, whose
processes stay, and the test images are the server's. `benchmarks.secure` measures the
exchanges alone.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import markdown, median_and_spread, write_results
from clip2fl_cli.simulation import simulate
from tests.defaults import ROOT
from tests.deployment.conftest import TINY
from tests.deployment.stack import Stack, missing, stack
from tests.site_folders import write_site

IMAGES = {"circle": 10, "ring": 12, "heart": 9, "arrow": 5}
# Nodes that start together: more are too slow for a SuperNode's time-out here.
GROUP = 4
HEADER = (
    *("sites", "secure", "a round, s", "training, s", "evaluation, s"),
    *("messages a site", "MB up a site"),
)


def federate(number: int, rounds: int, secure: bool) -> list[dict[str, Any]]:
    """Return the metrics of a run's rounds but the first, which fills the caches.

    Raises
    ------
    RuntimeError
        If the run failed, or a round lost a site.
    """
    names = [f"site-{n:02}" for n in range(number)]
    with tempfile.TemporaryDirectory() as folder, stack(Path(folder)) as made:
        made.start_server()
        _start_nodes(made, names, secure)
        made.start_run(
            f"{TINY} federation.clients-per-round={number} federation.rounds={rounds} "
            f"aggregation.secure={str(secure).lower()}"
        )
        if made.wait_for_run(600 * rounds):
            raise RuntimeError(made.server.log("run"))
        lines = made.rounds()[1:]
    if any(len(line["clients"]) < number or not line["accuracy"] for line in lines):
        raise RuntimeError(f"a round lost a site: {lines}")
    return lines


def _start_nodes(made: Stack, names: Sequence[str], secure: bool) -> None:
    for place, name in enumerate(names):
        node = made.add_node(name)
        write_site(node.folder / "images", IMAGES, 1000 * place)
    for started, name in enumerate(names, start=1):
        if secure:
            made.write_secure_rules(name)
        made.start_node(name, made.nodes[name].folder / "images")
        if started % GROUP == 0 or started == len(names):
            made.wait_until_online(started, 600)


def simulated(number: int, rounds: int, secure: bool) -> list[dict[str, Any]]:
    """Return the metrics of a simulated run's rounds but the first.

    Raises
    ------
    RuntimeError
        If the run failed.
    """
    settings = (
        f"{TINY} partition.clients={number} federation.clients-per-round={number} "
        f"federation.rounds={rounds} aggregation.secure={str(secure).lower()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        named = f'run.dir="{folder}" run.name="run"'
        result = simulate(
            run_config=ROOT / "conf" / "demo.toml", overrides=[settings, named]
        )
        if not result.completed:
            raise RuntimeError(result.details)
        text = (Path(folder) / "run" / "metrics.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()[1:]]


def row(number: int, secure: bool, lines: list[dict[str, Any]]) -> list[str]:
    """Return a row of the table."""

    def phase(*names: str) -> str:
        return median_and_spread(
            [sum(line["seconds"].get(name, 0.0) for name in names) for line in lines]
        )

    up = statistics.median(
        size for line in lines for size in line["bytes"]["per_client"]
    )
    return [
        str(number),
        "yes" if secure else "no",
        median_and_spread([_whole(line) for line in lines]),
        # The checks hold the exchanges after the masked sums.
        phase("clients", "checks"),
        phase("evaluation"),
        str((4 if secure else 1) * (2 if "clock" in lines[0] else 1)),
        f"{up / 1e6:.2f}",
    ]


def _whole(line: dict[str, Any]) -> float:
    """Return the seconds of a round; simulated clients' are summed, so left out."""
    if "clock" in line:
        return float(line["clock"]["seconds"])
    seconds = line["seconds"].items()
    return float(sum(s for name, s in seconds if not name.startswith("clients-")))


def main() -> None:
    """Measure each number of sites with and without, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--nodes", type=int, nargs="+")
    how.add_argument("--simulated", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.nodes and (reason := missing()):
        parser.error(reason)
    measure = federate if arguments.nodes else simulated
    where = (
        "Sites, a server, its proxy and SuperExec, TLS, node authentication. Each "
        "message is a process of its own at the site, and all sites' processes share "
        "the cores here: at real sites they run side by side."
        if arguments.nodes
        else "Simulated clients through Flower, on conf/demo.toml; the server "
        "evaluates, on test images of its own."
    )
    rows = []
    for number in arguments.nodes or arguments.simulated:
        for secure in (False, True):
            rows.append(row(number, secure, measure(number, arguments.rounds, secure)))
        # After each number, as those of many nodes take long and may be stopped.
        write_results(
            "secure-rounds" if arguments.nodes else "secure-rounds-simulated",
            "Cost of secure aggregation in a round",
            f"{where} All on {os.cpu_count()} cores: clip2fl with resnet8-slim, one "
            f"epoch, ten classes; {arguments.rounds} rounds of which the first is left "
            f"out: median (least-most).\n\n{markdown(list(HEADER), rows)}",
            torch.device("cpu"),
        )


if __name__ == "__main__":
    main()
