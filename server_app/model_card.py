"""The card of a delivered model for the sites: JSON for programs, Markdown for people.

It is made from a run's ``config.json`` and ``metrics.jsonl``, which describe the run
whether it has just ended or ended long ago. Every site gets it. So it names a site,
its number of images and its accuracy only if the site's own policy allows that
(``listed-in-card``), and gives no mean from which an unlisted site's accuracy follows.
"""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict

from clip2fl_common.messages import RECALL_STEP
from clip2fl_common.metrics import listed_groups, recall_report
from clip2fl_common.secure.statements import LEAST_PARTIES
from clip2fl_common.shown import shown
from clip2fl_common.teacher import public_name
from server_app.delivery import ModelCard
from server_app.file_names import CONFIG, METRICS
from server_app.foreign_files import MEGABYTE, parse_json, read_json, read_text
from server_app.onnx_model import preprocessing

FORMAT = 1
_MAX_CONFIG_BYTES = 32 * MEGABYTE
_MAX_METRICS_BYTES = 256 * MEGABYTE
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|&~])")


@dataclass(frozen=True)
class ListedSite:
    """A site that allows the card to name it.

    Attributes
    ----------
    name : str
        Its name.
    images : int or None
        Number of images that it trained on last; None if it has not trained.
    per_class : mapping of int to float
        Its accuracy in percent on its own validation images, with the delivered
        classifier, by class; empty if it has not reported any.
    """

    name: str
    images: int | None
    per_class: Mapping[int, float]


class _Facts(BaseModel):
    """The fields of ``config.json`` that the card needs."""

    model_config = ConfigDict(extra="ignore")

    config: dict[str, bool | int | float | str]
    code: str
    versions: dict[str, str]
    commit: str | None = None
    teacher: dict[str, Any] | None = None


class _Clock(BaseModel):
    """The field ``clock`` of a line, which runs of sites have."""

    model_config = ConfigDict(extra="ignore")

    ended: AwareDatetime


class _Report(BaseModel):
    """The accuracy of a head at a site."""

    model_config = ConfigDict(extra="ignore")

    per_class: list[float | None]


class _Evaluation(BaseModel):
    """What a site has reported."""

    model_config = ConfigDict(extra="ignore")

    accuracy: dict[str, _Report]


class _Site(BaseModel):
    """The fields of a site in a line."""

    model_config = ConfigDict(extra="ignore")

    evaluation: _Evaluation | None = None


class _Summed(BaseModel):
    """What a secure sum tells of its sites."""

    model_config = ConfigDict(extra="ignore")

    sites_by_class: list[int] = []


class _Line(BaseModel):
    """The fields of a line of ``metrics.jsonl`` that the card needs."""

    model_config = ConfigDict(extra="ignore")

    round: int
    clients: list[int | str]
    accuracy: dict[str, dict[str, Any]]
    accuracy_median_site: dict[str, dict[str, Any]] = {}
    privacy: dict[str, dict[str, float]] = {}
    clock: _Clock | None = None
    sites: dict[str, _Site] = {}
    summed_evaluation: _Summed | None = None


def run_ended(run: Path) -> datetime | None:
    """Return when a run's last round ended, by the server's clock, or None.

    Parameters
    ----------
    run : Path
        Folder of the complete run.

    Raises
    ------
    ForeignFileError
        If a file of the run's folder is damaged.
    """
    clock = _lines(run)[-1].clock
    return None if clock is None else clock.ended.astimezone(UTC)


def model_card(
    run: Path,
    name: str,
    card: ModelCard,
    made: datetime,
    sites: Sequence[ListedSite] | None,
) -> dict[str, Any]:
    """Return the content of ``card.json``.

    Parameters
    ----------
    run : Path
        Folder of the complete run.
    name : str
        The run's name in the manifest.
    card : ModelCard
        The delivered model's own description.
    made : datetime
        When the run ended.
    sites : sequence of ListedSite or None
        The sites that allow their names and figures; None: they are not known.

    Returns
    -------
    dict
        Fields for JSON; accuracies are in percent.

    Raises
    ------
    ForeignFileError
        If a file of the run's folder is damaged.
    """
    facts = _Facts(**read_json(run / CONFIG, _Facts, _MAX_CONFIG_BYTES))
    lines = _lines(run)
    last = lines[-1]
    # The delivered classifier comes first; without a report there is none.
    head = next(iter(last.accuracy), "")
    accuracy, median = last.accuracy.get(head), last.accuracy_median_site.get(head)
    reporting = _Reporting(last, head, {site.name for site in sites or ()})
    given = None if accuracy is None else reporting.given(accuracy["per_class"])
    part = {client for line in lines for client in line.clients}
    names = card.class_names
    teacher = facts.teacher
    return {
        "format": FORMAT,
        "run": name,
        "made": made.isoformat(),
        "model": {
            "architecture": card.architecture,
            "feature_dim": card.feature_dim,
            "class_names": list(names),
            "normalization": asdict(card.normalization),
            "preprocessing": preprocessing(card),
        },
        "training": {
            "method": facts.config["method"],
            "rounds": last.round,
            "clients_per_round": facts.config["federation.clients-per-round"],
            "seed": facts.config["seed"],
        },
        "teacher": teacher
        and {
            "name": public_name(teacher["name"]),
            "fingerprint": teacher["fingerprint"],
        },
        "code": {"commit": facts.commit, "fingerprint": facts.code},
        "versions": facts.versions,
        "sites": {
            "trained": len(part),
            "listed": (
                None if sites is None else [_site_fields(site, names) for site in sites]
            ),
        },
        "accuracy": None if given is None else _accuracy_fields(given, names),
        "accuracy_median_site": (
            median["balanced"] if median and reporting.tells_no_site() else None
        ),
        "privacy": {
            mechanism: {"epsilon": spent["epsilon_total"], "delta": spent["delta"]}
            for mechanism, spent in last.privacy.items()
        },
        "limits": list(_limits(accuracy, given, names)),
    }


def _lines(run: Path) -> list[_Line]:
    return [
        _Line(**parse_json(line, _Line, shown(run / METRICS)))
        for line in read_text(run / METRICS, _MAX_METRICS_BYTES).splitlines()
    ]


def _site_fields(site: ListedSite, names: Sequence[str]) -> dict[str, Any]:
    values = list(site.per_class.values())
    return {
        "name": site.name,
        "images": site.images,
        "balanced": sum(values) / len(values) if values else None,
        "per_class": {names[c]: value for c, value in sorted(site.per_class.items())},
    }


class _Reporting:
    """Which sites have reported an accuracy, and which means tell no single site's.

    A mean is given if the card lists all its sites, or if at least `LEAST_PARTIES` of
    them are not listed: subtracting the listed sites' accuracies, and even an unlisted
    site's own, then leaves a sum over several sites.
    """

    def __init__(self, line: _Line, head: str, listed: Set[str]) -> None:
        self._listed = listed
        self._reports = {
            name: site.evaluation.accuracy[head].per_class
            for name, site in line.sites.items()
            if site.evaluation is not None and head in site.evaluation.accuracy
        }
        summed = line.summed_evaluation
        # The card lists no accuracy of a site in a secure sum.
        self._summed = None if summed is None else summed.sites_by_class

    def given(self, means: Sequence[float | None]) -> list[float | None]:
        """Return the mean of each class; None for one that is not given."""
        return [
            value if value is not None and self._tells_no_site(c) else None
            for c, value in enumerate(means)
        ]

    def tells_no_site(self) -> bool:
        """Return whether a figure over all classes may be given."""
        return self._hides(self._reporting(slice(None)))

    def _tells_no_site(self, c: int) -> bool:
        if self._summed is not None:
            return sum(self._summed[c : c + 1]) >= LEAST_PARTIES
        return self._hides(self._reporting(slice(c, c + 1)))

    def _reporting(self, classes: slice) -> set[str]:
        return {
            name
            for name, own in self._reports.items()
            if any(value is not None for value in own[classes])
        }

    def _hides(self, sites: Set[str]) -> bool:
        others = len(sites - self._listed)
        return others >= LEAST_PARTIES or (others == 0 and len(sites) > 0)


def _accuracy_fields(
    given: Sequence[float | None], names: Sequence[str]
) -> dict[str, Any]:
    """Return the means over sites; class names may repeat, so classes are a list."""
    known = any(value is not None for value in given)
    # Runs of sites group the classes as they are listed.
    report = recall_report(given, listed_groups(len(given))) if known else None
    return {
        **{
            part: getattr(report, part, None)
            for part in ("balanced", "many", "medium", "few")
        },
        "per_class": [
            {"class": name, "accuracy": value}
            for name, value in zip(names, given, strict=True)
        ],
    }


def _limits(
    accuracy: Mapping[str, Any] | None,
    given: Sequence[float | None] | None,
    names: Sequence[str],
) -> Iterator[str]:
    yield (
        "The model knows only the classes above, and gives one of them for any image. "
        "Images of other kinds, cameras or places than the sites' may give wrong "
        "results without a warning."
    )
    yield (
        "The sites measured the accuracy on their own validation images. The server "
        "cannot check what a site reports."
    )
    yield (
        f"Sites round the accuracy on a class to steps of {RECALL_STEP} %. With few "
        "validation images of a class, its accuracy is uncertain."
    )
    yield "The probabilities are not calibrated."
    if accuracy is None or given is None:
        yield "No site has reported an accuracy."
        return
    unknown, hidden = [], []
    for name, reported, mean in zip(names, accuracy["per_class"], given, strict=True):
        if reported is None:
            unknown.append(name)
        elif mean is None:
            hidden.append(name)
    if unknown:
        yield f"No site has reported an accuracy for: {', '.join(unknown)}."
    if hidden:
        yield (
            "The mean is not given, as it would tell the accuracy of a site that this "
            f"card does not list, for: {', '.join(hidden)}."
        )


def card_text(card: Mapping[str, Any]) -> str:
    """Return ``MODEL_CARD.md``.

    Parameters
    ----------
    card : mapping
        What `model_card` returned. Its names come from sites and configurations and
        are escaped, so that they cannot act as markup.
    """
    return "\n".join(_card_lines(card)) + "\n"


def _card_lines(card: Mapping[str, Any]) -> Iterator[str]:
    model, training, sites = card["model"], card["training"], card["sites"]
    teacher, code = card["teacher"], card["code"]
    steps = model["preprocessing"]
    yield f"# {_text(card['run'])}"
    yield ""
    yield (
        f"A {_text(model['architecture'])} for {len(model['class_names'])} classes, "
        f"trained with {_text(training['method'])} in {training['rounds']} rounds by "
        f"{sites['trained']} sites, of which {training['clients_per_round']} were "
        f"asked in each round. The run ended on {_text(card['made'])}."
    )
    yield ""
    yield (
        f"**Input.** An {steps['colour']} image, {steps['orientation']}: its "
        f"{steps['crop']}, scaled to "
        f"{steps['size']} pixels ({steps['interpolation']}). `model.onnx` takes "
        "`pixels` of uint8 [N, 3, height, width] and gives `logits` [N, classes]. "
        "`clip2fl predict --model FOLDER IMAGE` does it all."
    )
    yield ""
    if teacher:
        yield (
            f"**Teacher.** {_text(teacher['name'])}, fingerprint "
            f"`{_text(teacher['fingerprint'])}`."
        )
    else:
        yield "**Teacher.** None."
    yield ""
    yield (
        f"**Code.** Commit {_text(code['commit'] or 'unknown')}, fingerprint "
        f"`{_text(code['fingerprint'])}`; "
        + ", ".join(f"{_text(k)} {_text(v)}" for k, v in card["versions"].items())
        + "."
    )
    yield ""
    yield "## Accuracy"
    yield ""
    if card["accuracy"]:
        yield from _accuracy_lines(card)
    else:
        yield "No site has reported an accuracy."
    yield ""
    yield "## Sites"
    yield ""
    yield from _site_lines(sites)
    yield ""
    yield "## Privacy"
    yield ""
    for mechanism, spent in card["privacy"].items():
        yield (
            f"- {_text(mechanism.replace('_', ' '))}: epsilon {spent['epsilon']:.3g} "
            f"at delta {spent['delta']:g}, over all rounds"
        )
    if not card["privacy"]:
        yield "The run added no noise: no differential privacy is claimed."
    yield ""
    yield "## Limits"
    yield ""
    for limit in card["limits"]:
        yield f"- {_text(limit)}"


def _accuracy_lines(card: Mapping[str, Any]) -> Iterator[str]:
    found = card["accuracy"]
    yield (
        "In percent: for each class the mean over the sites that have validation "
        "images of it, each site with the same weight. A mean from which the accuracy "
        "of an unlisted site would follow is not given. *Balanced* is the mean over "
        "classes; *many*, *medium* and *few* are the means over frequent, medium and "
        "rare classes."
    )
    yield ""
    yield "| class | accuracy |"
    yield "|---|---:|"
    for part in ("balanced", "many", "medium", "few"):
        yield f"| *{part}* | {_percent(found[part])} |"
    if (median := card["accuracy_median_site"]) is not None:
        yield f"| *balanced, at the median site* | {_percent(median)} |"
    for entry in found["per_class"]:
        yield f"| {_text(entry['class'])} | {_percent(entry['accuracy'])} |"


def _site_lines(sites: Mapping[str, Any]) -> Iterator[str]:
    listed, trained = (
        sites["listed"],
        f"{sites['trained']} sites have trained the model.",
    )
    if listed is None:
        yield f"{trained} Which of them allow this card to list them is not known."
        return
    yield (
        f"{trained} {len(listed)} allow this card to list them"
        + (":" if listed else " (`listed-in-card` in their policies).")
    )
    if not listed:
        return
    yield ""
    yield "| site | images | balanced accuracy |"
    yield "|---|---:|---:|"
    for site in listed:
        images = "-" if site["images"] is None else f"{site['images']:,}"
        yield f"| {_text(site['name'])} | {images} | {_percent(site['balanced'])} |"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _text(value: object) -> str:
    """Return a name as Markdown that shows exactly this name, on one line."""
    return _MARKUP.sub(r"\\\1", shown(value))
