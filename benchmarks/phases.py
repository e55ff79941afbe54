"""Show how a round's time splits into phases, from the metrics of finished runs.

    python -m benchmarks.phases before=runs/old after=runs/new

Each run is a folder with ``metrics.jsonl``. First rounds are left out, since they start
processes and fill caches. The clients' seconds are sums over a round's clients, which
train at the same time. All other seconds are wall-clock time.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from benchmarks.measure import markdown, write_results


def phase_medians(run: Path) -> dict[str, float]:
    """Return each phase's median seconds over all rounds but the first.

    Raises
    ------
    ValueError
        If the run has no second round.
    """
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    rounds = [json.loads(line)["seconds"] for line in lines][1:]
    if not rounds:
        raise ValueError(f"{run} has no second round; run two rounds or more")
    return {
        phase: statistics.median(line[phase] for line in rounds) for phase in rounds[0]
    }


def phase_table(runs: dict[str, Path]) -> str:
    """Return a Markdown table of the phases and the whole round, one column per run."""
    medians = {label: phase_medians(run) for label, run in runs.items()}
    phases = list(dict.fromkeys(p for of_run in medians.values() for p in of_run))
    rows = [
        [phase, *(f"{of_run.get(phase, 0):.3f}" for of_run in medians.values())]
        for phase in phases
    ]
    whole = [
        sum(s for phase, s in of_run.items() if not phase.startswith("clients-"))
        for of_run in medians.values()
    ]
    rows.append(["whole round", *(f"{seconds:.3f}" for seconds in whole)])
    return markdown(["phase, s", *medians], rows)


def main() -> None:
    """Print and write a table of the runs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--name", default="phases", help="name of the results file")
    parser.add_argument("--title", default="Where the time of a round goes")
    parser.add_argument("--note", default="", help="what was done between the runs")
    arguments = parser.parse_args()
    runs = {
        label: Path(folder)
        for label, _, folder in (entry.partition("=") for entry in arguments.runs)
    }
    text = phase_table(runs) + (f"\n\n{arguments.note}" if arguments.note else "")
    write_results(arguments.name, arguments.title, text, torch.device("cpu"))


if __name__ == "__main__":
    main()
