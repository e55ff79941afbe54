"""Run whole federations with the real ServerApp and ClientApps, and watch the GPU.

    python -m benchmarks.federations --device cuda --seconds 400 \
        --data cifar10_half.tar.xz --teacher FOLDER

Flower's processes are not needed (`benchmarks.direct`), so neither is Ray. Each run is
a process of its own, which is stopped when its time is over: a run's metrics are on the
disk after each round. Rounds after the first are timed, since the first one starts
processes, records graphs and fills caches.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import RESULTS, markdown, write_results

ROOT = Path(__file__).resolve().parents[1]
LAST_ROUNDS = 5


@dataclass(frozen=True)
class Run:
    """A federation: an experiment of ``conf``, settings, and its share of the time."""

    title: str
    experiment: str
    settings: tuple[str, ...]
    share: float


PHOTOS: tuple[Run, ...] = (
    Run("protocol S, clip2fl", "photos-quick.toml", ('method="clip2fl"',), 0.25),
    Run(
        "protocol S, clip2fl-plus",
        "photos-quick.toml",
        ('method="clip2fl-plus"',),
        0.35,
    ),
    Run(
        "the paper's size: ResNet-8 4x, 200 rounds of 10 epochs",
        "photos.toml",
        ('method="clip2fl"', "federation.rounds=200", "client.epochs=10"),
        0.4,
    ),
)
# Without photographs: the program's own drawings, at sizes of a test.
DRAWN: tuple[Run, ...] = (
    Run(
        "drawn images, tiny",
        "demo.toml",
        (
            "federation.rounds=2",
            "federation.clients-per-round=2",
            "partition.clients=2",
            "dataset.demo-train-per-class=8",
            "dataset.demo-test-per-class=2",
            "dataset.imbalance-factor=2.0",
            "client.epochs=1",
            "class-gradients.draws=1",
            "synthesis.features-per-class=2",
            "synthesis.steps=2",
            "retraining.epochs=2",
        ),
        1.0,
    ),
)


@dataclass
class GpuWatch:
    """Asks ``nvidia-smi`` once a second; without it nothing is seen.

    Attributes
    ----------
    memory, utilization : list of int
        MiB in use by all processes, and percent of the time in which a kernel ran.
    """

    memory: list[int] = field(default_factory=list)
    utilization: list[int] = field(default_factory=list)

    def __enter__(self) -> "GpuWatch":
        """Begin to look."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop looking."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        command = shutil.which("nvidia-smi")
        query = "--query-gpu=memory.used,utilization.gpu"
        while command and not self._over.wait(1.0):
            seen = subprocess.run(
                [command, query, "--format=csv,noheader,nounits", "--id=0"],
                capture_output=True,
                text=True,
            )
            numbers = seen.stdout.strip().split(", ")
            if seen.returncode == 0 and all(n.isdigit() for n in numbers):
                self.memory.append(int(numbers[0]))
                self.utilization.append(int(numbers[1]))


def federate(
    run: Run, settings: Sequence[str], folder: Path, workers: int, seconds: float
) -> tuple[float, GpuWatch, str]:
    """Run a federation into a folder for at most so many seconds.

    Returns
    -------
    tuple
        Seconds that it took, what the GPU did, and the end of its output.
    """
    places = [f'run.dir="{folder.parent}"', f'run.name="{folder.name}"']
    command = [sys.executable, "-m", "benchmarks.federations", "--one"]
    command += [str(ROOT / "conf" / run.experiment), "--workers", str(workers)]
    for setting in (*run.settings, *settings, *places):
        command += ["--set", setting]
    log = folder.parent / f"{folder.name}.log"
    started = time.monotonic()
    with GpuWatch() as watch, log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            # With its worker processes, which belong to the same session.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        took = time.monotonic() - started
    return took, watch, "\n".join(log.read_text("utf-8").splitlines()[-25:])


def summary(folder: Path, took: float, watch: GpuWatch) -> list[str]:
    """Return a run's row of the table, from its metrics.

    Parameters
    ----------
    folder : Path
        The run's folder.
    took : float
        Seconds of the whole run, with its start.
    watch : GpuWatch
        What the GPU did.
    """
    file = folder / "metrics.jsonl"
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    rounds: list[dict[str, Any]] = [json.loads(line) for line in lines]
    seconds = [
        sum(s for name, s in line["seconds"].items() if not name.startswith("clients-"))
        for line in rounds
    ]
    heads = rounds[-1]["accuracy"] if rounds else {}
    accuracies = [
        f"{head} "
        + format(
            statistics.mean(
                line["accuracy"][head]["balanced"] for line in rounds[-LAST_ROUNDS:]
            ),
            ".1f",
        )
        for head in heads
        if all(head in line["accuracy"] for line in rounds[-LAST_ROUNDS:])
    ]
    return [
        str(len(rounds)),
        f"{took:.0f}",
        f"{seconds[0]:.2f}" if seconds else "-",
        f"{statistics.median(seconds[1:]):.2f}" if seconds[1:] else "-",
        ", ".join(accuracies) or "-",
        f"{max(watch.memory)}" if watch.memory else "-",
        f"{statistics.mean(watch.utilization):.0f}" if watch.utilization else "-",
    ]


def unpacked(data: Path, folder: Path) -> Path:
    """Return the folder with ``train`` and ``test`` in a folder or in a tar file."""
    if data.is_dir():
        return data
    with tarfile.open(data) as archive:
        archive.extractall(folder, filter="data")
    (found,) = (place.parent for place in folder.glob("**/train"))
    return found


def run_one(experiment: Path, settings: Sequence[str], workers: int) -> None:
    """Run a federation in this process."""
    from benchmarks.direct import run_directly
    from clip2fl_cli.configuration import resolve

    run_directly(resolve(experiment, list(settings)), workers)


def main() -> None:
    """Run all federations in the time that is given, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE for all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=8, help="clients at a time")
    parser.add_argument("--seconds", type=float, default=400, help="for all runs")
    parser.add_argument("--data", type=Path, help="photographs: a folder or a tar file")
    parser.add_argument("--teacher", type=Path, help="folder of an open_clip model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.one, arguments.set, arguments.workers)
        return
    device = torch.device(arguments.device)
    # At the end: workers that are killed may still be writing to the cache.
    folder = Path(tempfile.mkdtemp(prefix="clip2fl-federations-"))
    os.environ["CLIP2FL_CACHE_DIR"] = str(folder / "cache")
    settings = [f'device="{arguments.device}"', *arguments.set]
    runs = DRAWN
    if arguments.data:
        runs = PHOTOS
        root = unpacked(arguments.data.resolve(), folder / "images")
        settings.append(f'dataset.root="{root}"')
        settings.append(f'teacher.model="local-dir:{arguments.teacher.resolve()}"')
    rows, failures = [], []
    deadline = time.monotonic() + arguments.seconds
    for place, run in enumerate(runs):
        # Time that an earlier run left over is for the later ones.
        left = deadline - time.monotonic()
        share = run.share / sum(later.share for later in runs[place:])
        where = folder / f"run-{place}"
        took, watch, end = federate(
            run, settings, where, arguments.workers, left * share
        )
        row = [run.title, *summary(where, took, watch)]
        print(" | ".join(row), flush=True)
        rows.append(row)
        if row[1] == "0":
            failures.append(f"{run.title} finished no round:\n{end}")
    shutil.rmtree(folder, ignore_errors=True)
    header = ["run", "rounds", "s in all", "first round, s", "later rounds, s"]
    header += ["balanced accuracy, %", "GPU memory, MiB", "GPU in use, %"]
    write_results(
        "federations",
        "Whole federations through the real ServerApp and ClientApps",
        f"{arguments.workers} clients at a time, each in a process with one thread. "
        "Later rounds: median. Accuracy: mean of the last "
        f"{LAST_ROUNDS} rounds, by classifier. GPU memory: the most, of all processes; "
        "GPU in use: share of the time in which a kernel ran.\n\n"
        f"{markdown(header, rows)}",
        device,
        arguments.results,
    )
    if failures:
        sys.exit("\n\n".join(failures))


if __name__ == "__main__":
    main()
