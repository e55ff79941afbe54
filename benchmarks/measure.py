"""Reliable timing on shared machines, and dated results.

Contenders run in turn in one process, so that a disturbance affects both. The ratio is
computed pair by pair. Absolute times hold only for this machine at this moment.
"""

import os
import platform
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Comparison:
    """Times of two contenders that ran in turn.

    Attributes
    ----------
    stage, size : str
        The stage that was timed, and its size.
    slow, fast : tuple of float
        Seconds of each run; the k-th entries form a pair. ``slow`` is empty if only
        the fast contender can do the stage.
    difference : float or None
        Largest absolute difference between the two results.
    """

    stage: str
    size: str
    slow: tuple[float, ...]
    fast: tuple[float, ...]
    difference: float | None = None

    @property
    def ratios(self) -> list[float]:
        """Return slow over fast time, pair by pair."""
        return [a / b for a, b in zip(self.slow, self.fast, strict=True)]


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    device: torch.device,
    warm_up: bool = True,
) -> dict[str, tuple[float, ...]]:
    """Run contenders in turn and return their times.

    Parameters
    ----------
    contenders : mapping of str to callable
        Functions to time, by name.
    repeats : int
        Number of timed runs of each.
    device : torch.device
        Device on which they compute; a GPU is timed by its own events.
    warm_up : bool
        Whether to run each once before, untimed.

    Returns
    -------
    dict of str to tuple of float
        Seconds of each run.
    """
    if warm_up:
        for run in contenders.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            seconds[name].append(timed(run, device))
    return {name: tuple(values) for name, values in seconds.items()}


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes; on a GPU measured by device events."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000


def compare(
    stage: str,
    size: str,
    slow: Callable[[], object] | None,
    fast: Callable[[], object],
    *,
    repeats: int,
    device: torch.device,
    difference: float | None = None,
    units: tuple[int, int] = (1, 1),
) -> Comparison:
    """Return the times of a fast implementation against a slow one.

    Parameters
    ----------
    stage, size : str
        Labels in the table.
    slow, fast : callable or None
        The contenders; None if the slow one cannot do the stage.
    repeats : int
        Number of timed runs of each.
    device : torch.device
        Device on which they compute.
    difference : float or None
        Largest difference of their results, if known.
    units : tuple of int
        Units of work in one call of each contender; times are per unit.

    Returns
    -------
    Comparison
    """
    contenders = {"fast": fast} if slow is None else {"slow": slow, "fast": fast}
    seconds = interleaved(contenders, repeats=repeats, device=device)
    per_unit = [
        tuple(value / number for value in seconds.get(name, ()))
        for name, number in zip(("slow", "fast"), units, strict=True)
    ]
    comparison = Comparison(stage, size, per_unit[0], per_unit[1], difference)
    print(" | ".join(_cells(comparison)), flush=True)
    return comparison


def median_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """Return "median (least-most)" with a number of significant digits."""
    if not values:
        return "-"
    shown = [
        f"{value:.{digits}g}"
        for value in (statistics.median(values), min(values), max(values))
    ]
    return f"{shown[0]} ({shown[1]}-{shown[2]})"


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Return a Markdown table of the comparisons."""
    header = ["stage", "size", "published loops, s", "ours, s", "ratio", "difference"]
    return markdown(header, [_cells(c) for c in comparisons])


def _cells(comparison: Comparison) -> list[str]:
    difference = comparison.difference
    return [
        comparison.stage,
        comparison.size,
        median_and_spread(comparison.slow),
        median_and_spread(comparison.fast),
        median_and_spread(comparison.ratios) if comparison.slow else "-",
        "-" if difference is None else f"{difference:.1e}",
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def in_fresh_process(
    function: Callable[..., Any], *arguments: Any
) -> tuple[Any, float]:
    """Call a function in a new process.

    Parameters
    ----------
    function : callable
        A function at a module's top level.
    *arguments : Any
        Arguments of the function.

    Returns
    -------
    tuple
        The function's result, and the process's peak memory in GiB.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        answer: tuple[Any, float] = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"{function.__name__} ended with exit code {process.exitcode}"
        ) from None
    process.join()
    return answer


def _call(sender: Any, function: Callable[..., Any], arguments: Any) -> None:
    result = function(*arguments)
    sender.send((result, peak_memory()))


def peak_memory() -> float:
    """Return this process's peak memory in GiB.

    Reads Linux's figure for this process alone, since the usual resource usage
    includes the parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text("utf-8").splitlines()
        (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
        return int(peak) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def environment(device: torch.device) -> str:
    """Return a line with hardware and versions."""
    names = ("torch", "torchvision", "flwr", "ray", "numpy")
    versions = [f"python {platform.python_version()}"]
    for name in names:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"no {name}")
    hardware = f"{os.cpu_count()} cores ({_processor()})"
    if device.type == "cuda":
        hardware += f", {torch.cuda.get_device_name(device)}"
    return (
        f"Hardware: {hardware}, {platform.system()}. Versions: {', '.join(versions)}."
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


def write_results(
    name: str, title: str, text: str, device: torch.device, folder: Path = RESULTS
) -> Path:
    """Write a dated page of results and return its path.

    Parameters
    ----------
    name : str
        Name of the file without date and suffix.
    title : str
        First line of the page.
    text : str
        Tables and comments.
    device : torch.device
        Device on which it was measured.
    folder : Path
        Folder of the page; created if it is missing.

    Returns
    -------
    Path
        The page; it replaces a page of the same day.
    """
    module = Path(sys.argv[0]).stem
    command = shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]])
    today = date.today().isoformat()
    kind = "-gpu" if device.type == "cuda" else ""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{today}-{name}{kind}.md"
    target.write_text(
        f"# {title}\n\nDate: {today}. Command:\n\n    {command}\n\n{text}\n\n"
        f"{environment(device)}\n",
        encoding="utf-8",
    )
    print(f"\n{target.read_text('utf-8')}\n{target}")
    return target
