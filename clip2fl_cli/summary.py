"""A comparison's numbers: means, deviations and paired differences over seeds."""

import os
import platform
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

from scipy import stats

from clip2fl_cli.run_schema import Images
from clip2fl_cli.runs import (
    COLUMNS,
    FinishedRun,
    RunError,
    refuse_other_tests,
)
from clip2fl_cli.wording import SHARED_TRAINING, last_rounds
from clip2fl_common.shown import shown

CONFIDENCE = 0.95
# So many classes are columns of a page's table, and stand in a list one by one.
FEW_CLASSES = 20
# Characters that Markdown would interpret, and those that end a table's cell.
_MARKUP = re.compile(r"[\\`*\[\]<>|~$&]")


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; None for a single seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of some values, at least one."""
        several = len(values) > 1
        return cls(
            statistics.fmean(values), statistics.stdev(values) if several else None
        )

    def __str__(self) -> str:
        """Return the text, rounded to one decimal."""
        if self.deviation is None:
            return f"{self.mean:.1f}"
        return f"{self.mean:.1f} ± {self.deviation:.1f}"


@dataclass(frozen=True)
class PairedDifference:
    """Difference to the baseline, paired by seed.

    Attributes
    ----------
    seeds : tuple of int
        Seeds that both variants have.
    mean : float
        Mean difference in points.
    interval : tuple of float or None
        Limits of the mean's 95 % confidence interval (Student's t); None for one seed.
    """

    seeds: tuple[int, ...]
    mean: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        """Return mean and interval as text, rounded to one decimal."""
        if self.interval is None:
            return f"{self.mean:+.1f}"
        low, high = self.interval
        return f"{self.mean:+.1f} [{low:+.1f}, {high:+.1f}]"


@dataclass(frozen=True)
class Row:
    """One classifier of one variant.

    Attributes
    ----------
    variant, head : str
        Names of the variant and the classifier.
    delivered : bool
        Whether the variant delivers this classifier.
    seeds : tuple of int
        Seeds of its runs.
    columns : dict of str to (Spread or None)
        Accuracy columns, mean of the last rounds; None if a value is missing.
    last_round : Spread
        Balanced accuracy of the last round alone.
    difference : PairedDifference or None
        Difference to the baseline's delivered classifier, in balanced accuracy; None
        for that classifier itself, and without a common seed.
    few_difference : PairedDifference or None
        The same of few-shot accuracy; also None where a run has no few-shot accuracy.
    all_images : Spread or None
        Balanced accuracy on all test images, mean of the last rounds; None unless the
        other columns are of the held-out images.
    """

    variant: str
    head: str
    delivered: bool
    seeds: tuple[int, ...]
    columns: dict[str, Spread | None]
    last_round: Spread
    difference: PairedDifference | None
    few_difference: PairedDifference | None
    all_images: Spread | None

    def fields(self) -> dict[str, Any]:
        """Return the row for JSON."""
        found = asdict(self)
        if self.all_images is None:
            del found["all_images"]
        return found


@dataclass(frozen=True)
class Failure:
    """A run that did not complete.

    Attributes
    ----------
    variant : str
        Name of the variant.
    seed : int
        Seed of the run.
    reason : str
        The reason, on one line.
    """

    variant: str
    seed: int
    reason: str


@dataclass(frozen=True)
class Origin:
    """The origin of a comparison's page.

    Attributes
    ----------
    command : str
        The command that made the page.
    date : str
        Date, as YYYY-MM-DD.
    hardware : str
        Hardware, in words.
    """

    command: str
    date: str
    hardware: str

    @classmethod
    def here(cls, command: str) -> "Origin":
        """Return the origin of a page that is made now, on this machine."""
        hardware = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
        return cls(command, date.today().isoformat(), hardware)


def failed_runs(failures: Sequence[Failure]) -> dict[str, str]:
    """Return the text for each variant with a failed run.

    Parameters
    ----------
    failures : sequence of Failure
        Runs that did not complete.

    Returns
    -------
    dict of str to str
        For example ``failed: seed 8: out of memory; seed 9: stopped``.
    """
    found: dict[str, list[str]] = {}
    for failure in failures:
        text = f"seed {failure.seed}: {failure.reason}"
        found.setdefault(failure.variant, []).append(text)
    return {variant: f"failed: {'; '.join(texts)}" for variant, texts in found.items()}


def refuse_unlike(runs: Mapping[str, Sequence[FinishedRun]]) -> None:
    """Raise if runs cannot be compared.

    Parameters
    ----------
    runs : mapping of str to sequence of FinishedRun
        Each variant's runs.

    Raises
    ------
    RunError
        If classes, their many-, medium- and few-shot groups or the numbers of test
        images differ, or runs of one variant have different classifiers.
    """
    every = [run for group in runs.values() for run in group]
    refuse_other_tests(every)
    for group in runs.values():
        for run in group:
            if run.heads != group[0].heads:
                raise RunError(
                    f"{shown(run.folder)} has the classifiers {', '.join(run.heads)}, "
                    f"but {shown(group[0].folder)} has {', '.join(group[0].heads)}: "
                    "runs of one variant must have the same"
                )


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float]
) -> PairedDifference | None:
    """Compare two variants seed by seed.

    The seed determines partition, sampling and initial model. So differences within a
    seed vary less than differences between seeds.

    Parameters
    ----------
    values, baseline : mapping of int to float
        A value by seed.

    Returns
    -------
    PairedDifference or None
        None without a common seed.
    """
    seeds = tuple(sorted(set(values) & set(baseline)))
    if not seeds:
        return None
    differences = [values[seed] - baseline[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    interval = None
    if len(seeds) > 1:
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1)
        margin = float(quantile) * statistics.stdev(differences) / len(seeds) ** 0.5
        interval = (mean - margin, mean + margin)
    return PairedDifference(seeds, mean, interval)


def summarise(runs: Mapping[str, Sequence[FinishedRun]], baseline: str) -> list[Row]:
    """Return the table's rows, variant by variant.

    Parameters
    ----------
    runs : mapping of str to sequence of FinishedRun
        Each variant's runs.
    baseline : str
        The variant with which the others are compared.

    Returns
    -------
    list of Row
    """
    reference = runs.get(baseline, [])

    def difference(
        group: Sequence[FinishedRun], head: str, column: str
    ) -> PairedDifference | None:
        if group is reference and head == group[0].heads[0]:
            return None
        return paired_difference(
            _by_seed(group, head, column), _by_seed(reference, None, column)
        )

    rows = []
    for variant, group in runs.items():
        delivered = group[0].heads[0]
        for head in group[0].heads:
            rows.append(
                Row(
                    variant,
                    head,
                    head == delivered,
                    tuple(run.seed for run in group),
                    {column: _spread(group, head, column) for column in COLUMNS},
                    Spread.of([run.final(head)["balanced"] for run in group]),
                    difference(group, head, "balanced"),
                    difference(group, head, "few"),
                    _spread(_whole(group), head, "balanced")
                    if group[0].images is Images.HELD_OUT
                    else None,
                )
            )
    return rows


def teachers(runs: Mapping[str, Sequence[FinishedRun]]) -> dict[str, dict[str, float]]:
    """Return the zero-shot accuracy of the runs' teachers, by name.

    A teacher that was asked with several prompts has one entry for each.
    """
    found = {
        (run.teacher["name"], run.facts["config"]["teacher.prompt"]): run.teacher
        for group in runs.values()
        for run in group
        if run.teacher and run.teacher.get("zero_shot")
    }
    prompts = Counter(name for name, _ in found)
    return {
        f"{name}, {prompt}" if prompts[name] > 1 else name: teacher["zero_shot"]
        for (name, prompt), teacher in found.items()
    }


def markdown(
    runs: Mapping[str, Sequence[FinishedRun]],
    baseline: str,
    title: str,
    origin: Origin,
    failures: Sequence[Failure] = (),
) -> str:
    """Return the dated Markdown page of a comparison, to be kept with the results.

    Parameters
    ----------
    runs : mapping of str to sequence of FinishedRun
        Each variant's runs.
    baseline : str
        The variant with which the others are compared.
    title : str
        Heading.
    origin : Origin
        Command, date and hardware of the page.
    failures : sequence of Failure
        Runs that did not complete.

    Returns
    -------
    str
    """
    every = [run for group in runs.values() for run in group]
    facts = every[0].facts
    versions = plain(", ".join(f"{name} {v}" for name, v in facts["versions"].items()))
    groups = facts["shot_groups"]
    reference = plain(baseline)
    if any(run.shared_training for run in every):
        minutes = SHARED_TRAINING
    else:
        minutes = (
            "Minutes a run, not comparable where other work shared the machine: "
            + ", ".join(
                f"{plain(run.name)} {run.wall_seconds() / 60:.0f}" for run in every
            )
            + "."
        )
    averaged = last_rounds(every)
    code = plain(code_text(every))
    warnings = "".join(f"\n{plain(text)}" for text in cautions(runs))
    return f"""# {plain(title)}

Date: {origin.date}. Command:

    {shown(origin.command)}

Accuracy in percent on {tested_on(every[0])}, mean of
{averaged} (± standard deviation over seeds). Groups by {groups["rule"]}:
many = classes {_listed(groups["many"])}, medium = {_listed(groups["medium"])},
few = {_listed(groups["few"])}.
Differences: to the delivered classifier of {reference}, in balanced and in few-shot
accuracy, seed by seed, with their 95 % confidence intervals (Student's t).
Teacher: {plain(", ".join(teachers(runs))) or "none"}.{warnings}

{main_table(runs, baseline, failures)}

Per class:

{class_table(runs)}

Hardware: {plain(origin.hardware)}.
Versions: {versions}. {code}
{minutes}
"""


def code_text(runs: Sequence[FinishedRun]) -> str:
    """Return the fingerprints of the code that made runs, as a sentence or two."""
    clients = ", ".join(sorted({run.facts["code"] for run in runs}))
    # Runs of early versions name the clients' code only.
    known = sorted({whole for run in runs if (whole := run.facts.get("all_code"))})
    return f"Client code: {clients}." + (
        f" Client and server code: {', '.join(known)}." if known else ""
    )


def cautions(runs: Mapping[str, Sequence[FinishedRun]]) -> list[str]:
    """Return what else may make the variants differ, as sentences for readers."""
    found = []
    lengths = {
        variant: group[0].config["federation.rounds"] for variant, group in runs.items()
    }
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{variant} {n}" for variant, n in lengths.items())
        found.append(f"Variants have different numbers of rounds: {listed}.")
    made: dict[str, list[str]] = {}
    for run in (run for group in runs.values() for run in group):
        made.setdefault(run.all_code, []).append(run.name)
    if len(made) > 1:
        listed = "; ".join(
            f"{code}: {', '.join(names)}" for code, names in made.items()
        )
        found.append(
            "Different code made these runs, so their differences may come from the "
            f"code (client and server code {listed})."
        )
    return found


def drawn_images(run: FinishedRun) -> int | None:
    """Return how many test images rounds before the last use; None if they use all."""
    rounds = (run if run.whole is None else run.whole).evaluated
    first, last = (line.get("test_images") or 0 for line in (rounds[0], rounds[-1]))
    return first if 0 < first < last else None


def tested_on(run: FinishedRun) -> str:
    """Return the number of test images behind the accuracy of a run's rounds.

    Parameters
    ----------
    run : FinishedRun
        A run, on the test images that a page shows.

    Returns
    -------
    str
        For example ``8,000 test images that had no part in choosing settings; balanced
        accuracy on all 10,000 beside them``.
    """
    final, others = run.facts["test_images"], drawn_images(run)
    if run.whole is None:
        if others is not None:
            return f"{others:,} drawn test images ({final:,} after the last round)"
        return f"{final:,} test images"
    every = run.whole.facts["test_images"]
    drawn = ""
    if others is not None:
        drawn = f" (before the last round, those of them among {others:,} drawn images)"
    if run.images is Images.TUNING:
        return f"{final:,} test images on which settings are chosen{drawn}"
    return (
        f"{final:,} test images that had no part in choosing settings{drawn}; balanced "
        f"accuracy on all {every:,} beside them"
    )


def main_table(
    runs: Mapping[str, Sequence[FinishedRun]],
    baseline: str,
    failures: Sequence[Failure] = (),
) -> str:
    """Return the Markdown table of `summarise`, of failed runs and the teachers."""
    titles = ["top-1", *COLUMNS[1:]]
    summary = summarise(runs, baseline)
    beside = ["all images"] if summary[0].all_images else []
    rows = [
        [
            plain(row.variant),
            plain(row.head),
            ", ".join(map(str, row.seeds)),
            *("-" if cell is None else str(cell) for cell in row.columns.values()),
            str(row.last_round),
            *(str(row.all_images) for _ in beside),
            difference_text(row.difference),
            difference_text(row.few_difference),
        ]
        for row in summary
    ]
    unknown = ["-"] * (len(titles) + len(beside) + 3)
    rows += [
        [plain(variant), "-", plain(failed), *unknown]
        for variant, failed in failed_runs(failures).items()
    ]
    known = teachers(runs)
    of_all = teachers({variant: _whole(group) for variant, group in runs.items()})
    for name, accuracy in known.items():
        cells = [_percent(accuracy[column]) for column in COLUMNS]
        label = "teacher" if len(known) == 1 else f"teacher {plain(name)}"
        whole = [_percent(of_all[name]["balanced"]) for _ in beside]
        rows.append([label, "zero-shot", "-", *cells, cells[1], *whole, "-", "-"])
    header = ["variant", "head", "seeds", *titles, "last round", *beside]
    header += ["difference", "few-shot difference"]
    return _markdown_table(header, rows)


def class_table(runs: Mapping[str, Sequence[FinishedRun]]) -> str:
    """Return the Markdown table of per-class accuracy, most frequent class first.

    Few classes are columns, many are rows.
    """
    first = next(iter(runs.values()))[0]
    images = first.train_counts
    order = first.by_frequency
    names = [plain(first.class_names[c]) for c in order]
    lines = []
    if images:
        lines.append(["training images", "", *(str(images[c]) for c in order)])
    for variant, group in runs.items():
        for head in group[0].heads:
            of_class = zip(*(run.per_class(head) for run in group), strict=True)
            means = [None if None in one else statistics.fmean(one) for one in of_class]
            cells = (_percent(means[c]) for c in order)
            lines.append([plain(variant), plain(head), *cells])
    if len(names) <= FEW_CLASSES:
        return _markdown_table(["variant", "head", *names], lines)
    titles = (", ".join(filter(None, line[:2])) for line in lines)
    rows = list(zip(names, *(line[2:] for line in lines), strict=True))
    return _markdown_table(["class", *titles], rows)


def _listed(classes: Sequence[int]) -> str:
    """Return classes as a list; of many the first ones, and how many follow."""
    more = len(classes) - FEW_CLASSES
    if more <= 0:
        return str(classes)
    return f"{classes[:FEW_CLASSES]} and {more} more"


def _whole(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """Return the runs on all test images."""
    return [run.on(Images.ALL) for run in runs]


def _spread(runs: Sequence[FinishedRun], head: str, column: str) -> Spread | None:
    values = [run.last(head, column) for run in runs]
    known = [value for value in values if value is not None]
    return Spread.of(known) if len(known) == len(values) else None


def _by_seed(
    runs: Sequence[FinishedRun], head: str | None, column: str
) -> dict[int, float]:
    """Return a column's values by seed; None stands for the delivered head."""
    return {
        run.seed: value
        for run in runs
        if (value := run.last(head or run.heads[0], column)) is not None
    }


def difference_text(difference: PairedDifference | None) -> str:
    """Return the text of a table's cell; a dash if there is no difference."""
    return "-" if difference is None else str(difference)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def plain(text: str) -> str:
    """Return foreign text as Markdown in which no character acts as markup."""
    return _MARKUP.sub(lambda match: f"\\{match[0]}", shown(text))


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
