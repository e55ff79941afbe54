"""Types of the run configuration's values, with the allowed range of each.

Every number has an upper bound and every positive float a lower one. The bounds are far
from realistic values: a value beyond them is a typing error or an attack. It would
otherwise fail late, for lack of memory or with numbers that are not finite:

- integers fit int64 (Flower's messages, JSON, tensors), and so do their products;
- floats and the products of a few of them stay normal numbers in float32, whose range
  is 1e-38 to 3e38;
- strings are one line, so that each log line and error message stays one line, and
  are short enough for the file system.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from clip2fl_common.data.image_files import class_name

Scalar = bool | int | float | str

PATH_BYTES = 3_000
"""The limit of Linux is 4,096; a run adds names of its own below a folder."""
PATH_PART_BYTES = 255
TEXT_CHARACTERS = 1_000
NAMES_CHARACTERS = 500_000
"""A list of 10,000 class names (iNaturalist's) has about 200,000."""
TRACKERS = ("tensorboard", "mlflow", "wandb")
"""Names of the trackers that server_app/tracking.py implements."""
ONE_LINE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"
"""The part of `one_line` that JSON Schema can express."""

PLUS = "clip2fl-plus"
"""CLIP2FL with four of this project's extensions, and with defaults of its own."""


@dataclass(frozen=True)
class Traits:
    """What nodes and the checks of a configuration must know of a method.

    They do not import strategies, which takes seconds.

    Attributes
    ----------
    teacher : bool
        Whether clients need the teacher.
    gradients : bool
        Whether clients send class gradients, to which the server fits features.
    statistics : bool
        Whether clients send each class's count, mean and covariance.
    momentum : bool
        Whether the server steps with momentum from the clients' mean.
    sums : bool
        Whether the server needs only sums over clients, and no client's own values, so
        that secure aggregation changes nothing.
    """

    teacher: bool = False
    gradients: bool = False
    statistics: bool = False
    momentum: bool = False
    sums: bool = False


TRAITS = {
    "clip2fl": Traits(teacher=True, gradients=True, sums=True),
    "clip2flm": Traits(teacher=True, gradients=True, momentum=True, sums=True),
    PLUS: Traits(teacher=True, gradients=True, momentum=True, sums=True),
    "creff": Traits(gradients=True, sums=True),
    "ccvr": Traits(statistics=True),
    "fedavg": Traits(sums=True),
    "fedavgm": Traits(momentum=True, sums=True),
    "fedlda": Traits(sums=True),
    "fedprox": Traits(sums=True),
}
"""Methods that the schema knows; strategy/registry.py may contain others."""
METHODS = tuple(TRAITS)
TEACHER_METHODS = tuple(name for name, own in TRAITS.items() if own.teacher)
GRADIENT_METHODS = tuple(name for name, own in TRAITS.items() if own.gradients)
STATISTICS_METHODS = tuple(name for name, own in TRAITS.items() if own.statistics)
MOMENTUM_METHODS = tuple(name for name, own in TRAITS.items() if own.momentum)
SUMMED_METHODS = tuple(name for name, own in TRAITS.items() if own.sums)
RETRAINING_METHODS = (*GRADIENT_METHODS, *STATISTICS_METHODS)
"""Methods whose clients send something for each class they hold, from which the server
re-trains a classifier."""


class ConfigError(ValueError):
    """A key of the run configuration is unknown, missing or out of range."""


@dataclass(frozen=True)
class Rule:
    """A condition on a value, with words for error messages and the reference page.

    Attributes
    ----------
    words : str
        What the value must be, in words.
    holds : callable
        Returns whether a value meets the condition.
    json : mapping
        The part of the condition that JSON Schema can express, for editors.
    """

    words: str
    holds: Callable[[Any], bool]
    json: Mapping[str, Any] = field(compare=False)

    def __get_pydantic_core_schema__(
        self, source: type, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Check the condition after pydantic has checked the type."""
        return core_schema.no_info_after_validator_function(
            self._checked, handler(source)
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Add the condition to the JSON schema of the type."""
        return {**handler(schema), **self.json}

    def _checked(self, value: Any) -> Any:
        if not self.holds(value):
            raise PydanticCustomError("rule", "{words}", {"words": self.words})
        return value


def one_line(text: str) -> bool:
    """Return whether a text has no control character, line break or half character."""
    kinds = {unicodedata.category(character) for character in set(text)}
    return not kinds & {"Cc", "Cs", "Zl", "Zp"}


def path_fits(text: str) -> bool:
    """Return whether a path is one line and within the limits of file systems."""
    encoded = text.encode("utf-8", "surrogatepass")
    return (
        one_line(text)
        and len(encoded) <= PATH_BYTES
        and all(len(part) <= PATH_PART_BYTES for part in encoded.split(b"/"))
    )


def listed_names(text: str) -> tuple[str, ...]:
    """Return the class names in a comma-separated list, as prompts contain them."""
    return tuple(class_name(part) for part in text.split(","))


def zero_or_at_least(least: str) -> Rule:
    """Return the rule for a number that is 0 (switched off) or at least ``least``."""
    number = float(least)
    return Rule(
        f"0 or ≥ {least}",
        lambda value: value == 0 or value >= number,
        {"anyOf": [{"const": 0}, {"minimum": number}]},
    )


def _one_line_of(characters: int) -> Rule:
    return Rule(
        f"one line of at most {characters:,} characters, none a control character",
        lambda text: len(text) <= characters and one_line(text),
        {"maxLength": characters, "pattern": ONE_LINE},
    )


def _matching(words: str, pattern: str, /, **json: Any) -> Rule:
    compiled = re.compile(pattern)
    return Rule(
        words,
        lambda text: compiled.fullmatch(text) is not None,
        json or {"pattern": f"^(?:{pattern})$"},
    )


def _known_trackers(text: str) -> bool:
    names = text.split()
    return set(names) <= set(TRACKERS) and len(set(names)) == len(names)


TINY = 1e-9
# A million rounds of one second each take twelve days.
Positive = Annotated[int, Field(ge=1, le=1_000_000)]
Replies = Annotated[int, Field(ge=0, le=1_000_000)]
# Largest number of images, at one site or in one data set, that can be counted.
Images = Annotated[int, Field(ge=1, le=1_000_000_000)]
ImageLimit = Annotated[int, Field(ge=0, le=1_000_000_000)]
# Ten classes with this many 32-pixel images take 3 GB.
DrawnImages = Annotated[int, Field(ge=1, le=100_000)]
ImageSize = Annotated[int, Field(ge=8, le=1024)]
Padding = Annotated[int, Field(ge=0, le=1024)]
# The widest CLIP models have 1,280, ResNet-50 has 2,048.
FeatureDim = Annotated[int, Field(ge=1, le=16_384)]
FeaturesPerClass = Annotated[int, Field(ge=1, le=100_000)]
Draws = Annotated[int, Field(ge=1, le=10_000)]
# The teacher looks once at each view of each image.
Views = Annotated[int, Field(ge=0, le=100)]
ViewKind = Literal["crop-flip", "resized-crop"]
ViewMix = Literal["none", "mixup", "cutmix"]

StepSize = Annotated[float, Field(ge=TINY, le=1e4)]
# A temperature divides logits, and its square multiplies the distillation loss.
Temperature = Annotated[float, Field(ge=1e-3, le=1e4)]
# Gamma variates of a smaller alpha are zero in float64, of a greater one all equal.
Concentration = Annotated[float, Field(ge=1e-3, le=1e6)]
# The upper bound is four months. Threads and locks accept at most 9e9 seconds.
Seconds = Annotated[float, Field(ge=1e-3, le=1e7)]
Ratio = Annotated[float, Field(ge=1, le=1e6)]
# A smaller delta is no bound that an accountant can compute with.
Delta = Annotated[float, Field(ge=1e-15, lt=1)]
Cosine = Annotated[float, Field(ge=0.01, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(lt=1), zero_or_at_least("0.001")]
Weight = Annotated[float, Field(le=1e6), zero_or_at_least("1e-9")]
# A smaller ratio would drop the median update itself, or about half of the others.
LengthRatio = Annotated[float, Field(le=1e6), zero_or_at_least("2")]
FinalStepSize = Annotated[float, Field(le=1e4), zero_or_at_least("1e-9")]

Text = Annotated[str, _one_line_of(TEXT_CHARACTERS)]
NameList = Annotated[str, _one_line_of(NAMES_CHARACTERS)]
PathText = Annotated[
    str,
    Rule(
        f"a path of at most {PATH_BYTES:,} bytes, each part at most {PATH_PART_BYTES}, "
        "without control characters",
        path_fits,
        {"maxLength": PATH_BYTES, "pattern": ONE_LINE},
    ),
]
# A split is a folder in a saved data set, and a name without a slash on the hub.
SplitName = Annotated[
    str,
    _matching(
        "1 to 64 of the characters A-Z a-z 0-9 _ -, the first a letter",
        r"[A-Za-z][A-Za-z0-9_-]{0,63}",
    ),
]
# A path component that is valid on every system and that no shell takes for an option.
FolderName = Annotated[
    str,
    _matching(
        "empty, or 1 to 128 of the characters A-Z a-z 0-9 . _ -, the first no dot or "
        "hyphen, the last no dot, and no device of Windows (CON, NUL, COM1 and so on)",
        r"(?!(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|$))"
        r"(?:[A-Za-z0-9_][A-Za-z0-9._-]{0,127}(?<!\.))?",
        # Regular expressions of JSON Schema have no flag for a part.
        pattern=r"^(?:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?$",
    ),
]
METHOD_NAME = r"[A-Za-z][A-Za-z0-9_-]{0,63}"
MethodName = Annotated[
    str,
    _matching(
        "a name of 1 to 64 of the characters A-Z a-z 0-9 _ -, the first a letter",
        METHOD_NAME,
        # Editors suggest the existing methods and accept others, which may be added.
        anyOf=[{"enum": sorted(METHODS)}, {"pattern": f"^{METHOD_NAME}$"}],
    ),
]
# Torch keeps a device's number in 8 bits: it reads cuda:256 as cuda:0.
Device = Annotated[
    str,
    _matching(
        "auto, cpu, cuda, or cuda:N with N from 0 to 127",
        r"auto|cpu|cuda(?::(?:[0-9]|[1-9][0-9]|1[01][0-9]|12[0-7]))?",
    ),
]
TrackerNames = Annotated[
    str,
    Rule(
        f"some of {', '.join(TRACKERS)}, each once, separated by spaces",
        _known_trackers,
        {"pattern": rf"^(?:\s*\b(?:{'|'.join(TRACKERS)})\b)*\s*$"},
    ),
]
