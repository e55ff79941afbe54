"""Schemas of the files of a run and of a comparison, for reading them.

Only fields that are used are checked: runs of another version may have other fields.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from clip2fl_common.limits import MAX_CLASSES, MAX_NAME_LENGTH
from clip2fl_common.shown import shown
from server_app.foreign_files import MEGABYTE

# Bounds far above real values, so that sums stay finite and numbers stay readable.
MAX_COUNT = 2**48
MAX_SECONDS = 1e12
MAX_LOSS = 1e100
MAX_ROUNDS = 100_000
MAX_VARIANTS = 256
MAX_RUNS = 10_000
# A run of 1,000 classes, 1,000 clients and 200 rounds has 0.1 and 10 megabytes.
MAX_FACTS_BYTES = 32 * MEGABYTE
MAX_METRICS_BYTES = 256 * MEGABYTE
# Most file systems allow no longer names.
MAX_COMPONENT_BYTES = 220

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH)]
Text = Annotated[str, Field(max_length=100_000)]
Value = bool | int | float | Text
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Percent = Annotated[float, Field(ge=0, le=100)]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
Loss = Annotated[float, Field(ge=-MAX_LOSS, le=MAX_LOSS)]
ClassIndex = Annotated[int, Field(ge=0, lt=MAX_CLASSES)]
PerClass = Annotated[list[Percent | None], Field(max_length=MAX_CLASSES)]

_strict = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Images(StrEnum):
    """The test images on which accuracies are shown."""

    ALL = "all"
    HELD_OUT = "held-out"
    TUNING = "tuning"

    @property
    def part(self) -> str:
        """The name of this part of the test images in the files of a run."""
        return self.value.replace("-", "_")


def component_problem(name: str) -> str | None:
    """Return why a name cannot be a file's or folder's name; None if it can."""
    if not name or name in (".", ".."):
        return "is no name of a folder"
    if "/" in name or "\\" in name:
        return "has a separator of folders in it"
    if name != shown(name):
        return "has characters in it that cannot be seen"
    if name[0] in ".-" or name != name.strip():
        return "begins with a dot or a dash, or has blanks around it"
    if len(name.encode("utf-8")) > MAX_COMPONENT_BYTES:
        return f"is longer than {MAX_COMPONENT_BYTES} bytes"
    return None


class Config(BaseModel):
    """The keys of a run's configuration that are used; others are only listed."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, Value] = Field(init=False)

    method: Name
    seed: Seed
    dataset_name: Annotated[Name, Field(alias="dataset.name")]
    rounds: Annotated[int, Field(alias="federation.rounds", ge=1, le=MAX_ROUNDS)]
    tested: Annotated[Count, Field(alias="evaluation.max-images")]
    # Optional, since runs of early versions did not divide the test images.
    share: Annotated[float, Field(alias="evaluation.tuning-share", ge=0, lt=1)] = 0.0
    teacher_model: Annotated[Text, Field(alias="teacher.model")]
    teacher_pretrained: Annotated[Text, Field(alias="teacher.pretrained")]
    teacher_prompt: Annotated[Text, Field(alias="teacher.prompt")]


class Accuracy(BaseModel):
    """Accuracy of one classifier, in percent."""

    model_config = _strict

    top1: Percent | None
    balanced: Percent
    many: Percent | None
    medium: Percent | None
    few: Percent | None
    per_class: PerClass


class Teacher(BaseModel):
    """The teacher of a run; without test images it has no accuracy."""

    model_config = _strict

    name: Annotated[Text, Field(min_length=1)]
    zero_shot: Accuracy | None = None
    zero_shot_tuning: Accuracy | None = None
    zero_shot_held_out: Accuracy | None = None


class Groups(BaseModel):
    """The many-, medium- and few-shot classes."""

    model_config = _strict

    rule: Literal["count", "rank", "listed"]
    many: Annotated[list[ClassIndex], Field(max_length=MAX_CLASSES)]
    medium: Annotated[list[ClassIndex], Field(max_length=MAX_CLASSES)]
    few: Annotated[list[ClassIndex], Field(max_length=MAX_CLASSES)]


class Facts(BaseModel):
    """``config.json``: the configuration of a run and the facts that it found."""

    model_config = _strict

    config: Config
    class_names: Annotated[list[Name], Field(min_length=1, max_length=MAX_CLASSES)]
    train_images_per_class: (
        Annotated[list[Count], Field(max_length=MAX_CLASSES)] | None
    ) = None
    test_images: Count
    test_images_tuning: Count | None = None
    test_images_held_out: Count | None = None
    shot_groups: Groups
    versions: Annotated[dict[Name, Name], Field(max_length=100)]
    code: Name
    # Optional, since runs of early versions did not name the server's code.
    all_code: Name | None = None
    shared_training: bool = False
    teacher: Teacher | None = None

    @model_validator(mode="after")
    def _lengths_agree(self) -> "Facts":
        classes = len(self.class_names)
        counts = self.train_images_per_class
        if counts is not None:
            _same_length("train_images_per_class", counts, classes)
        for field in ("zero_shot", "zero_shot_tuning", "zero_shot_held_out"):
            if accuracy := getattr(self.teacher, field, None):
                _same_length(f"teacher.{field}.per_class", accuracy.per_class, classes)
        groups = self.shot_groups
        listed = [*groups.many, *groups.medium, *groups.few]
        if sorted(listed) != list(range(classes)):
            raise ValueError(
                f"shot_groups must name each of the {classes} class_names exactly once"
            )
        return self


class Bytes(BaseModel):
    """Bytes of a round's messages."""

    model_config = _strict

    down: Count
    up: Count
    # Optional, since runs of early versions did not count them.
    class_gradients: list[Count] = []


class Spent(BaseModel):
    """The differential privacy budget that a mechanism has spent."""

    model_config = _strict

    epsilon_round: Annotated[float, Field(ge=0, le=MAX_LOSS)]
    epsilon_total: Annotated[float, Field(ge=0, le=MAX_LOSS)]
    delta: Annotated[float, Field(ge=0, le=1)]


class SiteTraining(BaseModel):
    """A site's training in a round."""

    model_config = _strict

    images: Count
    unreadable: Count
    seconds: Seconds
    bytes: Count


class SiteEvaluation(BaseModel):
    """A site's evaluation of a round's model; empty accuracy without images for it."""

    model_config = _strict

    images: Count
    unreadable: Count
    seconds: Seconds
    confusion_matrix: bool
    accuracy: Annotated[dict[Name, Accuracy], Field(max_length=20)]


class SiteOfRound(BaseModel):
    """What a site did in a round; a part that it did not do is missing."""

    model_config = _strict

    training: SiteTraining | None = None
    evaluation: SiteEvaluation | None = None


class UnusedReply(BaseModel):
    """A reply that is missing or was not used."""

    model_config = _strict

    site: Name | Count
    request: Name
    reason: Text


class SummedEvaluation(BaseModel):
    """What a secure sum of evaluations tells of its sites."""

    model_config = _strict

    sites: Count
    images: Count


class Clock(BaseModel):
    """A round by the clock, waiting for sites included."""

    model_config = _strict

    seconds: Seconds


class Unreadable(BaseModel):
    """Images that were left out as unreadable."""

    model_config = _strict

    train: Count
    test: Count


class Round(BaseModel):
    """A line of ``metrics.jsonl``."""

    model_config = _strict

    round: Annotated[int, Field(ge=1, le=MAX_ROUNDS)]
    # Optional, since runs of early versions did not write it.
    test_images: Count | None = None
    # Empty if no site has evaluated the model.
    accuracy: Annotated[dict[Name, Accuracy], Field(max_length=20)]
    # On parts of the test images; empty without evaluation.tuning-share.
    accuracy_tuning: Annotated[dict[Name, Accuracy], Field(max_length=20)] = {}
    accuracy_held_out: Annotated[dict[Name, Accuracy], Field(max_length=20)] = {}
    losses: Annotated[dict[Name, Loss], Field(max_length=100)]
    seconds: Annotated[dict[Name, Seconds], Field(max_length=100)]
    bytes: Bytes
    privacy: Annotated[dict[Name, Spent], Field(max_length=100)] = {}
    unreadable_images: Unreadable | None = None
    # Only runs of sites have names of clients, and the fields after them.
    clients: Annotated[list[Name | Count], Field(max_length=MAX_RUNS)] = []
    sites: Annotated[dict[Name, SiteOfRound], Field(max_length=MAX_RUNS)] = {}
    unused_replies: Annotated[list[UnusedReply], Field(max_length=MAX_RUNS)] = []
    summed_evaluation: SummedEvaluation | None = None
    clock: Clock | None = None


class FailedRun(BaseModel):
    """A run of a comparison that did not complete."""

    model_config = _strict

    variant: Name
    seed: Seed
    reason: Text


class Summary(BaseModel):
    """The fields of ``comparison.json`` from which a report is made."""

    model_config = _strict

    name: Name
    baseline: Name
    runs: Annotated[
        dict[Name, Annotated[list[Name], Field(min_length=1, max_length=MAX_RUNS)]],
        Field(min_length=1, max_length=MAX_VARIANTS),
    ]
    # Optional, since comparisons of early versions did not list them.
    failed: Annotated[list[FailedRun], Field(max_length=MAX_RUNS)] = []
    # Absent if the runs do not divide the test images.
    images: Literal["all", "held-out", "tuning"] | None = None

    @model_validator(mode="after")
    def _names_stay_inside(self) -> "Summary":
        for variant, names in self.runs.items():
            for name in names:
                if problem := component_problem(name):
                    raise ValueError(f"runs.{variant}: {name!r:.60} {problem}")
        return self


class SomeFacts(BaseModel):
    """Some fields of ``config.json``, which are checked after merging with the rest."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    config: dict[Name, Value] = {}


class Recorded(Summary):
    """The fields of ``comparison.json`` that a page needs besides the table."""

    command: Text
    date: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")]
    hardware: Name
    heads: dict[Name, Annotated[list[Name], Field(min_length=1, max_length=20)]]
    shared_facts: SomeFacts
    facts: dict[Name, SomeFacts]

    @model_validator(mode="after")
    def _nothing_is_missing(self) -> "Recorded":
        for variant, names in self.runs.items():
            if variant not in self.heads:
                raise ValueError(f"heads has no entry for {variant!r:.60}")
            for name in names:
                if name not in self.facts:
                    raise ValueError(f"facts has no entry for {name!r:.60}")
        return self


def _same_length(field: str, values: Sequence[object], classes: int) -> None:
    if len(values) != classes:
        raise ValueError(
            f"{field} has {len(values)} entries, but class_names has {classes}"
        )
