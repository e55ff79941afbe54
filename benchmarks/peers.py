r"""A round of FedAvg here and in other frameworks: same model, clients and batches.

    python -m benchmarks.peers --pfl-python PFL/bin/python

Four ways train the same rounds on the built-in data, as many clients at a time as there
are cores, one thread each: ``clip2fl run``; the same apps called by
``benchmarks.direct``; Flower's simulation with a textbook ClientApp
(``benchmarks/peers_flower.py``); and pfl, Apple's simulation framework
(``benchmarks/peers_pfl.py``). All must average the same model in the first round. The
ways run in turn, so that a disturbance affects all of them.

pfl needs an environment of its own, which sees this program's packages and is no part
of the project:

    .venv/bin/python -m venv PFL
    .venv/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))' \
        > PFL/lib/python3.11/site-packages/project.pth
    PFL/bin/pip install pfl==0.6.0

Without ``--pfl-python`` it is left out, and the page says so.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.direct import run_directly
from benchmarks.measure import markdown, median_and_spread, write_results
from benchmarks.peers_problem import (
    CONFIG,
    MODEL,
    TIMES,
    Problem,
    write_model,
    write_times,
)
from benchmarks.process_memory import measured_memory
from clip2fl_cli.configuration import as_file, resolve
from clip2fl_cli.simulation import simulate
from clip2fl_common.config import RunConfig
from clip2fl_common.messages import RUNNING_STATISTICS
from server_app.checkpoints import load_checkpoint
from server_app.file_names import EVENTS
from strategy.events import Event, What

ROOT = Path(__file__).resolve().parent.parent
OURS, DIRECT, FLOWER, PFL = "clip2fl run", "benchmarks.direct", "Flower", "pfl"
WAYS = [OURS, DIRECT, FLOWER, PFL]
# Sums in another order differ by this much, relative to the largest step of a round.
TOLERANCE = 1e-4
NOT_AVERAGED = (*RUNNING_STATISTICS, "num_batches_tracked")


@dataclass
class Measured:
    """What one way took, one entry a run.

    Attributes
    ----------
    later : list of float
        Median seconds of the rounds after the first.
    start_up : list of float
        Seconds until the end of the first round, without a later round's seconds.
    memory : list of float
        Largest memory of all its processes together, in GiB.
    difference : float
        Largest difference of a parameter from the first way's, relative to the largest
        change of a parameter in the round.
    """

    later: list[float] = field(default_factory=list)
    start_up: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    difference: float = 0.0


def run_here(folder: Path, way: str) -> None:
    """Train the rounds by this program, in this process and those that it starts.

    Raises
    ------
    RuntimeError
        If the simulated run failed.
    """
    config = Problem.read(folder).config
    if way == OURS:
        with as_file(config) as file:
            result = simulate(run_config=file)
        if not result.completed:
            raise RuntimeError(f"{result.status}: {result.details}\n{result.log}")
    else:
        run_directly(config, os.cpu_count() or 1)
    run = Path(config.run.dir) / config.run.name
    write_model(folder, load_checkpoint(run, 1).model)
    lines = (run / EVENTS).read_text("utf-8").splitlines()
    events = [Event.model_validate_json(line) for line in lines]
    ends = [e.time.timestamp() for e in events if e.what is What.ROUND_ENDED]
    write_times(folder, ends)


def command(way: str, folder: Path, pfl_python: str) -> list[str]:
    """Return the command that trains the rounds in one way."""
    if way == FLOWER:
        return [sys.executable, "-m", "benchmarks.peers_flower", str(folder)]
    if way == PFL:
        workers = f"--nproc-per-node={os.cpu_count() or 1}"
        launcher = [pfl_python, "-m", "torch.distributed.run", "--standalone", workers]
        return [*launcher, "-m", "benchmarks.peers_pfl", str(folder)]
    return [sys.executable, "-m", "benchmarks.peers", "--way", way, str(folder)]


def measure(way: str, config: RunConfig, folder: Path, pfl_python: str) -> Measured:
    """Train the rounds in one way; return what it took.

    Raises
    ------
    RuntimeError
        If it failed; the message is the end of its output.
    """
    folder.mkdir()
    settings = {**config.to_flat(), "run.dir": str(folder), "run.name": "run"}
    (folder / CONFIG).write_text(json.dumps(settings), "utf-8")
    # Worker processes import this checkout, wherever they are started.
    with measured_memory() as peaks:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        started = time.time()
        done = subprocess.run(
            command(way, folder, pfl_python),
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{way} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    ends = json.loads((folder / TIMES).read_text("utf-8"))
    later = statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))
    return Measured([later], [ends[0] - started - later], [peaks.together])


def largest_difference(
    folder: Path, first: Path, start: Mapping[str, torch.Tensor]
) -> float:
    """Return the largest difference of two models' parameters, relative to their step.

    BatchNorm's statistics are left out, since pfl averages parameters only.
    """
    ours, other = (torch.load(place / MODEL) for place in (first, folder))
    names = [name for name in start if not name.endswith(NOT_AVERAGED)]
    step = max(float((ours[n] - start[n]).abs().max()) for n in names)
    return max(float((ours[n] - other[n]).abs().max()) for n in names) / step


def compare(
    config: RunConfig, ways: Sequence[str], repeats: int, pfl_python: str
) -> dict[str, Measured]:
    """Train in all ways in turn; return what each took.

    Raises
    ------
    RuntimeError
        If a way failed, or averaged another model than the first way.
    """
    found = {way: Measured() for way in ways}
    start = Problem(config).model().state_dict()
    with tempfile.TemporaryDirectory() as name:
        for repeat in range(repeats):
            places = {w: Path(name) / f"{n}-{repeat}" for n, w in enumerate(ways)}
            for way, place in places.items():
                one, into = measure(way, config, place, pfl_python), found[way]
                into.later += one.later
                into.start_up += one.start_up
                into.memory += one.memory
                difference = largest_difference(place, places[ways[0]], start)
                into.difference = max(into.difference, difference)
                print(way, one, f"difference {difference:.1e}", flush=True)
                if difference > TOLERANCE:
                    raise RuntimeError(
                        f"{way} averaged another model than {ways[0]}: parameters "
                        f"differ by {difference:.1e} of the round's largest step"
                    )
    return found


def page(found: Mapping[str, Measured], config: RunConfig, repeats: int) -> str:
    """Return the results as Markdown."""
    (first, *_) = found
    rows = []
    for way, one in found.items():
        ratios = [b / a for a, b in zip(found[first].later, one.later, strict=True)]
        rows.append(
            [
                way,
                median_and_spread(one.later),
                median_and_spread(ratios),
                median_and_spread(one.start_up),
                median_and_spread(one.memory),
                f"{one.difference:.0e}",
            ]
        )
    header = ["way", "s a round after the first", f"over {first}", "start-up, s"]
    header += ["memory, GiB", "difference"]
    images = sum(len(labels) for _, labels in Problem(config).held)
    text = (
        f"FedAvg, {config.model.name}, {config.partition.clients} clients that share "
        f"{images:,} drawn images and all take part, {config.client.epochs} local "
        f"epoch(s) in batches of {config.client.batch_size}, "
        f"{config.federation.rounds} rounds; {os.cpu_count()} clients at a time, one "
        f"thread each. {repeats} run(s) of each way in turn, median (least-most). "
        "Start-up is the time until the first round ends, less a later round. Memory "
        "is that of all processes together (shared memory counts once). The "
        "difference is of the averaged model's parameters after the first round, "
        f"relative to the round's largest step.\n\n{markdown(header, rows)}\n\n"
        "If other programs used the machine, the ratios of ways that ran in turn mean "
        "more than the seconds. This program's rounds also check replies, evaluate "
        "the model on ten images and write a checkpoint; the other ways do not."
    )
    if PFL not in found:
        text += "\n\npfl was not installed, so it was left out (see --pfl-python)."
    return text


def main() -> None:
    """Run one way, or all of them and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--pfl-python", default="", help="python that has pfl")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], help="further settings")
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    options = parser.parse_args()
    if options.way:
        run_here(options.folder, options.way)
        return
    settings = (
        f'method="fedavg" client.epochs=1 partition.clients={options.clients} '
        f"federation.clients-per-round={options.clients} checkpoint.keep=1000 "
        f"federation.rounds={options.rounds} dataset.demo-test-per-class=1 "
        'device="cpu"'
    )
    config = resolve(None, [settings, *options.set])
    ways = [w for w in options.ways if w != PFL or options.pfl_python]
    found = compare(config, ways, options.repeats, options.pfl_python)
    title = "A round of FedAvg against other frameworks"
    text = page(found, config, options.repeats)
    write_results("peers", title, text, torch.device("cpu"))


if __name__ == "__main__":
    main()
