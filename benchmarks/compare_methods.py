"""Run methods over seeds through ``flwr run`` and write a dated table of results.

    python -m benchmarks.compare_methods conf/demo.toml --seeds 7 8 9

Runs that are complete already are not repeated, so an interrupted comparison goes on
where it stopped.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from scripts.simulate import ROOT, simulate

METHODS = ("clip2fl", "creff", "fedavg", "fedprox")
COLUMNS = ("top1", "balanced", "many", "medium", "few")
# Rounds vary by some points; the mean of the last ones is compared.
LAST_ROUNDS = 5


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, read.

    Attributes
    ----------
    method : str
        Its method.
    seed : int
        Its seed.
    config : dict
        Content of ``config.json``.
    rounds : list of dict
        Lines of ``metrics.jsonl``.
    """

    method: str
    seed: int
    config: dict[str, Any]
    rounds: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "FinishedRun":
        """Read a complete run's folder."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
        settings = config["config"]
        return cls(
            settings["method"], settings["seed"], config, [json.loads(x) for x in lines]
        )

    def heads(self) -> list[str]:
        """Return the names of the classifiers that were evaluated."""
        return list(self.rounds[-1]["accuracy"])

    def last(self, head: str, column: str) -> float:
        """Return a column's mean over the last rounds."""
        return statistics.fmean(
            line["accuracy"][head][column] for line in self.rounds[-LAST_ROUNDS:]
        )

    def per_class(self, head: str) -> list[float]:
        """Return the per-class accuracy's mean over the last rounds."""
        columns = zip(
            *(r["accuracy"][head]["per_class"] for r in self.rounds[-LAST_ROUNDS:]),
            strict=True,
        )
        return [statistics.fmean(column) for column in columns]


def complete_run(
    run_config: Path, method: str, seed: int, runs: Path, settings: Sequence[str]
) -> FinishedRun:
    """Return a run's results, after running it if it is not complete yet.

    Parameters
    ----------
    run_config : Path
        TOML file of the experiment.
    method : str
        Method to run.
    seed : int
        Seed to run it with.
    runs : Path
        Folder of the runs.
    settings : sequence of str
        Further ``key=value`` pairs.

    Returns
    -------
    FinishedRun

    Raises
    ------
    RuntimeError
        If the run did not complete, or a part of an older one is in the way.
    """
    folder = runs / f"{run_config.stem}-{method}-{seed}"
    if not (folder / "model.safetensors").is_file():
        if folder.exists():
            raise RuntimeError(f"{folder} holds a run that did not end; remove it")
        own = f'method="{method}" seed={seed} run.dir="{runs}" run.name="{folder.name}"'
        result = simulate(
            run_config=run_config, overrides=[*settings, own], output=sys.stderr
        )
        if not result.completed:
            raise RuntimeError(f"{folder.name}: {result.status} {result.details}")
    return FinishedRun.read(folder)


def comparison_table(runs: Sequence[FinishedRun]) -> str:
    """Return the Markdown table of methods and heads, mean and deviation over seeds."""
    header = ["method", "head", "seeds", "top-1", *COLUMNS[1:], "last round, balanced"]
    rows = []
    for (method, head), group in _grouped(runs).items():
        cells = [_spread([run.last(head, c) for run in group]) for c in COLUMNS]
        final = [run.rounds[-1]["accuracy"][head]["balanced"] for run in group]
        seeds = ", ".join(str(run.seed) for run in group)
        rows.append([method, head, seeds, *cells, _spread(final)])
    rows += _teacher_rows(runs)
    return _markdown(header, rows)


def class_table(runs: Sequence[FinishedRun]) -> str:
    """Return the Markdown table of per-class accuracy, commonest class first."""
    facts = runs[0].config
    images = facts["train_images_per_class"]
    order = sorted(range(len(images)), key=lambda c: -images[c])
    header = ["method", "head", *(facts["class_names"][c] for c in order)]
    rows = [["training images", "", *(str(images[c]) for c in order)]]
    for (method, head), group in _grouped(runs).items():
        columns = list(zip(*(run.per_class(head) for run in group), strict=True))
        rows.append(
            [method, head, *(f"{statistics.fmean(columns[c]):.1f}" for c in order)]
        )
    return _markdown(header, rows)


def _grouped(
    runs: Iterable[FinishedRun],
) -> dict[tuple[str, str], list[FinishedRun]]:
    groups: dict[tuple[str, str], list[FinishedRun]] = {}
    for run in runs:
        for head in run.heads():
            groups.setdefault((run.method, head), []).append(run)
    return groups


def _teacher_rows(runs: Sequence[FinishedRun]) -> list[list[str]]:
    for run in runs:
        if teacher := run.config.get("teacher"):
            cells = [f"{teacher['zero_shot'][column]:.1f}" for column in COLUMNS]
            return [["teacher", "zero-shot, no training", "-", *cells, cells[1]]]
    return []


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(runs: Sequence[FinishedRun], title: str, command: str) -> str:
    """Return the dated Markdown page of a comparison."""
    facts = runs[0].config
    teachers = {
        run.config["teacher"]["name"] for run in runs if "teacher" in run.config
    }
    versions = ", ".join(f"{name} {v}" for name, v in facts["versions"].items())
    groups = facts["shot_groups"]
    minutes = [
        sum(_wall_seconds(line["seconds"]) for line in run.rounds) / 60 for run in runs
    ]
    durations = ", ".join(
        f"{run.method} {run.seed}: {m:.0f}"
        for run, m in zip(runs, minutes, strict=True)
    )
    codes = ", ".join(sorted({run.config["code"] for run in runs}))
    return f"""# {title}

Date: {date.today().isoformat()}. Command:

    {command}

Accuracy in percent on {facts["test_images"]} test images, mean of the last
{LAST_ROUNDS} rounds (± standard deviation over seeds). Groups by {groups["rule"]}: many
= classes {groups["many"]}, medium = {groups["medium"]}, few = {groups["few"]}.
Teacher: {", ".join(sorted(teachers)) or "none"}.

{comparison_table(runs)}

Per class:

{class_table(runs)}

Hardware: {_hardware()}. Versions: {versions}.
Client code: {codes}. Minutes a run, not comparable where other work shared the machine:
{durations}.
"""


def _wall_seconds(seconds: Mapping[str, float]) -> float:
    """Add up a round's phases; clients' own seconds overlap and are left out."""
    return sum(s for phase, s in seconds.items() if not phase.startswith("clients-"))


def _hardware() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"


def main() -> None:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description="Compare methods over seeds.")
    parser.add_argument("run_config", type=Path, help="TOML file of the experiment")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[7])
    parser.add_argument("--set", nargs="*", default=[], help="key=value pairs")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--title", default=None)
    parser.add_argument(
        "--shown-command", default=None, help="command to print, without local paths"
    )
    arguments = parser.parse_args()
    runs = [
        complete_run(
            arguments.run_config, method, seed, arguments.runs.resolve(), arguments.set
        )
        for seed in arguments.seeds
        for method in arguments.methods
    ]
    stem = arguments.run_config.stem
    shown = arguments.shown_command or shlex.join(
        ["python", "-m", "benchmarks.compare_methods", *sys.argv[1:]]
    )
    text = report(runs, arguments.title or f"Methods compared: {stem}", shown)
    target = ROOT / "benchmarks" / "results" / f"{date.today().isoformat()}-{stem}.md"
    target.write_text(text, encoding="utf-8")
    print(f"{text}\n{target}")


if __name__ == "__main__":
    main()
