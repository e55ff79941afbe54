"""What a comparison leaves in its folder: table, summary and reports."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clip2fl_cli.comparison import Comparison
from clip2fl_cli.output import OutputFolder
from clip2fl_cli.report import write_comparison_report, write_run_report
from clip2fl_cli.run_schema import Summary
from clip2fl_cli.runs import LAST_ROUNDS, FinishedRun
from clip2fl_cli.summary import (
    CONFIDENCE,
    Failure,
    markdown,
    refuse_unlike,
    summarise,
    teachers,
)
from server_app.foreign_files import MEGABYTE, read_json

SUMMARY_FILE = "comparison.json"
TABLE_FILE = "comparison.md"
MAX_SUMMARY_BYTES = 32 * MEGABYTE


@dataclass(frozen=True)
class Results:
    """A comparison's table as Markdown and JSON, and the report's page."""

    markdown: str
    json: str
    page: Path


def write_results(
    comparison: Comparison,
    runs: Mapping[str, Sequence[FinishedRun]],
    command: str,
    failures: Sequence[Failure] = (),
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
    failures : sequence of Failure
        Runs that did not complete: they are named, not left out.

    Returns
    -------
    Results

    Raises
    ------
    RunError
        If runs cannot be compared, or a file of a run is damaged.
    OutputError
        If results cannot be written.
    """
    refuse_unlike(runs)
    title = f"Comparison {comparison.name}"
    table = markdown(runs, comparison.baseline, title, command, failures)
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
            "failed": [dataclasses.asdict(failure) for failure in failures],
        },
        indent=2,
    )
    with OutputFolder.open(comparison.folder) as folder:
        folder.write(TABLE_FILE, table.encode())
        folder.write(SUMMARY_FILE, f"{summary}\n".encode())
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

    Raises
    ------
    ForeignFileError
        If ``comparison.json`` is not as a comparison writes it.
    RunError
        If a run is missing or damaged, or runs cannot be compared.
    OutputError
        If the report cannot be written.
    """
    summary = read_json(folder / SUMMARY_FILE, Summary, MAX_SUMMARY_BYTES)
    runs = {
        variant: [FinishedRun.read(folder / name) for name in names]
        for variant, names in summary["runs"].items()
    }
    refuse_unlike(runs)
    failures = [
        Failure(failed["variant"], failed["seed"], failed["reason"])
        for failed in summary.get("failed", [])
    ]
    return write_comparison_report(
        folder, summary["name"], runs, summary["baseline"], failures
    )


def _baseline_run(
    run: FinishedRun, baseline: Sequence[FinishedRun]
) -> FinishedRun | None:
    """Return the baseline's run with the same seed, if it is another one."""
    same = [b for b in baseline if b.seed == run.seed and b.folder != run.folder]
    return same[0] if same else None
