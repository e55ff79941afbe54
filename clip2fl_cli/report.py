"""The report of a run: its sections, figures and tables."""

import json
from collections.abc import Mapping
from pathlib import Path

from clip2fl_cli import figures
from clip2fl_cli.charts import Chart
from clip2fl_cli.colours import Style, styles
from clip2fl_cli.headline import run_headline
from clip2fl_cli.page import (
    Cell,
    Picture,
    Section,
    Table,
    write_page,
)
from clip2fl_cli.run_schema import Images
from clip2fl_cli.runs import FinishedRun, refuse_other_tests
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
from clip2fl_cli.sites_section import sites_section
from clip2fl_cli.summary import tested_on
from clip2fl_cli.tables import (
    COLUMNS,
    TITLES,
    accuracy_cells,
    accuracy_values,
    cost_values,
    loss_values,
    mean_bytes,
    rounds_table,
    row_of,
    teacher_rows,
    text_table,
)
from clip2fl_cli.wording import SHARED_TRAINING, head_title, last_rounds, method_title
from clip2fl_common.config import defaults


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
        If the two runs have different classes, groups of classes or test images, or a
        file of a run is damaged.
    OutputError
        If the report cannot be written.
    """
    method = method_title(run.config["method"])
    compared = {"run": run.config["method"]}
    if against is not None:
        refuse_other_tests([run, against])
        compared["baseline"] = against.config["method"]
    style_of = styles(compared)
    lines = [
        Line(f"{method}, {head_title(head)}", head, [run], style_of["run"].of_head(n))
        for n, head in enumerate(run.heads)
    ]
    if against is not None:
        label = f"baseline {method_title(against.config['method'])}"
        lines.append(
            Line(label, against.heads[0], [against], style_of["baseline"].of_head(0))
        )
    losses = {method: [run]}
    sections = [
        _run_results(run, against),
        accuracy_section(lines, rounds_table(run, accuracy_values, "accuracy-rounds")),
        classes_section(lines),
        *sites_section(run, style_of["run"].of_head(0)),
        clients_section(run),
        features_section(run),
        losses_section(
            losses,
            [rounds_table(run, loss_values, "losses-rounds")],
            {method: style_of["run"].of_head(0)},
        ),
        _run_costs(run, style_of["run"]),
        confusion_section(run),
        _configuration(run),
    ]
    lead = (
        f"{len(run.rounds)} rounds, seed {run.seed}; {teacher_text([run])}. "
        f"Folder: {run.name}."
    )
    title = f"{method} on {run.config['dataset.name']}"
    return write_page(run.folder, title, run_headline(run, against), lead, sections)


def _run_results(run: FinishedRun, against: FinishedRun | None) -> Section:
    header = ["classifier", *TITLES]
    rows = []

    def add(name: str, accuracy: Mapping[str, float | None], marked: bool) -> None:
        cells = {"classifier": Cell(name), **accuracy_cells(accuracy)}
        rows.append(row_of(header, cells, marked))

    for head in run.heads:
        name = head_title(head)
        delivered = head == run.heads[0] and run.rounds[-1]["accuracy"]
        add(f"{name}, {run.last_round}", run.final(head), bool(delivered))
        if len(run.evaluated) > 1:
            means = {column: run.last(head, column) for column in COLUMNS}
            add(f"{name}, mean of {last_rounds([run])}", means, False)
        if run.images is Images.HELD_OUT:
            whole = run.on(Images.ALL).final(head)
            add(f"{name}, {run.last_round}, all test images", whole, False)
    if against is not None:
        baseline = method_title(against.config["method"])
        name = f"baseline {baseline}, {against.last_round}"
        add(name, against.final(against.heads[0]), False)
    rows += teacher_rows({"": [run]}, header)
    table = Table(
        "results-table",
        (
            f"Accuracy in percent on {tested_on(run)}; bold: what the run delivers."
            if run.facts["test_images"]
            else "Accuracy in percent on the sites' validation images, mean over the "
            "sites that hold a class; bold: what the run delivers."
        ),
        header,
        rows,
    )
    text = " ".join([*images_text(run), groups_text(run), *_privacy_text(run)])
    return Section("results", "Results", text, tables=[table])


PROTECTED = {
    "class_gradients": "An image's part in its client's class gradients",
    "class_moments": "An image's part in its client's class moments",
    "models": "An image's part in its client's models",
    "images": "An image's part in all that its client sends with noise",
    "updates": "A client's part in the averaged models",
}


def _privacy_text(run: FinishedRun) -> list[str]:
    """Return a sentence about each privacy mechanism with an account."""
    return [
        f"{PROTECTED.get(name, name)}: "
        f"({spent['epsilon_total']:.2f}, {spent['delta']:g})-"
        f"differential privacy for the client asked most often, "
        f"{spent['epsilon_round']:.2f} a round; see docs/privacy.md for what that "
        "leaves open."
        for name, spent in run.rounds[-1].get("privacy", {}).items()
    ]


def _run_costs(run: FinishedRun, style: Style) -> Section:
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
        "statistics in it": mean_bytes([run], "class_gradients"),
    }
    shown = {
        "Seconds of the run, by phase": wall,
        "Seconds of all clients, added up": own,
        "Megabytes a round": {n: v / 1e6 for n, v in traffic.items()},
    }
    picture = Picture(
        "costs",
        "Seconds and bytes by phase: "
        + "; ".join(
            f"{title}: "
            + ", ".join(f"{n} {figures.three_digits(v)}" for n, v in panel.items())
            for title, panel in shown.items()
        ),
        Chart(
            [
                figures.bars_panel(
                    title, panel, dict.fromkeys(panel, style.of_head(0).colour)
                )
                for title, panel in shown.items()
            ],
            columns=2,
        ),
    )
    clock = run.clock_seconds()
    took = run.wall_seconds() if clock is None else clock
    waiting = "" if clock is None else " by the clock, waiting for sites included"
    text = (
        f"The run took {took / 60:,.1f} minutes{waiting}. Clients work side by "
        "side, so their own seconds add up to more than the phase 'clients' took."
    )
    if run.shared_training:
        text += f" {SHARED_TRAINING}"
    table = rounds_table(run, cost_values, "costs-rounds")
    return Section("costs", "Seconds and bytes", text, [picture], [table])


def _configuration(run: FinishedRun) -> Section:
    facts = [
        *((f"version of {name}", v) for name, v in run.facts["versions"].items()),
        ("client code", run.facts["code"]),
        ("client and server code", run.all_code),
    ]
    usual = {key: json.dumps(value) for key, value in defaults().items()}
    rows = [(key, json.dumps(value)) for key, value in run.config.items()]
    changed = [
        (key, value, usual.get(key, "-"))
        for key, value in rows
        if key not in OWN_KEYS and usual.get(key) != value
    ]
    return Section(
        "configuration",
        "Configuration",
        "A run with the same keys, code and versions gives the same numbers.",
        tables=[
            text_table(
                "changed-table",
                "Keys that differ from the defaults"
                if changed
                else "No key differs from its default",
                ["key", "value", "default"],
                changed,
            ),
            text_table(
                "configuration-table",
                f"All {len(rows)} keys as the run resolved them",
                ["key", "value"],
                rows,
                folded=True,
            ),
            text_table(
                "versions-table", "Versions", ["what", "which"], facts, folded=True
            ),
        ],
    )
