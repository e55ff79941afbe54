"""The result of a run or a comparison, in one sentence and three numbers."""

import json
from collections.abc import Mapping, Sequence

from clip2fl_cli.page import Cell, Headline, Number
from clip2fl_cli.runs import FinishedRun
from clip2fl_cli.summary import Failure, Row, teachers
from clip2fl_cli.wording import method_title

MAX_NUMBERS = 3
BALANCED, FEW = "balanced accuracy", "on rare (few-shot) classes"


def run_headline(run: FinishedRun, against: FinishedRun | None = None) -> Headline:
    """Return the headline of a run.

    Parameters
    ----------
    run : FinishedRun
        The run.
    against : FinishedRun or None
        A run of another method, the baseline.

    Returns
    -------
    Headline
        The delivered classifier's accuracy in the last round.
    """
    final = run.final(run.heads[0])
    known = teachers({"": [run]})
    others = {
        f"its teacher {name}, zero-shot": accuracy for name, accuracy in known.items()
    }
    when = "" if run.rounds[-1]["accuracy"] else f" in {run.last_round}"
    sentence = (
        f"{method_title(run.config['method'])} reaches {final['balanced']:.1f} % "
        f"balanced{_on_rare(final)}{when}"
    )
    if known:
        (accuracy, *_) = known.values()
        sentence += f"; its teacher {accuracy['balanced']:.1f} %"
    if against is not None:
        name = method_title(against.config["method"])
        others[f"baseline {name}"] = against.final(against.heads[0])
        balanced = others[f"baseline {name}"]["balanced"]
        sentence += f"; the baseline {name} {balanced:.1f} %"
    numbers = [
        _percent(final["balanced"], BALANCED),
        _percent(final["few"], FEW),
        *(_percent(found["balanced"], name) for name, found in others.items()),
        _percent(final["top1"], "top-1 accuracy"),
        _percent(final["many"], "on frequent (many-shot) classes"),
    ]
    shown = [number for number in numbers if number is not None]
    return Headline(f"{sentence}.", shown[:MAX_NUMBERS])


def comparison_headline(
    ranking: Sequence[Row],
    runs: Mapping[str, Sequence[FinishedRun]],
    baseline: str,
    failures: Sequence[Failure],
) -> Headline:
    """Return the headline of a comparison.

    Parameters
    ----------
    ranking : sequence of Row
        What the variants with the most seeds deliver, the best first.
    runs : mapping of str to sequence of FinishedRun
        Each variant's runs.
    baseline : str
        The variant with which the others are compared.
    failures : sequence of Failure
        Runs that did not complete.

    Returns
    -------
    Headline
        The best variant's accuracy, mean over the last rounds and seeds.
    """
    best, *_ = ranking
    means = {
        name: None if spread is None else spread.mean
        for name, spread in best.columns.items()
    }
    among = ""
    if len(ranking) < len(runs):
        among = f" of the {len(ranking)} variants with {len(best.seeds)} seeds"
    sentence = (
        f"{best.variant} has the highest balanced accuracy{among}: "
        f"{means['balanced']:.1f} %{_on_rare(means)}"
    )
    numbers = [
        Number(
            Cell.number(spread.mean),
            "%" if spread.deviation is None else f"% ± {spread.deviation:.1f}",
            label,
        )
        for column, label in (("balanced", BALANCED), ("few", FEW))
        if (spread := best.columns[column]) is not None
    ]
    if best.difference is not None:
        sentence += f"; {best.difference} points against {baseline}"
        found = best.difference
        numbers.append(
            Number(
                Cell(f"{found.mean:+.1f}", json.dumps(found.mean)),
                "points",
                f"against {baseline}"
                + (
                    f", 95 % interval {found.interval[0]:+.1f} to "
                    f"{found.interval[1]:+.1f}"
                    if found.interval
                    else ""
                ),
            )
        )
        if found.interval and found.interval[0] <= 0 <= found.interval[1]:
            sentence += " (the interval includes 0)"
    numbers += [
        number
        for name, accuracy in teachers(runs).items()
        if (number := _percent(accuracy["balanced"], f"teacher {name}")) is not None
    ]
    failed = "; ".join(f"{f.variant}, seed {f.seed}: {f.reason}" for f in failures)
    count = "1 run" if len(failures) == 1 else f"{len(failures)} runs"
    return Headline(
        f"{sentence}.",
        numbers[:MAX_NUMBERS],
        f"{count} failed: {failed}." if failed else "",
    )


def _on_rare(accuracy: Mapping[str, float | None]) -> str:
    few = accuracy["few"]
    return "" if few is None else f", {few:.1f} % on rare classes"


def _percent(value: float | None, label: str) -> Number | None:
    return None if value is None else Number(Cell.number(value), "%", label)
