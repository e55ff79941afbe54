"""Measure what Flower's simulation adds to a round, against direct calls.

    python -m benchmarks.flower conf/demo.toml

Both ways run the real ServerApp and ClientApp with the same number of clients at a
time, one thread each, in long-lived processes. The simulation adds SuperLink, Ray and
their messages. Runs alternate. First rounds are reported separately, since they start
processes and fill caches.
"""

import argparse
import contextlib
import io
import os
import re
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.direct import run_directly
from benchmarks.measure import markdown, median_and_spread, write_results
from clip2fl_cli.configuration import resolve
from clip2fl_cli.simulation import simulate

ROUND_LINE = re.compile(r"^round \d+/\d+: .*; ([\d.]+) s, ", re.MULTILINE)


def round_seconds(log: str) -> list[float]:
    """Return the seconds of each round, from a run's progress lines."""
    return [float(seconds) for seconds in ROUND_LINE.findall(log)]


def one_pair(
    run_config: Path, settings: list[str], folder: Path, workers: int
) -> tuple[list[float], list[float]]:
    """Return the seconds by round, for the simulation and for direct calls.

    Raises
    ------
    RuntimeError
        If the simulated run failed.
    """
    places = [f'run.dir="{folder}" run.name="{name}"' for name in ("flower", "direct")]
    result = simulate(
        run_config=run_config, overrides=[*settings, places[0]], supernodes=workers
    )
    if not result.completed:
        raise RuntimeError(f"{result.status}: {result.details}\n{result.log}")
    config = resolve(run_config, [*settings, places[1]])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run_directly(config, workers)
    return round_seconds(result.log), round_seconds(printed.getvalue())


def main() -> None:
    """Run the pairs and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_config", type=Path)
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs")
    parser.add_argument("--set", nargs="*", default=["federation.rounds=6"])
    arguments = parser.parse_args()
    workers = os.cpu_count() or 1
    ways = ("Flower simulation", "called directly")
    first: dict[str, list[float]] = {way: [] for way in ways}
    later: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            pair = one_pair(arguments.run_config, arguments.set, Path(folder), workers)
        for way, seconds in zip(ways, pair, strict=True):
            first[way].append(seconds[0])
            later[way].append(statistics.fmean(seconds[1:]))
        print(f"pair {repeat + 1}: {pair}", flush=True)
    ratios = [a / b for a, b in zip(*later.values(), strict=True)]
    rows = [
        [way, median_and_spread(first[way]), median_and_spread(later[way])]
        for way in ways
    ]
    rows.append(["ratio", "", median_and_spread(ratios)])
    table = markdown(["way", "first round", "later rounds, mean of a run"], rows)
    write_results(
        "flower",
        "A round through Flower's simulation, against the same work called directly",
        f"Experiment: {arguments.run_config.name}, {' '.join(arguments.set)}; "
        f"{workers} clients at a time. {arguments.repeats} pairs of runs in turn; "
        f"seconds a round, median (least-most) over the runs.\n\n{table}",
        torch.device("cpu"),
    )


if __name__ == "__main__":
    main()
