"""The report of a comparison: its sections, figures and tables."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from clip2fl_cli import figures
from clip2fl_cli.charts import Chart, in_picture
from clip2fl_cli.colours import IN_BACKGROUND, MAX_COLOURED, Style, styles
from clip2fl_cli.figures import Estimate
from clip2fl_cli.headline import comparison_headline
from clip2fl_cli.page import (
    PAGE_FILE,
    Cell,
    Picture,
    Section,
    Table,
    TableRow,
    write_page,
)
from clip2fl_cli.runs import FinishedRun
from clip2fl_cli.sections import (
    OWN_KEYS,
    Line,
    accuracy_section,
    classes_section,
    clients_section,
    confusion_section,
    features_section,
    groups_text,
    images_text,
    losses_section,
    teacher_text,
)
from clip2fl_cli.summary import (
    Failure,
    Row,
    cautions,
    code_text,
    difference_text,
    failed_runs,
    paired_difference,
    summarise,
)
from clip2fl_cli.tables import (
    COLUMNS,
    mean_bytes,
    mean_minutes,
    row_of,
    runs_table,
    spread_cell,
    teacher_rows,
    text_table,
)
from clip2fl_cli.wording import SHARED_TRAINING, head_title, last_rounds

# Title of the accuracy on all test images, beside the one on those held out.
ALL_IMAGES = "balanced, all images"
FEW_DIFFERENCE = "few-shot difference"


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
    ranking = sorted(
        (row for row in rows if row.delivered), key=_balanced_mean, reverse=True
    )
    # Means over other seeds are no rank: seeds differ by points.
    most = max(len(row.seeds) for row in ranking)
    leading = [row for row in ranking if len(row.seeds) == most]
    best = runs[leading[0].variant][0]
    every = [run for group in runs.values() for run in group]
    style_of = _styles_of(rows, runs, baseline)
    lines = [
        Line(variant, group[0].heads[0], group, style_of[variant])
        for variant, group in runs.items()
    ]
    sections = [
        _comparison_results(rows, ranking, runs, baseline, failures, style_of),
        accuracy_section(lines, runs_table(runs)),
        classes_section(lines),
        clients_section(best),
        features_section(best),
        losses_section(runs, [], style_of),
        _comparison_costs(runs),
        confusion_section(best),
        _comparison_configuration(runs),
        _links(runs),
    ]
    lead = (
        f"{len(every)} {'run' if len(every) == 1 else 'runs'} of {len(runs)} "
        f"{'variant' if len(runs) == 1 else 'variants'}; {teacher_text(every)}. "
        f"Figures of a single run (clients, features, confusion) show {best.name}, "
        "the first run of the variant with the best balanced accuracy"
        + ("." if len(leading) == len(ranking) else " of those with the most seeds.")
    )
    headline = comparison_headline(leading, runs, baseline, failures)
    return write_page(folder, f"Comparison {name}", headline, lead, sections)


def _comparison_results(
    rows: Sequence[Row],
    ranking: Sequence[Row],
    runs: Mapping[str, Sequence[FinishedRun]],
    baseline: str,
    failures: Sequence[Failure],
    style_of: Mapping[str, Style],
) -> Section:
    beside = [ALL_IMAGES] if ranking[0].all_images else []
    minutes = [] if _shared(runs) else ["minutes"]
    header = [
        *("variant", "balanced", "difference", "few", FEW_DIFFERENCE),
        *("medium", "many", *minutes, "MB up", "top-1", *beside, "head", "seeds"),
    ]
    body = []
    for row in ranking:
        group = runs[row.variant]
        costs = {
            "minutes": Cell.number(mean_minutes(group)),
            "MB up": Cell.number(mean_bytes(group, "up") / 1e6),
        }
        body.append(row_of(header, _classifier_cells(row) | costs))
    body += [
        row_of(header, {"variant": Cell(variant), "seeds": Cell(failed)})
        for variant, failed in failed_runs(failures).items()
    ]
    first = next(iter(runs.values()))[0]
    averaged = last_rounds(run for group in runs.values() for run in group)
    table = Table(
        "results-table",
        f"Accuracy in percent, mean of {averaged} ± standard deviation over "
        f"seeds. Differences: to what {baseline} delivers, in balanced and in few-shot "
        "accuracy, seed by seed, with their 95 % confidence intervals. Minutes: of a "
        "run. MB up: megabytes that all clients send in a round.",
        header,
        [*body, *teacher_rows(runs, header)],
    )
    text = " ".join([*images_text(first), groups_text(first), *cautions(runs)])
    picture = _ranking_picture(ranking, runs, baseline, style_of)
    return Section(
        "results", "Results", text, [picture], [table, *_other_classifiers(rows)]
    )


def _other_classifiers(rows: Sequence[Row]) -> list[Table]:
    """Return a folded table of the classifiers that variants do not deliver, if any."""
    header = ["variant", "balanced", "difference", "few", FEW_DIFFERENCE, "medium"]
    header += ["many", "top-1", "head", "seeds"]
    others = [row_of(header, _classifier_cells(r)) for r in rows if not r.delivered]
    caption = "Numbers: classifiers that are not delivered"
    return [Table("others", caption, header, others, folded=True)] if others else []


def _classifier_cells(row: Row) -> dict[str, Cell]:
    """Return the cells of a variant's classifier, by title."""
    return {
        "variant": Cell(row.variant),
        "difference": Cell(difference_text(row.difference)),
        FEW_DIFFERENCE: Cell(difference_text(row.few_difference)),
        **{title: spread_cell(row.columns[c]) for c, title in COLUMNS.items()},
        ALL_IMAGES: spread_cell(row.all_images),
        "head": Cell(head_title(row.head)),
        "seeds": Cell(", ".join(map(str, row.seeds))),
    }


def _ranking_picture(
    ranking: Sequence[Row],
    runs: Mapping[str, Sequence[FinishedRun]],
    baseline: str,
    style_of: Mapping[str, Style],
) -> Picture:
    """Return accuracy, differences and costs of the variants, the best on top."""
    accuracies, differences = [], []
    for row in ranking:
        values = {
            run.seed: value
            for run in runs[row.variant]
            if (value := run.last(row.head, "balanced")) is not None
        }
        # The interval of the mean is the one of its difference to 0.
        spread = paired_difference(values, dict.fromkeys(values, 0.0))
        style = style_of[row.variant]
        accuracies.append(
            Estimate(
                row.variant,
                _balanced_mean(row),
                None if spread is None else spread.interval,
                list(values.values()),
                style,
            )
        )
        if row.difference is not None:
            found = row.difference
            differences.append(
                Estimate(row.variant, found.mean, found.interval, [], style)
            )
    colours = {variant: style.colour for variant, style in style_of.items()}
    costs: dict[str, Callable[[Sequence[FinishedRun]], float]] = {
        "Minutes a run": mean_minutes,
        "Megabytes up a round": lambda group: mean_bytes(group, "up") / 1e6,
    }
    if _shared(runs):
        del costs["Minutes a run"]
    panels = [figures.estimates_panel("Balanced accuracy, %", accuracies)]
    if differences:
        panels.append(
            figures.estimates_panel(
                f"Points against {in_picture(baseline)}", differences, 0.0
            )
        )
    for title, cost in costs.items():
        values_of = {row.variant: cost(runs[row.variant]) for row in ranking}
        panels.append(figures.bars_panel(title, values_of, colours))
    order = ", ".join(f"{row.variant} {_balanced_mean(row):.1f} %" for row in ranking)
    return Picture(
        "ranking",
        f"Variants by balanced accuracy, the best on top: {order}. Lines: 95 % "
        "confidence intervals; ticks: single seeds. Beside them what a run costs.",
        Chart(panels, columns=2),
    )


def _styles_of(
    rows: Sequence[Row], runs: Mapping[str, Sequence[FinishedRun]], baseline: str
) -> dict[str, Style]:
    """Return the style of each variant; if there are too many, some are grey.

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
    coloured = {row.variant for row in delivered[:MAX_COLOURED]}
    known = styles(
        {
            variant: group[0].config["method"]
            for variant, group in runs.items()
            if variant in coloured
        }
    )
    return {variant: known.get(variant, IN_BACKGROUND) for variant in runs}


def _comparison_costs(runs: Mapping[str, Sequence[FinishedRun]]) -> Section:
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
    text = (
        SHARED_TRAINING
        if _shared(runs)
        else "Minutes are not comparable where other work shared the machine."
    )
    return Section("costs", "Seconds and bytes", text, tables=[table])


def _comparison_configuration(runs: Mapping[str, Sequence[FinishedRun]]) -> Section:
    configs = {
        variant: {
            key: json.dumps(value)
            for key, value in group[0].config.items()
            if key not in (*OWN_KEYS, "seed")
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
            folded=True,
        ),
    ]
    code = code_text([run for group in runs.values() for run in group])
    return Section("configuration", "Configuration", code, tables=tables)


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


def _shared(runs: Mapping[str, Sequence[FinishedRun]]) -> bool:
    return any(run.shared_training for group in runs.values() for run in group)


def _balanced_mean(row: Row) -> float:
    balanced = row.columns["balanced"]
    assert balanced is not None, "balanced accuracy has no holes"
    return balanced.mean
