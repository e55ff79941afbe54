"""The report of a run or a comparison: its sections, figures and tables."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from clip2fl_cli import figures
from clip2fl_cli.page import (
    PAGE_FILE,
    Cell,
    Picture,
    Section,
    Table,
    TableRow,
    write_page,
)
from clip2fl_cli.run_schema import Images
from clip2fl_cli.runs import LAST_ROUNDS, FinishedRun, refuse_other_classes
from clip2fl_cli.sections import (
    Line,
    accuracy_section,
    classes_section,
    clients_section,
    confusion_section,
    features_section,
    losses_section,
)
from clip2fl_cli.summary import (
    Failure,
    Row,
    failed_runs,
    summarise,
    teachers,
    tested_on,
)
from clip2fl_cli.tables import (
    COLUMNS,
    TITLES,
    accuracy_cells,
    accuracy_values,
    cost_values,
    loss_values,
    mean_bytes,
    rounds_table,
    runs_table,
    spread_cell,
    teacher_rows,
    text_table,
)


def write_run_report(run: FinishedRun, against: FinishedRun | None = None) -> Path:
    """Write a run's ``report.html`` and figures into its folder.

    Parameters
    ----------
    run : FinishedRun
        The run.
    against : FinishedRun or None
        A run of FedAvg (or another method) with which to compare the accuracy by class.

    Returns
    -------
    Path
        Path of the page.

    Raises
    ------
    RunError
        If the two runs have different classes, or a file of a run is damaged.
    OutputError
        If the report cannot be written.
    """
    lines = [Line(f"{head} head", head, [run]) for head in run.heads]
    others = []
    if against is not None:
        refuse_other_classes([run, against])
        others = [Line(f"run {against.name}", against.heads[0], [against])]
    sections = [
        _run_results(run),
        accuracy_section(lines, rounds_table(run, accuracy_values, "accuracy-rounds")),
        classes_section([*lines, *others]),
        clients_section(run),
        features_section(run),
        losses_section({"": [run]}, [rounds_table(run, loss_values, "losses-rounds")]),
        _run_costs(run),
        confusion_section(run),
        _configuration(run),
    ]
    config = run.config
    lead = (
        f"{config['method']} on {config['dataset.name']}, seed {run.seed}, "
        f"{len(run.rounds)} rounds; {_teacher_text([run])}."
    )
    return write_page(run.folder, f"Run {run.name}", lead, sections)


def write_comparison_report(
    folder: Path,
    name: str,
    runs: Mapping[str, Sequence[FinishedRun]],
    baseline: str,
    failures: Sequence[Failure] = (),
) -> Path:
    """Write a comparison's ``report.html`` and figures into its folder.

    Parameters
    ----------
    folder : Path
        The comparison's folder, in which the runs' folders lie.
    name : str
        Name of the comparison.
    runs : mapping of str to sequence of FinishedRun
        Each variant's runs, at least one.
    baseline : str
        The variant with which the others are compared.
    failures : sequence of Failure
        Runs that did not complete.

    Returns
    -------
    Path
        Path of the page.

    Raises
    ------
    RunError
        If runs cannot be compared, or a file of a run is damaged.
    OutputError
        If the report cannot be written.
    """
    rows = summarise(runs, baseline)
    lines = [Line(variant, group[0].heads[0], group) for variant, group in runs.items()]
    best = runs[
        max((row for row in rows if row.delivered), key=_balanced_mean).variant
    ][0]
    every = [run for group in runs.values() for run in group]
    aside = _aside(rows, baseline)
    sections = [
        _comparison_results(rows, runs, baseline, failures),
        accuracy_section(lines, runs_table(runs), aside),
        classes_section(lines, aside),
        clients_section(best),
        features_section(best),
        losses_section(runs, [], aside),
        _comparison_costs(runs),
        confusion_section(best),
        _comparison_configuration(runs),
        _links(runs),
    ]
    lead = (
        f"{len(every)} runs of {len(runs)} variants; {_teacher_text(every)}. Single "
        f"runs below are {best.name}'s, the first of the variant with the best "
        "balanced accuracy."
    )
    if failures:
        lead += f" {len(failures)} runs failed; the table of results names them."
    return write_page(folder, f"Comparison {name}", lead, sections)


def _run_results(run: FinishedRun) -> Section:
    rows = []
    for head in run.heads:
        final = run.final(head)
        name = f"{run.config['method']}, {head} head"
        delivered = head == run.heads[0]
        rows.append(
            TableRow(
                [Cell(name), Cell("last round"), *accuracy_cells(final)],
                marked=delivered,
            )
        )
        means = {column: run.last(head, column) for column in COLUMNS}
        rows.append(
            TableRow([Cell(name), Cell(f"last {LAST_ROUNDS}"), *accuracy_cells(means)])
        )
        if run.images is Images.HELD_OUT:
            whole = accuracy_cells(run.on(Images.ALL).final(head))
            rows.append(TableRow([Cell(name), Cell("last round, all images"), *whole]))
    rows += teacher_rows({"": [run]}, 1)
    table = Table(
        "results",
        (
            f"Accuracy in percent on {run.facts['test_images']:,} test images; bold: "
            "what the run delivers, on all of them."
            if run.facts["test_images"]
            else "Accuracy in percent on the sites' validation images, mean over the "
            "sites that hold a class; bold: what the run delivers."
        ),
        ["", "rounds", *TITLES],
        rows,
    )
    text = " ".join([*_part_text(run), _groups_text(run), *_privacy_text(run)])
    return Section("results", "Results", text, tables=[table])


def _privacy_text(run: FinishedRun) -> list[str]:
    """Return a sentence about each privacy mechanism with an account."""
    protects = {
        "class_gradients": "An image's part in its client's class gradients",
        "updates": "A client's part in the averaged models",
    }
    return [
        f"{protects[name]}: ({spent['epsilon_total']:.2f}, {spent['delta']:g})-"
        f"differential privacy for the client asked most often, "
        f"{spent['epsilon_round']:.2f} a round; see docs/privacy.md for what that "
        "leaves open."
        for name, spent in run.rounds[-1].get("privacy", {}).items()
    ]


def _comparison_results(
    rows: Sequence[Row],
    runs: Mapping[str, Sequence[FinishedRun]],
    baseline: str,
    failures: Sequence[Failure],
) -> Section:
    beside = ["balanced, all images"] if rows[0].all_images else []
    body = [
        TableRow(
            [
                Cell(row.variant),
                Cell(row.head),
                Cell("-" if row.difference is None else str(row.difference)),
                *(spread_cell(row.columns[column]) for column in COLUMNS),
                *(spread_cell(row.all_images) for _ in beside),
                Cell(", ".join(map(str, row.seeds))),
            ],
            marked=row.delivered,
        )
        for row in rows
    ]
    unknown = [Cell("-")] * (len(TITLES) + len(beside) + 2)
    body += [
        TableRow([Cell(variant), *unknown, Cell(failed)])
        for variant, failed in failed_runs(failures).items()
    ]
    table = Table(
        "results",
        f"Accuracy in percent, mean of the last {LAST_ROUNDS} rounds ± standard "
        f"deviation over seeds. Difference: to what {baseline} delivers, in balanced "
        "accuracy, seed by seed, with its 95 % confidence interval. Bold: what is "
        "delivered.",
        ["variant", "head", "difference", *TITLES, *beside, "seeds"],
        [*body, *teacher_rows(runs, 2, len(beside) + 1)],
    )
    first = next(iter(runs.values()))[0]
    text = " ".join([*_part_text(first), _groups_text(first)])
    return Section("results", "Results", text, tables=[table])


def _aside(rows: Sequence[Row], baseline: str) -> list[str]:
    """Return the variants that figures show in grey, if there are too many.

    The baseline gets a colour first, then variants with more seeds, then with higher
    accuracy.
    """
    delivered = sorted(
        (row for row in rows if row.delivered),
        key=lambda row: (
            row.variant != baseline,
            -len(row.seeds),
            -_balanced_mean(row),
        ),
    )
    return [row.variant for row in delivered[figures.MAX_COLOURED :]]


def _run_costs(run: FinishedRun) -> Section:
    phases = run.phases()
    wall = {n: s for n, s in phases.items() if not n.startswith("clients-")}
    own = {
        n.removeprefix("clients-"): s
        for n, s in phases.items()
        if n.startswith("clients-")
    }
    traffic = {
        "down, all clients": mean_bytes([run], "down"),
        "up, all clients": mean_bytes([run], "up"),
        "class gradients in it": mean_bytes([run], "class_gradients"),
    }
    shown = {
        "seconds of the run, by phase": wall,
        "seconds of all clients, added up": own,
        "megabytes a round": {n: v / 1e6 for n, v in traffic.items()},
    }
    picture = Picture(
        "costs",
        "Seconds and bytes by phase: "
        + "; ".join(
            f"{title}: " + ", ".join(f"{n} {v:,.3g}" for n, v in panel.items())
            for title, panel in shown.items()
        ),
        figures.bars(shown),
    )
    text = (
        f"The run took {run.wall_seconds() / 60:,.1f} minutes. Clients work side by "
        "side, so their own seconds add up to more than the phase 'clients' took."
    )
    table = rounds_table(run, cost_values, "costs-rounds")
    return Section("costs", "Seconds and bytes", text, [picture], [table])


def _comparison_costs(runs: Mapping[str, Sequence[FinishedRun]]) -> Section:
    minutes = {
        variant: statistics.fmean(run.wall_seconds() / 60 for run in group)
        for variant, group in runs.items()
    }
    shown = {
        "minutes a run": minutes,
        "megabytes up a round": {
            variant: mean_bytes(group, "up") / 1e6 for variant, group in runs.items()
        },
    }
    phases = list(
        dict.fromkeys(
            phase for group in runs.values() for run in group for phase in run.phases()
        )
    )
    table = Table(
        "costs-phases",
        "Numbers: seconds of a run by phase (clients-...: all clients, added up)",
        ["variant", *phases],
        [
            TableRow(
                [
                    Cell(variant),
                    *(
                        Cell.number(
                            statistics.fmean(r.phases().get(phase, 0.0) for r in group)
                        )
                        for phase in phases
                    ),
                ]
            )
            for variant, group in runs.items()
        ],
        folded=True,
    )
    alt = "; ".join(
        f"{variant} {value:.1f} minutes" for variant, value in minutes.items()
    )
    picture = Picture("costs", f"Minutes a run: {alt}.", figures.bars(shown))
    text = "Minutes are not comparable where other work shared the machine."
    return Section("costs", "Seconds and bytes", text, [picture], [table])


def _configuration(run: FinishedRun) -> Section:
    facts = [
        *((f"version of {name}", v) for name, v in run.facts["versions"].items()),
        ("client code", run.facts["code"]),
    ]
    rows = [(key, json.dumps(value)) for key, value in run.config.items()]
    return Section(
        "configuration",
        "Configuration",
        "Every key as the run resolved it; a run with the same gives the same numbers.",
        tables=[
            text_table("configuration-table", "Keys", ["key", "value"], rows),
            text_table("versions-table", "Versions", ["what", "which"], facts),
        ],
    )


def _comparison_configuration(runs: Mapping[str, Sequence[FinishedRun]]) -> Section:
    configs = {
        variant: {
            key: json.dumps(value)
            for key, value in group[0].config.items()
            if key not in ("run.dir", "run.name", "seed")
        }
        for variant, group in runs.items()
    }
    keys = sorted({key for config in configs.values() for key in config})
    found = {key: [c.get(key, "-") for c in configs.values()] for key in keys}
    differing = [key for key in keys if len(set(found[key])) > 1]
    tables = [
        text_table(
            "differences-table",
            "Keys in which variants differ",
            ["variant", *differing],
            [
                (variant, *(config.get(key, "-") for key in differing))
                for variant, config in configs.items()
            ],
        ),
        text_table(
            "configuration-table",
            "Keys that all share",
            ["key", "value"],
            [(key, found[key][0]) for key in keys if key not in differing],
        ),
    ]
    return Section("configuration", "Configuration", "", tables=tables)


def _links(runs: Mapping[str, Sequence[FinishedRun]]) -> Section:
    rows = [
        TableRow(
            [
                Cell(variant),
                Cell(str(run.seed)),
                Cell.file(run.name, Path(run.folder.name, PAGE_FILE)),
            ]
        )
        for variant, group in runs.items()
        for run in group
    ]
    table = Table(
        "runs-table", "Reports of single runs", ["variant", "seed", "run"], rows
    )
    return Section("runs", "Runs", "", tables=[table])


def _groups_text(run: FinishedRun) -> str:
    groups = run.facts["shot_groups"]
    named = "; ".join(
        f"{title}: {', '.join(run.class_names[c] for c in groups[title][:10])}"
        + (f" and {len(groups[title]) - 10} more" if len(groups[title]) > 10 else "")
        for title in ("many", "medium", "few")
    )
    rule = {
        "count": "more than 100, 20 to 100, fewer than 20 training images",
        "rank": "30/40/30 % of the classes by frequency",
        "listed": "30/40/30 % of the classes in the order of dataset.class-names",
    }[groups["rule"]]
    return f"Many-, medium- and few-shot classes ({rule}): {named}."


def _part_text(run: FinishedRun) -> list[str]:
    """Return a sentence about the test images, if they are a part of all."""
    return [] if run.whole is None else [f"Accuracy on {tested_on(run)}."]


def _teacher_text(runs: Sequence[FinishedRun]) -> str:
    names = list(teachers({"": runs}))
    return f"teacher {', '.join(names)}" if names else "no teacher"


def _balanced_mean(row: Row) -> float:
    balanced = row.columns["balanced"]
    assert balanced is not None, "balanced accuracy has no holes"
    return balanced.mean
