"""Measure what secure aggregation costs a round of real sites, beside a plain round.

    python -m benchmarks.secure_rounds --nodes 4 16

Needs root, nginx and the requirements of `tests/deployment`. A server and nodes, each
in its own network namespace, train and evaluate over TLS, first without and then with
secure aggregation. `benchmarks.secure` measures the exchanges alone.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import markdown, median_and_spread, write_results
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
        median_and_spread([line["clock"]["seconds"] for line in lines]),
        # The checks hold the exchanges after the masked sums.
        phase("clients", "checks"),
        phase("evaluation"),
        "8" if secure else "2",
        f"{up / 1e6:.2f}",
    ]


def main() -> None:
    """Measure each number of sites with and without, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    rows = []
    for number in arguments.nodes:
        for secure in (False, True):
            lines = federate(number, arguments.rounds, secure)
            rows.append(row(number, secure, lines))
            print(markdown(list(HEADER), rows[-1:]), flush=True)
    write_results(
        "secure-rounds",
        "Cost of secure aggregation in rounds of real sites",
        f"Sites, a server, its proxy and SuperExec on the same {os.cpu_count()} cores, "
        "TLS, node authentication, clip2fl with resnet8-slim, one epoch, ten classes; "
        f"{arguments.rounds} rounds of which the first is left out: median "
        "(least-most). Each message is a process of its own at the site, and all "
        "sites' processes share the cores here: at real sites they run side by "
        f"side.\n\n{markdown(list(HEADER), rows)}",
        torch.device("cpu"),
    )


if __name__ == "__main__":
    main()
