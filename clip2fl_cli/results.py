"""The results in a comparison's folder: page, table of rounds, summary, reports."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clip2fl_cli.comparison import Comparison
from clip2fl_cli.comparison_report import write_comparison_report
from clip2fl_cli.comparison_table import (
    MAX_SUMMARY_BYTES,
    Compared,
    read_compared,
    recorded_facts,
    rounds_csv,
)
from clip2fl_cli.output import OutputFolder
from clip2fl_cli.report import write_run_report
from clip2fl_cli.run_schema import Images, Summary
from clip2fl_cli.runs import LAST_ROUNDS, FinishedRun, chosen_images
from clip2fl_cli.summary import (
    CONFIDENCE,
    Failure,
    Origin,
    markdown,
    refuse_unlike,
    summarise,
    teachers,
)
from server_app.foreign_files import read_json

SUMMARY_FILE = "comparison.json"
MARKDOWN_FILE = "comparison.md"
TABLE_FILE = "comparison.csv"


@dataclass(frozen=True)
class Results:
    """A comparison's page as Markdown, and its numbers as JSON."""

    markdown: str
    json: str

    @classmethod
    def of(cls, compared: Compared) -> "Results":
        """Draw the page of a comparison, and collect its numbers.

        Raises
        ------
        RunError
            If runs cannot be compared, or not on the wanted test images.
        """
        baseline = compared.baseline
        runs, divided = _shown(compared.runs, compared.images)
        refuse_unlike(runs)
        title = f"Comparison {compared.name}"
        page = markdown(runs, baseline, title, compared.origin, compared.failures)
        summary = {
            "name": compared.name,
            "baseline": baseline,
            **dataclasses.asdict(compared.origin),
            "last_rounds": LAST_ROUNDS,
            "confidence": CONFIDENCE,
            **divided,
            "rows": [row.fields() for row in summarise(runs, baseline)],
            "teachers": teachers(runs),
            "runs": {
                variant: [run.folder.name for run in group]
                for variant, group in runs.items()
            },
            "failed": [dataclasses.asdict(failure) for failure in compared.failures],
            **recorded_facts(compared.runs),
        }
        return cls(page, json.dumps(summary, indent=2))

    def answer(self, as_json: bool) -> str:
        """Return the command's output: the numbers as JSON, or the page."""
        return self.json if as_json else self.markdown


@dataclass(frozen=True)
class Written:
    """The results of a comparison, and the path of its report."""

    results: Results
    report: Path


def write_results(
    comparison: Comparison,
    runs: Mapping[str, Sequence[FinishedRun]],
    command: str,
    failures: Sequence[Failure] = (),
    images: Images | None = None,
) -> Written:
    """Write a comparison's page, table, summary, report and the report of every run.

    Parameters
    ----------
    comparison : Comparison
        The comparison.
    runs : mapping of str to sequence of FinishedRun
        Each variant's complete runs; there is at least one.
    command : str
        The command to name on the page.
    failures : sequence of Failure
        Runs that did not complete; the results name them.
    images : Images or None
        The test images of the results; None: as `chosen_images` chooses.

    Returns
    -------
    Written

    Raises
    ------
    RunError
        If runs cannot be compared, or not on these images, or a file of a run is
        damaged.
    OutputError
        If results cannot be written.
    """
    origin = Origin.here(command)
    results = Results.of(
        Compared(comparison.name, comparison.baseline, runs, failures, origin, images)
    )
    with OutputFolder.open(comparison.folder) as folder:
        folder.write(MARKDOWN_FILE, results.markdown.encode())
        folder.write(TABLE_FILE, rounds_csv(runs).encode())
        folder.write(SUMMARY_FILE, f"{results.json}\n".encode())
    shown, _ = _shown(runs, images)
    for run in (run for group in shown.values() for run in group):
        write_run_report(run, _baseline_run(run, shown.get(comparison.baseline, [])))
    return Written(results, rewrite_report(comparison.folder))


def redraw(table: Path, images: Images | None = None) -> Results:
    """Draw a comparison's page again, without the folders of its runs.

    Parameters
    ----------
    table : Path
        A comparison's table of rounds, with the JSON file of the same name beside it.
    images : Images or None
        The test images of the page; None: those of the comparison's own page.

    Returns
    -------
    Results
        The same results as when the comparison wrote the two files, unless the images
        are others.

    Raises
    ------
    ForeignFileError
        If one of the files has not the form that a comparison writes.
    RunError
        If runs cannot be compared.
    """
    compared = read_compared(table)
    if images is not None:
        compared = dataclasses.replace(compared, images=images)
    return Results.of(compared)


def rewrite_report(folder: Path, images: Images | None = None) -> Path:
    """Write the report of a comparison from its folder.

    Parameters
    ----------
    folder : Path
        A comparison's folder, with its ``comparison.json``.
    images : Images or None
        The test images of the report; None: those of the comparison's own page.

    Returns
    -------
    Path
        Path of the page.

    Raises
    ------
    ForeignFileError
        If ``comparison.json`` has not the form that a comparison writes.
    RunError
        If a run is missing or damaged, or runs cannot be compared.
    OutputError
        If the report cannot be written.
    """
    summary = read_json(folder / SUMMARY_FILE, Summary, MAX_SUMMARY_BYTES)
    if images is None and summary.get("images"):
        images = Images(summary["images"])
    runs, _ = _shown(
        {
            variant: [FinishedRun.read(folder / name) for name in names]
            for variant, names in summary["runs"].items()
        },
        images,
    )
    refuse_unlike(runs)
    failures = [
        Failure(failed["variant"], failed["seed"], failed["reason"])
        for failed in summary.get("failed", [])
    ]
    return write_comparison_report(
        folder, summary["name"], runs, summary["baseline"], failures
    )


def _shown(
    runs: Mapping[str, Sequence[FinishedRun]], wanted: Images | None
) -> tuple[dict[str, list[FinishedRun]], dict[str, str]]:
    """Return the runs on the test images of a page, and the images' name for JSON.

    Runs that do not divide their test images have no name, as in earlier versions.
    """
    every = [run for group in runs.values() for run in group]
    images = chosen_images(every, wanted)
    found = {
        variant: [run.on(images) for run in group] for variant, group in runs.items()
    }
    divided = any(run.tuning_share > 0 for run in every)
    return found, {"images": images.value} if divided else {}


def _baseline_run(
    run: FinishedRun, baseline: Sequence[FinishedRun]
) -> FinishedRun | None:
    """Return the baseline's run with the same seed, unless it is this run."""
    same = [b for b in baseline if b.seed == run.seed and b.folder != run.folder]
    return same[0] if same else None
