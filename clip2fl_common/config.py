"""The run configuration: parsed and checked once, typed everywhere after that.

Every key of ``[tool.flwr.app.config]`` in pyproject.toml is one field here: the
dotted key ``synthesis.learning-rate`` is ``config.synthesis.learning_rate``. Defaults
live in pyproject.toml only, so that there is one place to look.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from clip2fl_common.gradient_coding import Precision
from clip2fl_common.image_files import class_name

Scalar = bool | int | float | str

# dataset.name of a federation whose nodes have images of their own.
SITES = "sites"
# Methods whose clients need the teacher; nodes do not know the strategies themselves.
TEACHER_METHODS = ("clip2fl", "clip2flm")

_strict = ConfigDict(
    extra="forbid",
    strict=True,
    allow_inf_nan=False,
    alias_generator=lambda name: name.replace("_", "-"),
)

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


class ConfigError(ValueError):
    """A key of the run configuration is unknown, missing or out of range."""


@dataclass(frozen=True, config=_strict)
class Run:
    """Where a run leaves its results."""

    dir: str
    """Folder that receives one sub-folder a run; empty: the user's data folder."""
    name: str
    """Name of the run's folder; empty: method, data set, seed and Flower's run id."""
    resume: str
    """Folder of an interrupted run that goes on there; empty: a new run."""
    trackers: str
    """``tensorboard``, ``mlflow``, ``wandb``, separated by spaces; empty: none."""


@dataclass(frozen=True, config=_strict)
class CheckpointConfig:
    """What of a run is kept, to go on from and to deliver."""

    every: Positive
    """Rounds from one checkpoint to the next; the last round has one anyway."""
    keep: Positive
    """Last checkpoints that stay, besides the best one."""
    best_metric: Literal["top1", "balanced", "many", "medium", "few"]
    """Accuracy of the delivered classifier that decides which round is best."""


@dataclass(frozen=True, config=_strict)
class Dataset:
    """Which images, and how long their tail is."""

    name: Literal["demo", "cifar10", "cifar100", "imagenet-lt", "image-folder", "sites"]
    """Data set; ``sites``: the images that each node has of its own."""
    root: str
    """Absolute folder of the images; cifar10 and cifar100 are downloaded there."""
    train_list: str
    """imagenet-lt: file with one ``path label`` a line (or a JSON list of them)."""
    test_list: str
    """imagenet-lt: the same for the test images."""
    class_names: str
    """sites: the classes, separated by commas, from frequent to rare."""
    validation_share: Annotated[float, Field(ge=0, lt=1)]
    """sites: share of each site's images that evaluate instead of training."""
    image_size: Annotated[int, Field(ge=8)]
    """Side in pixels to which images are brought."""
    imbalance_factor: Annotated[float, Field(ge=1)]
    """Most frequent over least frequent class; 1 keeps every sample."""
    demo_train_per_class: Positive
    """demo: drawn images of the most frequent class."""
    demo_test_per_class: Positive
    """demo: drawn test images of each class."""
    skip_unreadable: bool
    """Leave out unreadable images (and count them) instead of stopping."""


@dataclass(frozen=True, config=_strict)
class Partition:
    """How the training images are divided among clients."""

    clients: Positive
    """Number of clients, whatever the number of nodes that simulate them."""
    alpha: PositiveFloat
    """Concentration of the Dirichlet distribution; smaller is more uneven."""


@dataclass(frozen=True, config=_strict)
class Federation:
    """How the rounds go."""

    rounds: Positive
    """Number of rounds."""
    clients_per_round: Positive
    """Clients drawn without replacement each round; sites: waited for at the start."""
    round_timeout: PositiveFloat
    """Seconds to wait for a round's replies."""
    min_replies: Positive
    """Good replies that a round needs; with fewer, the model stays as it is."""
    site_registry: str
    """Absolute path of the file that binds sites' names to keys; empty: free names."""


@dataclass(frozen=True, config=_strict)
class Aggregation:
    """How what clients send becomes one model, and how much one of them can move it."""

    rule: Literal["mean", "median", "trimmed-mean"]
    """Mean, or coordinate-wise median or trimmed mean, of models and gradients."""
    trim: Annotated[float, Field(ge=0, lt=0.5)]
    """trimmed-mean: share of the values cut off at each end."""
    max_update_norm: Weight
    """Norm to which a client's update is shortened; 0: no bound."""
    max_gradient_norm: Weight
    """The same for each of its class gradients; 0: no bound."""
    max_site_images: Positive
    """sites: the most training images, its weight in the mean, that one may claim."""


@dataclass(frozen=True, config=_strict)
class Model:
    """The student."""

    name: Literal["resnet8", "resnet8-slim", "resnet18", "resnet50"]
    """Architecture."""
    feature_dim: Positive
    """Width of the features; equal to the teacher's embedding width."""


@dataclass(frozen=True, config=_strict)
class Client:
    """Local training."""

    epochs: Positive
    """Passes over the client's images each round."""
    batch_size: Positive
    """Mini-batch size."""
    learning_rate: PositiveFloat
    """Step size of plain SGD, of round 1 where it changes."""
    learning_rate_final: Weight
    """Step size of the last round, geometric in between; 0: the same throughout."""
    crop_padding: Count
    """Zero pixels around an image before its random crop; 0: no crop."""
    augment_per: Literal["batch", "image"]
    """What place of the crop and flip are drawn for."""
    logit_adjustment: Weight
    """tau: weight of the client's log class frequencies in its loss; 0: plain loss."""
    precision: Literal["float32", "bfloat16"]
    """Of forward and backward passes; weights and losses stay in float32."""


@dataclass(frozen=True, config=_strict)
class Distillation:
    """Knowledge distillation from the teacher (clip2fl)."""

    weight: Weight
    """alpha: weight of the distillation loss."""
    temperature: PositiveFloat
    """T: temperature of teacher and student."""


@dataclass(frozen=True, config=_strict)
class FedProx:
    """The proximal term (fedprox)."""

    mu: Weight
    """Weight of the squared distance to the global model, halved."""


@dataclass(frozen=True, config=_strict)
class FedAvgM:
    """Momentum at the server (fedavgm, clip2flm)."""

    momentum: Annotated[float, Field(ge=0, lt=1)]
    """Share of the last round's step that is taken again."""
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    """Step size of the server; 1 goes all the way to the clients' average."""


@dataclass(frozen=True, config=_strict)
class EMA:
    """Exponential moving average of the rounds' models, evaluated and delivered."""

    decay: Annotated[float, Field(ge=0, lt=1)]
    """Weight of a round in units of the next one's; 0: the last model by itself."""


@dataclass(frozen=True, config=_strict)
class ClassGradients:
    """Class gradients of the re-trained classifier (clip2fl, creff)."""

    draws: Positive
    """Augmented draws that are averaged."""
    samples_per_class: Positive
    """Images of a class in one draw, at most."""
    augment: bool
    """Differentiable Siamese augmentation of each draw."""


@dataclass(frozen=True, config=_strict)
class Upload:
    """How class gradients travel to the server (clip2fl, creff)."""

    precision: Precision
    """``half`` (bfloat16) or ``full`` (float32)."""
    min_cosine: Annotated[float, Field(gt=0, le=1)]
    """Bound on a weight row's cosine under low-rank coding; 1: no such coding."""


@dataclass(frozen=True, config=_strict)
class Privacy:
    """What class gradients and models may give away (docs/privacy.md)."""

    min_class_samples: Positive
    """Images below which a client sends no gradient of a class (clip2fl, creff)."""
    gradient_clip_norm: Weight
    """Norm to which each image's part of a class gradient is shortened; 0: no bound."""
    gradient_noise_multiplier: Weight
    """Client's noise on class gradients, in units of what one image can change."""
    update_noise_multiplier: Weight
    """Server's noise on the mean update, in units of what one client can change."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """Probability delta at which the privacy spent is accounted for."""


@dataclass(frozen=True, config=_strict)
class Synthesis:
    """Federated features (clip2fl, creff)."""

    features_per_class: Positive
    """m: federated features of each class."""
    steps: Positive
    """Descent steps each round."""
    learning_rate: PositiveFloat
    """Step size on the features, of round 1 where it changes."""
    learning_rate_final: Weight
    """Step size of the last round, geometric in between; 0: the same throughout."""
    contrast_weight: Weight
    """eta: weight of the prototype contrastive loss (clip2fl)."""
    contrast_temperature: PositiveFloat
    """tau: temperature of the prototype contrastive loss."""


@dataclass(frozen=True, config=_strict)
class Retraining:
    """The balanced classifier (clip2fl, creff)."""

    init: Literal["fresh", "warm"]
    """Start anew each round (the released code) or from the last round's (paper)."""
    epochs: Positive
    """Passes over the federated features."""
    batch_size: Positive
    """Mini-batch size."""
    learning_rate: PositiveFloat
    """Step size of plain SGD."""


@dataclass(frozen=True, config=_strict)
class TeacherConfig:
    """The frozen vision-language model."""

    model: str
    """open_clip name, ``local-dir:PATH``, ``hf-hub:NAME`` or ``demo``."""
    pretrained: str
    """open_clip tag of the weights, with a model given by name."""
    prompt: str
    """Text of a class, with ``{class}`` where its name goes."""
    batch_size: Positive
    """Images in one forward pass."""


@dataclass(frozen=True, config=_strict)
class Evaluation:
    """Central evaluation at the server."""

    max_images: Count
    """Test images in all rounds but the last, which uses all; 0: all."""
    batch_size: Positive
    """Images in one forward pass."""


@dataclass(frozen=True, config=_strict)
class RunConfig:
    """Everything that decides a run's outcome."""

    method: str
    """Algorithm: a name in strategy/registry.py, which the server looks up."""
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Fixes partition, initial model, sampling, batches, augmentation, synthesis."""
    device: str
    """``auto`` (CUDA where there is one), ``cpu`` or ``cuda[:n]``."""
    run: Run
    checkpoint: CheckpointConfig
    dataset: Dataset
    partition: Partition
    federation: Federation
    aggregation: Aggregation
    model: Model
    client: Client
    distillation: Distillation
    fedprox: FedProx
    fedavgm: FedAvgM
    ema: EMA
    class_gradients: ClassGradients
    upload: Upload
    privacy: Privacy
    synthesis: Synthesis
    retraining: Retraining
    teacher: TeacherConfig
    evaluation: Evaluation

    @classmethod
    def from_run_config(cls, flat: Mapping[str, Scalar]) -> "RunConfig":
        """Parse and check Flower's flat run configuration.

        Parameters
        ----------
        flat : mapping
            Dotted kebab-case keys to scalars, as in ``context.run_config``.

        Returns
        -------
        RunConfig

        Raises
        ------
        ConfigError
            Names each offending key, what was found and what is allowed.
        """
        nested: dict[str, Any] = {}
        for key, value in flat.items():
            group, dot, leaf = key.partition(".")
            if not dot:
                nested[key] = value
            elif isinstance(nested.setdefault(group, {}), dict):
                nested[group][leaf] = value
        try:
            # Only JSON input lets strict types and nested dataclasses go together.
            config = _adapter.validate_json(json.dumps(nested))
        except ValidationError as error:
            problems = [_explain(dict(problem)) for problem in error.errors()]
            raise ConfigError(_bullets(problems)) from None
        problems = _contradictions(config)
        if problems:
            raise ConfigError(_bullets(problems))
        return config

    def to_flat(self) -> dict[str, Scalar]:
        """Return the configuration as dotted kebab-case keys, sorted."""
        flat: dict[str, Scalar] = {}
        for key, value in dataclasses.asdict(self).items():
            group = key.replace("_", "-")
            if isinstance(value, dict):
                for leaf, scalar in value.items():
                    flat[f"{group}.{leaf.replace('_', '-')}"] = scalar
            else:
                flat[group] = value
        return dict(sorted(flat.items()))


_adapter: TypeAdapter[RunConfig] = TypeAdapter(RunConfig)


def known_keys() -> list[str]:
    """Return every dotted key that a run configuration has, sorted."""
    keys = []
    for field in dataclasses.fields(RunConfig):
        name = field.name.replace("_", "-")
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            keys += [
                f"{name}.{leaf.name.replace('_', '-')}"
                for leaf in dataclasses.fields(field.type)
            ]
        else:
            keys.append(name)
    return sorted(keys)


def listed_names(text: str) -> tuple[str, ...]:
    """Return the class names in a comma-separated list, as they stand in prompts."""
    return tuple(class_name(part) for part in text.split(","))


def _explain(problem: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    kind = problem["type"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        close = difflib.get_close_matches(key, known_keys(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{key} is not a key of the run configuration{hint}"
    if kind in ("missing", "missing_argument"):
        return (
            f"{key} is missing; its default stands in pyproject.toml, "
            "[tool.flwr.app.config]"
        )
    # pydantic's text is "Input should be ..."; the key and value say which input.
    wanted = str(problem["msg"]).replace("Input should be ", "")
    return f"{key} = {problem['input']!r}, but it must be {wanted}"


def _contradictions(config: RunConfig) -> list[str]:
    """Return what is wrong between keys that are each in range."""
    problems = []
    sampled, clients = config.federation.clients_per_round, config.partition.clients
    sites = config.dataset.name == SITES
    if sampled > clients and not sites:
        problems.append(
            f"federation.clients-per-round = {sampled} is more than partition.clients "
            f"= {clients}; lower the first or raise the second"
        )
    if config.federation.min_replies > sampled:
        problems.append(
            f"federation.min-replies = {config.federation.min_replies} is more than "
            f"federation.clients-per-round = {sampled}: no round could succeed; lower "
            "the first or raise the second"
        )
    problems += _privacy_problems(config)
    if "{class}" not in config.teacher.prompt:
        problems.append(
            f"teacher.prompt = {config.teacher.prompt!r} has no {{class}} where the "
            "class name goes, so every class would get the same text"
        )
    if sites:
        problems += _site_problems(config.dataset)
    needed = {
        "cifar10": ["root"],
        "cifar100": ["root"],
        "image-folder": ["root"],
        "imagenet-lt": ["root", "train_list", "test_list"],
    }
    for leaf in needed.get(config.dataset.name, []):
        value = getattr(config.dataset, leaf)
        problems += _absolute(
            f"dataset.{leaf.replace('_', '-')}",
            value,
            f"dataset.name = {config.dataset.name!r} needs it",
        )
    for key, folder in (("dir", config.run.dir), ("resume", config.run.resume)):
        if folder:
            problems += _absolute(f"run.{key}", folder, "")
    prefix = "local-dir:"
    if config.teacher.model.startswith(prefix):
        problems += _absolute(
            "teacher.model", config.teacher.model.removeprefix(prefix), ""
        )
    return problems


def _privacy_problems(config: RunConfig) -> list[str]:
    problems = []
    privacy, aggregation = config.privacy, config.aggregation
    if privacy.gradient_noise_multiplier > 0 and privacy.gradient_clip_norm == 0:
        problems.append(
            "privacy.gradient-noise-multiplier = "
            f"{privacy.gradient_noise_multiplier}, but privacy.gradient-clip-norm = 0 "
            "does not bound what one image can change; set it, for example to 1.0"
        )
    if privacy.update_noise_multiplier > 0 and (
        aggregation.rule != "mean" or aggregation.max_update_norm == 0
    ):
        problems.append(
            f"privacy.update-noise-multiplier = {privacy.update_noise_multiplier} "
            "needs aggregation.rule = 'mean' and aggregation.max-update-norm above 0, "
            "which bound what one client can change"
        )
    return problems


def _site_problems(dataset: Dataset) -> list[str]:
    problems = []
    names = listed_names(dataset.class_names)
    if len(set(names)) < max(2, len(names)) or "" in names:
        problems.append(
            f"dataset.class-names = {dataset.class_names!r}, but dataset.name = "
            "'sites' needs at least two different names, separated by commas"
        )
    if dataset.validation_share == 0:
        problems.append(
            "dataset.validation-share = 0.0, but with dataset.name = 'sites' the "
            "server has no test images: let the sites keep some, for example 0.2"
        )
    return problems


def _absolute(key: str, value: str, reason: str) -> list[str]:
    if not value:
        return [f"{key} is empty, but {reason}: give an absolute path"]
    if not Path(value).expanduser().is_absolute():
        problem = (
            f"{key} = {value!r} is relative; server and clients run in folders of "
            "their own, so give an absolute path"
        )
        return [problem]
    return []


def _bullets(problems: list[str]) -> str:
    return "run configuration: " + "\n".join(
        problems if len(problems) == 1 else ["", *(f"  - {p}" for p in problems)]
    )
