"""What a comparison leaves in its folder: table, summary and reports."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip2fl_cli.comparison import Comparison
from clip2fl_cli.report import write_comparison_report, write_run_report
from clip2fl_cli.runs import LAST_ROUNDS, FinishedRun
from clip2fl_cli.summary import CONFIDENCE, markdown, summarise, teachers
from server_app.durable import write_whole

SUMMARY_FILE = "comparison.json"
TABLE_FILE = "comparison.md"


@dataclass(frozen=True)
class Results:
    """A comparison's table as Markdown and JSON, and the report's page."""

    markdown: str
    json: str
    page: Path


def write_results(
    comparison: Comparison, runs: Mapping[str, Sequence[FinishedRun]], command: str
) -> Results:
    """Write a comparison's table, summary, report and the report of every run.

    Parameters
    ----------
    comparison : Comparison
        Which one.
    runs : mapping of str to sequence of FinishedRun
        Each variant's complete runs; there is at least one.
    command : str
        What to print as the command that made it.

    Returns
    -------
    Results
    """
    title = f"Comparison {comparison.name}"
    table = markdown(runs, comparison.baseline, title, command)
    summary = json.dumps(
        {
            "name": comparison.name,
            "baseline": comparison.baseline,
            "last_rounds": LAST_ROUNDS,
            "confidence": CONFIDENCE,
            "rows": [
                dataclasses.asdict(row) for row in summarise(runs, comparison.baseline)
            ],
            "teachers": teachers(runs),
            "runs": {
                variant: [run.folder.name for run in group]
                for variant, group in runs.items()
            },
        },
        indent=2,
    )
    write_whole(comparison.folder / TABLE_FILE, table)
    write_whole(comparison.folder / SUMMARY_FILE, summary + "\n")
    for run in (run for group in runs.values() for run in group):
        write_run_report(run, _baseline_run(run, runs.get(comparison.baseline, [])))
    return Results(table, summary, rewrite_report(comparison.folder))


def rewrite_report(folder: Path) -> Path:
    """Write the report of a comparison from its folder.

    Parameters
    ----------
    folder : Path
        A comparison's folder, with its ``comparison.json``.

    Returns
    -------
    Path
        The page.
    """
    summary: dict[str, Any] = json.loads((folder / SUMMARY_FILE).read_text("utf-8"))
    runs = {
        variant: [FinishedRun.read(folder / name) for name in names]
        for variant, names in summary["runs"].items()
    }
    return write_comparison_report(folder, summary["name"], runs, summary["baseline"])


def _baseline_run(
    run: FinishedRun, baseline: Sequence[FinishedRun]
) -> FinishedRun | None:
    """Return the baseline's run with the same seed, if it is another one."""
    same = [b for b in baseline if b.seed == run.seed and b.folder != run.folder]
    return same[0] if same else None
