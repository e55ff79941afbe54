"""The report of a run and of a comparison: which sections, pictures and tables."""

import json
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clip2fl_cli import figures
from clip2fl_cli.figures import Curve
from clip2fl_cli.page import Cell, Picture, Section, Table, TableRow, write_page
from clip2fl_cli.runs import LAST_ROUNDS, FinishedRun
from clip2fl_cli.summary import Row, Spread, summarise, teachers

# Balanced accuracy first: on a phone, the first columns are seen.
COLUMNS = {
    "balanced": "balanced",
    "many": "many",
    "medium": "medium",
    "few": "few",
    "top1": "top-1",
}
TITLES = tuple(COLUMNS.values())
# Larger matrices are shown as a picture only; artifacts.safetensors has the numbers.
MAX_TABLE_CELLS = 12_000
UNTOLD = "Sites tell nobody how many images of a class they have."
LOSSES = {
    "client": "client (total)",
    "distillation": "distillation",
    "gradient_matching": "gradient matching",
    "prototype_contrast": "prototype contrast",
}


@dataclass(frozen=True)
class Line:
    """One classifier in a report, with its runs (one a seed).

    Attributes
    ----------
    label : str
        What it is called.
    head : str
        Which classifier of the runs.
    runs : sequence of FinishedRun
        At least one.
    """

    label: str
    head: str
    runs: Sequence[FinishedRun]

    def per_class(self) -> list[float | None]:
        """Return per-class accuracy, mean of the last rounds and all seeds."""
        columns = zip(*(run.per_class(self.head) for run in self.runs), strict=True)
        return [None if None in c else statistics.fmean(c) for c in columns]

    def balanced(self) -> float:
        """Return balanced accuracy, mean of the last rounds and all seeds."""
        values = [run.last(self.head, "balanced") for run in self.runs]
        return statistics.fmean(value for value in values if value is not None)


def write_run_report(run: FinishedRun, against: FinishedRun | None = None) -> Path:
    """Write a run's ``report.html`` and pictures into its folder.

    Parameters
    ----------
    run : FinishedRun
        What to report.
    against : FinishedRun or None
        A run of FedAvg (or another method) to set its classes against.

    Returns
    -------
    Path
        The page.
    """
    lines = [Line(f"{head} head", head, [run]) for head in run.heads]
    others = []
    if against is not None:
        others = [Line(f"run {against.folder.name}", against.heads[0], [against])]
    sections = [
        _run_results(run),
        _accuracy(lines, _rounds_table(run, _accuracy_values, "accuracy-rounds")),
        _classes([*lines, *others]),
        _clients(run),
        _features(run),
        _losses({"": [run]}, [_rounds_table(run, _loss_values, "losses-rounds")]),
        _run_costs(run),
        _confusion(run),
        _configuration(run),
    ]
    config = run.config
    lead = (
        f"{config['method']} on {config['dataset.name']}, seed {run.seed}, "
        f"{len(run.rounds)} rounds; {_teacher_text([run])}."
    )
    return write_page(run.folder, f"Run {run.folder.name}", lead, sections)


def write_comparison_report(
    folder: Path, name: str, runs: Mapping[str, Sequence[FinishedRun]], baseline: str
) -> Path:
    """Write a comparison's ``report.html`` and pictures into its folder.

    Parameters
    ----------
    folder : Path
        The comparison's folder, in which the runs' folders lie.
    name : str
        Its name.
    runs : mapping of str to sequence of FinishedRun
        Each variant's runs, at least one.
    baseline : str
        Variant that the others are set against.

    Returns
    -------
    Path
        The page.
    """
    rows = summarise(runs, baseline)
    lines = [Line(variant, group[0].heads[0], group) for variant, group in runs.items()]
    best = runs[
        max((row for row in rows if row.delivered), key=_balanced_mean).variant
    ][0]
    every = [run for group in runs.values() for run in group]
    aside = _aside(rows, baseline)
    sections = [
        _comparison_results(rows, runs, baseline),
        _accuracy(lines, _runs_table(runs), aside),
        _classes(lines, aside),
        _clients(best),
        _features(best),
        _losses(runs, [], aside),
        _comparison_costs(runs),
        _confusion(best),
        _comparison_configuration(runs),
        _links(runs),
    ]
    lead = (
        f"{len(every)} runs of {len(runs)} variants; {_teacher_text(every)}. Single "
        f"runs below are {best.folder.name}'s, the first of the variant with the best "
        "balanced accuracy."
    )
    return write_page(folder, f"Comparison {name}", lead, sections)


def _run_results(run: FinishedRun) -> Section:
    rows = []
    for head in run.heads:
        final = run.rounds[-1]["accuracy"][head]
        name = f"{run.config['method']}, {head} head"
        delivered = head == run.heads[0]
        rows.append(
            TableRow([Cell(name), Cell("last round"), *_cells(final)], marked=delivered)
        )
        means = {column: run.last(head, column) for column in COLUMNS}
        rows.append(TableRow([Cell(name), Cell(f"last {LAST_ROUNDS}"), *_cells(means)]))
    rows += _teacher_rows({"": [run]}, 1)
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
    text = " ".join([_groups_text(run), *_privacy_text(run)])
    return Section("results", "Results", text, tables=[table])


def _privacy_text(run: FinishedRun) -> list[str]:
    """Return a sentence about each mechanism that is accounted for."""
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
    rows: Sequence[Row], runs: Mapping[str, Sequence[FinishedRun]], baseline: str
) -> Section:
    body = [
        TableRow(
            [
                Cell(row.variant),
                Cell(row.head),
                Cell("-" if row.difference is None else str(row.difference)),
                *(_spread_cell(row.columns[column]) for column in COLUMNS),
                Cell(", ".join(map(str, row.seeds))),
            ],
            marked=row.delivered,
        )
        for row in rows
    ]
    table = Table(
        "results",
        f"Accuracy in percent, mean of the last {LAST_ROUNDS} rounds ± standard "
        f"deviation over seeds. Difference: to what {baseline} delivers, in balanced "
        "accuracy, seed by seed, with its 95 % confidence interval. Bold: what is "
        "delivered.",
        ["variant", "head", "difference", *TITLES, "seeds"],
        [*body, *_teacher_rows(runs, 2, 1)],
    )
    first = next(iter(runs.values()))[0]
    return Section("results", "Results", _groups_text(first), tables=[table])


def _aside(rows: Sequence[Row], baseline: str) -> list[str]:
    """Return variants that pictures show in grey, where there are too many.

    In colour are the baseline, then variants of more seeds, then of higher accuracy.
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


def _accuracy(
    lines: Sequence[Line], table: Table, aside: Collection[str] = ()
) -> Section:
    panels = {
        f"{title}, %": [
            Curve(line.label, _over_rounds(line.runs, _accuracy_of(line.head, column)))
            for line in lines
        ]
        for column, title in COLUMNS.items()
        if column != "top1"
    }
    last = "; ".join(f"{line.label} {line.balanced():.1f} %" for line in lines)
    picture = Picture(
        "accuracy",
        f"Balanced, many-, medium- and few-shot accuracy over the rounds. Balanced, "
        f"mean of the last {LAST_ROUNDS}: {last}.",
        figures.over_rounds(panels, aside),
    )
    text = f"In grey, here and below: {', '.join(aside)}." if aside else ""
    return Section("accuracy", "Accuracy over rounds", text, [picture], [table])


def _classes(lines: Sequence[Line], aside: Collection[str] = ()) -> Section:
    run = lines[0].runs[0]
    counts = run.train_counts
    values = {line.label: line.per_class() for line in lines}
    picture = Picture(
        "classes",
        "Accuracy of each class, the most frequent on top; the table below has the "
        "numbers.",
        figures.by_class(values, run.class_names, counts, aside),
    )
    rows = [
        TableRow(
            [
                Cell(run.class_names[c]),
                Cell.number(counts[c] if counts else None, 0),
                *(Cell.number(accuracy[c]) for accuracy in values.values()),
            ]
        )
        for c in run.by_frequency
    ]
    table = Table(
        "classes-table",
        f"Numbers: mean of the last {LAST_ROUNDS} rounds",
        ["class", "training images", *values],
        rows,
        folded=True,
    )
    text = "The most frequent class is on top."
    if counts is None:
        text = f"In the order of dataset.class-names. {UNTOLD}"
    return Section("classes", "Classes by frequency", text, [picture], [table])


def _clients(run: FinishedRun) -> Section:
    title = "Who holds what"
    if "clients_by_class" not in run.artifacts:
        return _absent("clients", title, "" if run.train_counts else UNTOLD)
    held = run.artifacts["clients_by_class"].numpy()
    empty = int((held == 0).sum())
    names = [str(k) for k in range(len(held))]
    picture = Picture(
        "clients",
        f"Training images by client and class: {len(held)} clients hold {held.sum():,} "
        f"images; {empty} of {held.size} pairs of client and class have none.",
        figures.heat_map(
            held[:, run.by_frequency],
            rows=names,
            columns=[run.class_names[c] for c in run.by_frequency],
            row_title="client",
            column_title="class, most frequent first",
            bar_title="training images",
        ),
    )
    tables = _matrix_tables(
        "clients-table",
        "training images by client and class",
        ["client", *(run.class_names[c] for c in run.by_frequency)],
        names,
        held[:, run.by_frequency],
    )
    return Section("clients", title, "", [picture], tables)


def _features(run: FinishedRun) -> Section:
    title = "Federated features and text prototypes"
    if "features" not in run.artifacts:
        return _absent(
            "features", title, f"{run.config['method']} has no federated features."
        )
    features = run.artifacts["features"].double().numpy()
    text_features = run.artifacts.get("text_features")
    picture = Picture(
        "features",
        "Federated features of each class as a cloud around their mean, projected on "
        "a plane, and the text prototypes of the classes on the same plane.",
        figures.clouds(
            features,
            None if text_features is None else text_features.double().numpy(),
            run.class_names,
            run.train_counts,
        ),
    )
    text = (
        f"{features.shape[1]} features a class in {features.shape[2]} dimensions, as "
        "unit vectors, on the plane that shows most of the class means"
        + (" and of the prototypes." if text_features is not None else ".")
    )
    return Section("features", title, text, [picture])


def _losses(
    runs: Mapping[str, Sequence[FinishedRun]],
    tables: Sequence[Table],
    aside: Collection[str] = (),
) -> Section:
    panels = {}
    for key, title in LOSSES.items():
        having = {
            label: group
            for label, group in runs.items()
            if any(_loss_of(key)(line) for run in group for line in run.rounds)
        }
        if having:
            panels[title] = [
                Curve(label, _over_rounds(group, _loss_of(key)))
                for label, group in having.items()
            ]
    picture = Picture(
        "losses",
        f"Losses over the rounds: {', '.join(panels)}.",
        figures.over_rounds(panels, aside),
    )
    text = (
        "Client losses are means over the last local epoch. Gradient matching and "
        "prototype contrast are those of the federated features after their last step."
    )
    return Section("losses", "Losses", text, [picture], tables)


def _run_costs(run: FinishedRun) -> Section:
    phases = run.phases()
    wall = {n: s for n, s in phases.items() if not n.startswith("clients-")}
    own = {
        n.removeprefix("clients-"): s
        for n, s in phases.items()
        if n.startswith("clients-")
    }
    traffic = {
        "down, all clients": _bytes([run], "down"),
        "up, all clients": _bytes([run], "up"),
        "class gradients in it": _bytes([run], "class_gradients"),
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
    table = _rounds_table(run, _cost_values, "costs-rounds")
    return Section("costs", "Seconds and bytes", text, [picture], [table])


def _comparison_costs(runs: Mapping[str, Sequence[FinishedRun]]) -> Section:
    minutes = {
        variant: statistics.fmean(run.wall_seconds() / 60 for run in group)
        for variant, group in runs.items()
    }
    shown = {
        "minutes a run": minutes,
        "megabytes up a round": {
            variant: _bytes(group, "up") / 1e6 for variant, group in runs.items()
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


def _confusion(run: FinishedRun) -> Section:
    title = "Confusion matrix"
    head = run.heads[0]
    if f"confusion.{head}" not in run.artifacts:
        return _absent("confusion", title)
    order = run.by_frequency
    matrix = run.artifacts[f"confusion.{head}"].numpy()[order][:, order]
    names = [run.class_names[c] for c in order]
    correct = 100 * np.trace(matrix) / matrix.sum()
    picture = Picture(
        "confusion",
        f"Test images by true and predicted class: {correct:.1f} % on the diagonal.",
        figures.heat_map(
            matrix,
            rows=names,
            columns=names,
            row_title="true class",
            column_title="predicted class",
            bar_title="percent of the true class",
            share_of_row=True,
        ),
    )
    tables = _matrix_tables(
        "confusion-table",
        "test images by true class (rows) and predicted class (columns)",
        ["true class", *names],
        names,
        matrix,
    )
    text = f"Of the {head} head after the last round, most frequent class first."
    return Section("confusion", title, text, [picture], tables)


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
            _text_table("configuration-table", "Keys", ["key", "value"], rows),
            _text_table("versions-table", "Versions", ["what", "which"], facts),
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
        _text_table(
            "differences-table",
            "Keys in which variants differ",
            ["variant", *differing],
            [
                (variant, *(config.get(key, "-") for key in differing))
                for variant, config in configs.items()
            ],
        ),
        _text_table(
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
                Cell(run.folder.name, link=f"{run.folder.name}/report.html"),
            ]
        )
        for variant, group in runs.items()
        for run in group
    ]
    table = Table(
        "runs-table", "Reports of single runs", ["variant", "seed", "run"], rows
    )
    return Section("runs", "Runs", "", tables=[table])


def _absent(name: str, title: str, reason: str = "") -> Section:
    return Section(
        name, title, reason or "The run is of a version that did not keep it."
    )


def _rounds_table(
    run: FinishedRun, values: Callable[[Mapping[str, Any]], dict[str, Any]], name: str
) -> Table:
    """Return a folded table with one row a round."""
    columns = list(
        dict.fromkeys(column for line in run.rounds for column in values(line))
    )
    rows = [
        TableRow(
            [
                Cell.number(line["round"], 0),
                *(
                    Cell.number(
                        value := values(line).get(column),
                        0 if isinstance(value, int) else 2,
                    )
                    for column in columns
                ),
            ]
        )
        for line in run.rounds
    ]
    return Table(name, "Numbers: every round", ["round", *columns], rows, folded=True)


def _runs_table(runs: Mapping[str, Sequence[FinishedRun]]) -> Table:
    """Return a folded table of the last round of every run."""
    rows = [
        TableRow(
            [
                Cell(variant),
                Cell(str(run.seed)),
                Cell(head),
                *_cells(run.rounds[-1]["accuracy"][head]),
            ]
        )
        for variant, group in runs.items()
        for run in group
        for head in run.heads
    ]
    header = ["variant", "seed", "head", *TITLES]
    return Table(
        "accuracy-runs", "Numbers: last round of every run", header, rows, folded=True
    )


def _matrix_tables(
    name: str,
    caption: str,
    header: Sequence[str],
    names: Sequence[str],
    matrix: npt.NDArray[np.int64],
) -> list[Table]:
    """Return a folded table of counts, or none where a browser would choke on it."""
    if matrix.size > MAX_TABLE_CELLS:
        return []
    rows = [
        TableRow([Cell(own), *(Cell.number(int(n), 0) for n in row)])
        for own, row in zip(names, matrix, strict=True)
    ]
    return [Table(name, f"Numbers: {caption}", header, rows, folded=True)]


def _accuracy_values(line: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{head} {title}": accuracy[column]
        for head, accuracy in line["accuracy"].items()
        for column, title in COLUMNS.items()
    }


def _loss_values(line: Mapping[str, Any]) -> dict[str, Any]:
    return {LOSSES.get(name, name): value for name, value in line["losses"].items()}


def _cost_values(line: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{f"s {phase}": seconds for phase, seconds in line["seconds"].items()},
        "bytes down": line["bytes"]["down"],
        "bytes up": line["bytes"]["up"],
        "bytes of class gradients": _gradient_bytes(line),
    }


def _gradient_bytes(line: Mapping[str, Any]) -> int:
    return sum(line["bytes"].get("class_gradients", []))


def _bytes(runs: Sequence[FinishedRun], name: str) -> float:
    """Return the mean over rounds and runs."""
    return statistics.fmean(
        _gradient_bytes(line) if name == "class_gradients" else line["bytes"][name]
        for run in runs
        for line in run.rounds
    )


def _accuracy_of(head: str, column: str) -> Callable[[Mapping[str, Any]], float | None]:
    def value(line: Mapping[str, Any]) -> float | None:
        found: float | None = line["accuracy"][head][column]
        return found

    return value


def _loss_of(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    def value(line: Mapping[str, Any]) -> float | None:
        found: float | None = line["losses"].get(name)
        return found

    return value


def _over_rounds(
    runs: Sequence[FinishedRun], value: Callable[[Mapping[str, Any]], float | None]
) -> npt.NDArray[np.float64]:
    """Return a value of each run and round, nan for holes; shape [S, R]."""
    rounds = min(len(run.rounds) for run in runs)
    return np.array(
        [
            [
                np.nan if (v := value(line)) is None else v
                for line in run.rounds[:rounds]
            ]
            for run in runs
        ]
    )


def _cells(accuracy: Mapping[str, float | None]) -> list[Cell]:
    return [Cell.number(accuracy[column]) for column in COLUMNS]


def _spread_cell(spread: Spread | None) -> Cell:
    if spread is None:
        return Cell("-")
    return Cell(str(spread), json.dumps(spread.mean))


def _teacher_rows(
    runs: Mapping[str, Sequence[FinishedRun]], before: int, after: int = 0
) -> list[TableRow]:
    return [
        TableRow(
            [
                Cell(f"teacher {name}, zero-shot"),
                *[Cell("-")] * before,
                *_cells(accuracy),
                *[Cell("-")] * after,
            ]
        )
        for name, accuracy in teachers(runs).items()
    ]


def _text_table(
    name: str, caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]
) -> Table:
    body = [TableRow([Cell(text) for text in row]) for row in rows]
    return Table(name, caption, header, body, is_text=True)


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


def _teacher_text(runs: Sequence[FinishedRun]) -> str:
    names = list(teachers({"": runs}))
    return f"teacher {', '.join(names)}" if names else "no teacher"


def _balanced_mean(row: Row) -> float:
    balanced = row.columns["balanced"]
    assert balanced is not None, "balanced accuracy has no holes"
    return balanced.mean
