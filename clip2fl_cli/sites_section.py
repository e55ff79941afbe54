"""The section of a report about the sites: what each did, and how fair the model is."""

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from clip2fl_cli import figures
from clip2fl_cli.charts import Chart
from clip2fl_cli.colours import Style
from clip2fl_cli.page import Cell, Picture, Section, Table, TableRow
from clip2fl_cli.runs import FinishedRun
from clip2fl_cli.tables import text_table
from clip2fl_cli.wording import head_title
from clip2fl_common.metrics import TEACHER_HEAD

# More bars are no picture that one can read; the table has all sites.
MAX_BARS = 40
# Latest replies that were not used, of at most this many.
MAX_UNUSED = 200
# Round, site, kind of request and reason of a reply that was not used.
Unused = tuple[str, str, str, str]


def sites_section(run: FinishedRun, style: Style) -> list[Section]:
    """Return the section of the sites; nothing for a run with simulated clients."""
    unused = [
        (str(line["round"]), str(reply["site"]), reply["request"], reply["reason"])
        for line in run.rounds
        for reply in line.get("unused_replies", [])
    ]
    if names := sorted({name for line in run.rounds for name in line.get("sites", {})}):
        section = _told(run, style, names, unused)
    elif _is_summed(run):
        section = _summed(run, unused)
    else:
        return []
    if not unused:
        return [section]
    latest = text_table(
        "unused-table",
        "Replies that were missing or not used"
        + (f", the last {MAX_UNUSED}" if len(unused) > MAX_UNUSED else ""),
        ["round", "site", "request", "reason"],
        unused[-MAX_UNUSED:],
        folded=True,
    )
    return [replace(section, tables=[*section.tables, latest])]


def _is_summed(run: FinishedRun) -> bool:
    """Return whether the sites' updates and accuracies came as sums."""
    secure = run.config.get("aggregation.secure", False)
    return bool(secure) and "summed_evaluation" in run.rounds[-1]


def _told(
    run: FinishedRun, style: Style, names: list[str], unused: list[Unused]
) -> Section:
    """Return the section of sites that tell their own sizes and accuracies."""
    latest = {name: _latest(run, name, "evaluation") for name in names}
    head = run.heads[0]
    balanced = {
        name: found["accuracy"][head]["balanced"]
        for name, found in latest.items()
        if head in found.get("accuracy", {})
    }
    worst_first = sorted(names, key=lambda name: balanced.get(name, float("inf")))
    lost = Counter(site for _, site, _, _ in unused)
    rows = [
        _row(run, name, latest[name], lost[name], name == worst_first[0] in balanced)
        for name in worst_first
    ]
    table = Table(
        "sites-table",
        f"Accuracy in percent of {head_title(head)} and of the teacher on each "
        "site's own validation images, when it last evaluated, the worst site "
        "first; sizes and seconds of its trainings are medians.",
        [
            *("site", "balanced", "few", "teacher", "training images"),
            *("validation images", "unreadable", "trained in rounds"),
            *("replies not used", "s", "MB"),
        ],
        rows,
    )
    return Section(
        "sites",
        "Sites",
        f"{_fairness(balanced, worst_first)} {_unreadable(run)}",
        _picture(balanced, worst_first, style),
        [table],
    )


def _summed(run: FinishedRun, unused: list[Unused]) -> Section:
    """Return the section of sites whose updates and accuracies came as sums."""
    used = Counter(str(name) for line in run.rounds for name in line.get("clients", []))
    lost = Counter(site for _, site, _, _ in unused)
    table = Table(
        "sites-table",
        "How often each site's update was part of a round's sum.",
        ["site", "trained in rounds", "replies not used"],
        [
            TableRow([Cell(n), Cell.number(used[n], 0), Cell.number(lost[n], 0)])
            for n in sorted({*used, *lost})
        ],
    )
    found = run.rounds[-1]["summed_evaluation"]
    evaluated = (
        f"The last evaluation is the sum of {found['sites']} sites with "
        f"{found['images']:,} validation images."
        if found
        else "The last round has no sum of evaluations."
    )
    text = (
        "The server sees only sums of the sites' updates and accuracies "
        f"(aggregation.secure), so nothing is told of one site alone. {evaluated}"
    )
    return Section("sites", "Sites", f"{text} {_unreadable(run)}", tables=[table])


def _fairness(balanced: dict[str, float], worst_first: list[str]) -> str:
    """Return how much the delivered classifier's accuracy differs between sites."""
    if not balanced:
        return "No site has evaluated the model."
    values = list(balanced.values())
    ordered = [name for name in worst_first if name in balanced]
    worst, best = ordered[0], ordered[-1]
    return (
        f"Balanced accuracy at {len(values)} sites: worst {balanced[worst]:.1f} % "
        f"({worst}), median {statistics.median(values):.1f} %, best "
        f"{balanced[best]:.1f} % ({best}), standard deviation "
        f"{statistics.pstdev(values):.1f} points. Each site counts only the classes of "
        "which it has validation images, so sites with other classes differ for that "
        "reason, too."
    )


def _unreadable(run: FinishedRun) -> str:
    counts = run.rounds[-1].get("unreadable_images")
    if counts is None or counts["train"] == counts["test"] == 0:
        return "The sites left out no unreadable image in the last round."
    return (
        f"Left out as unreadable in the last round: {counts['train']:,} training and "
        f"{counts['test']:,} validation images."
    )


def _picture(
    balanced: dict[str, float], worst_first: list[str], style: Style
) -> list[Picture]:
    drawn = [name for name in worst_first if name in balanced][:MAX_BARS]
    if not drawn:
        return []
    values = {name: balanced[name] for name in drawn}
    title = "Balanced accuracy by site, %"
    more = len(balanced) - len(drawn)
    return [
        Picture(
            "sites",
            f"{title}, the worst first"
            + (f"; {more} better sites are left out" if more else "")
            + "; the table below has the numbers.",
            Chart(
                [figures.bars_panel(title, values, dict.fromkeys(drawn, style.colour))],
                columns=1,
            ),
        )
    ]


def _row(
    run: FinishedRun, name: str, evaluation: dict[str, Any], lost: int, worst: bool
) -> TableRow:
    trainings = list(_parts(run, name, "training"))
    accuracy = evaluation.get("accuracy", {})
    own = accuracy.get(run.heads[0], {})
    unreadable = evaluation.get("unreadable", 0) + (
        trainings[-1]["unreadable"] if trainings else 0
    )
    median = {
        field: statistics.median(t[field] for t in trainings) if trainings else None
        for field in ("seconds", "bytes")
    }
    size = median["bytes"]
    cells = [
        Cell(name),
        Cell.number(own.get("balanced")),
        Cell.number(own.get("few")),
        Cell.number(accuracy.get(TEACHER_HEAD, {}).get("balanced")),
        Cell.number(trainings[-1]["images"] if trainings else None, 0),
        Cell.number(evaluation.get("images"), 0),
        Cell.number(unreadable, 0),
        Cell.number(len(trainings), 0),
        Cell.number(lost, 0),
        Cell.number(median["seconds"]),
        Cell.number(None if size is None else size / 1e6, 2),
    ]
    return TableRow(cells, marked=worst)


def _latest(run: FinishedRun, name: str, part: str) -> dict[str, Any]:
    """Return what a site did last; empty if it has not."""
    return [{}, *_parts(run, name, part)][-1]


def _parts(run: FinishedRun, name: str, part: str) -> Iterator[dict[str, Any]]:
    for line in run.rounds:
        if found := line.get("sites", {}).get(name, {}).get(part):
            yield found


def confusion_text(run: FinishedRun) -> str | None:
    """Return whose images a confusion matrix counts; None with simulated clients."""
    last = run.rounds[-1]
    if "sites" not in last:
        return None
    if summed := last.get("summed_evaluation"):
        return (
            f"The matrix is a sum of {summed['sites']} sites. It counts the validation "
            "images of those whose policy allows it."
        )
    found = [one for site in last["sites"].values() if (one := site.get("evaluation"))]
    allowed = sum(one["confusion_matrix"] for one in found)
    return (
        f"The matrix counts validation images of {allowed} of {len(found)} sites: "
        "those whose policy allows it."
    )
