"""The run configuration: parsed and checked once, typed everywhere after that.

Every key of ``[tool.flwr.app.config]`` in pyproject.toml is one field here: the
dotted key ``synthesis.learning-rate`` is ``config.synthesis.learning_rate``. Defaults
live in pyproject.toml only, so that there is one place to look.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from clip2fl_common.config_checks import SITES as SITES
from clip2fl_common.config_checks import contradictions
from clip2fl_common.config_messages import (
    explain,
    key_problems,
    listed,
    scalar_problem,
)
from clip2fl_common.config_types import (
    Concentration,
    Cosine,
    Delta,
    Device,
    DrawnImages,
    Draws,
    FeatureDim,
    FeaturesPerClass,
    FinalStepSize,
    FolderName,
    ImageLimit,
    Images,
    ImageSize,
    LengthRatio,
    MethodName,
    NameList,
    Padding,
    PathText,
    Positive,
    Ratio,
    Replies,
    Seconds,
    Share,
    StepSize,
    Temperature,
    Text,
    TrackerNames,
    Weight,
)
from clip2fl_common.config_types import ConfigError as ConfigError
from clip2fl_common.config_types import Scalar as Scalar
from clip2fl_common.config_types import listed_names as listed_names
from clip2fl_common.precision import Precision

# Methods whose clients need the teacher; nodes do not know the strategies themselves.
TEACHER_METHODS = ("clip2fl", "clip2flm")

_strict = ConfigDict(
    extra="forbid",
    strict=True,
    allow_inf_nan=False,
    alias_generator=lambda name: name.replace("_", "-"),
)


@dataclass(frozen=True, config=_strict)
class Run:
    """Where a run leaves its results."""

    dir: PathText
    """Folder that receives one sub-folder a run; empty: the user's data folder."""
    name: FolderName
    """Name of the run's folder; empty: method, data set, seed and Flower's run id."""
    resume: PathText
    """Folder of an interrupted run that goes on there; empty: a new run."""
    trackers: TrackerNames
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
    root: PathText
    """Absolute folder of the images; cifar10 and cifar100 are downloaded there."""
    train_list: PathText
    """imagenet-lt: file with one ``path label`` a line (or a JSON list of them)."""
    test_list: PathText
    """imagenet-lt: the same for the test images."""
    class_names: NameList
    """sites: the classes, separated by commas, from frequent to rare."""
    validation_share: Share
    """sites: share of each site's images that evaluate instead of training."""
    image_size: ImageSize
    """Side in pixels to which images are brought."""
    imbalance_factor: Ratio
    """Most frequent over least frequent class; 1 keeps every sample."""
    demo_train_per_class: DrawnImages
    """demo: drawn images of the most frequent class."""
    demo_test_per_class: DrawnImages
    """demo: drawn test images of each class."""
    skip_unreadable: bool
    """Leave out unreadable images (and count them) instead of stopping."""


@dataclass(frozen=True, config=_strict)
class Partition:
    """How the training images are divided among clients."""

    clients: Positive
    """Number of clients, whatever the number of nodes that simulate them."""
    alpha: Concentration
    """Concentration of the Dirichlet distribution; smaller is more uneven."""


@dataclass(frozen=True, config=_strict)
class Federation:
    """How the rounds go."""

    rounds: Positive
    """Number of rounds."""
    clients_per_round: Positive
    """Clients drawn without replacement each round; sites: waited for at the start."""
    round_timeout: Seconds
    """Seconds to wait for a round's replies."""
    min_replies: Replies
    """Good replies without which the model stays; 0: 1, of sites more than half."""
    site_registry: PathText
    """Absolute path of the file that binds sites' names to keys; empty: free names."""


@dataclass(frozen=True, config=_strict)
class Aggregation:
    """How what clients send becomes one model, and how much one of them can move it."""

    rule: Literal["mean", "median", "trimmed-mean"]
    """Mean, or coordinate-wise median or trimmed mean, of models and gradients."""
    trim: Annotated[float, Field(ge=0, lt=0.5)]
    """trimmed-mean: share of the values cut off at each end."""
    max_length_ratio: LengthRatio
    """Longest update that is used, in medians of the round; 0: any."""
    max_update_norm: Weight
    """Norm to which a client's update is shortened; 0: no bound."""
    max_gradient_norm: Weight
    """The same for each of its class gradients; 0: no bound."""
    max_site_images: Images
    """sites: the most training images, its weight in the mean, that one may claim."""


@dataclass(frozen=True, config=_strict)
class Model:
    """The student."""

    name: Literal["resnet8", "resnet8-slim", "resnet18", "resnet50"]
    """Architecture."""
    feature_dim: FeatureDim
    """Width of the features; equal to the teacher's embedding width."""


@dataclass(frozen=True, config=_strict)
class Client:
    """Local training."""

    epochs: Positive
    """Passes over the client's images each round."""
    batch_size: Positive
    """Mini-batch size."""
    learning_rate: StepSize
    """Step size of plain SGD, of round 1 where it changes."""
    learning_rate_final: FinalStepSize
    """Step size of the last round, geometric in between; 0: the same throughout."""
    crop_padding: Padding
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
    temperature: Temperature
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
    learning_rate: Annotated[float, Field(ge=1e-6, le=1)]
    """Step size of the server; 1 goes all the way to the clients' average."""


@dataclass(frozen=True, config=_strict)
class EMA:
    """Exponential moving average of the rounds' models, evaluated and delivered."""

    decay: Annotated[float, Field(ge=0, lt=1)]
    """Weight of a round in units of the next one's; 0: the last model by itself."""


@dataclass(frozen=True, config=_strict)
class ClassGradients:
    """Class gradients of the re-trained classifier (clip2fl, creff)."""

    draws: Draws
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
    min_cosine: Cosine
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
    delta: Delta
    """Probability delta at which the privacy spent is accounted for."""


@dataclass(frozen=True, config=_strict)
class Synthesis:
    """Federated features (clip2fl, creff)."""

    features_per_class: FeaturesPerClass
    """m: federated features of each class."""
    steps: Positive
    """Descent steps each round."""
    learning_rate: StepSize
    """Step size on the features, of round 1 where it changes."""
    learning_rate_final: FinalStepSize
    """Step size of the last round, geometric in between; 0: the same throughout."""
    contrast_weight: Weight
    """eta: weight of the prototype contrastive loss (clip2fl)."""
    contrast_temperature: Temperature
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
    learning_rate: StepSize
    """Step size of plain SGD."""


@dataclass(frozen=True, config=_strict)
class TeacherConfig:
    """The frozen vision-language model."""

    model: Text
    """open_clip name, ``local-dir:PATH``, ``hf-hub:NAME`` or ``demo``."""
    pretrained: Text
    """open_clip tag of the weights, with a model given by name."""
    prompt: Text
    """Text of a class, with ``{class}`` where its name goes."""
    batch_size: Positive
    """Images in one forward pass."""


@dataclass(frozen=True, config=_strict)
class Evaluation:
    """Central evaluation at the server."""

    max_images: ImageLimit
    """Test images in all rounds but the last, which uses all; 0: all."""
    batch_size: Positive
    """Images in one forward pass."""


@dataclass(frozen=True, config=_strict)
class RunConfig:
    """Everything that decides a run's outcome."""

    method: MethodName
    """Algorithm: a name in strategy/registry.py, which the server looks up."""
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Fixes partition, initial model, sampling, batches, augmentation, synthesis."""
    device: Device
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
        problems = list(key_problems(flat, known_keys()))
        nested: dict[str, Any] = {}
        for key in known_keys():
            if key in flat and scalar_problem(flat[key]) is None:
                group, dot, leaf = key.partition(".")
                if dot:
                    nested.setdefault(group, {})[leaf] = flat[key]
                else:
                    nested[key] = flat[key]
        try:
            # Only JSON input lets strict types and nested dataclasses go together.
            config = _adapter.validate_json(json.dumps(nested))
        except ValidationError as error:
            # What is missing here has been named above.
            problems += [
                explain(dict(problem))
                for problem in error.errors()
                if "missing" not in problem["type"]
            ]
        if not problems:
            problems = _contradictions(config)
        if problems:
            raise ConfigError(listed(problems))
        return config

    @property
    def simulated(self) -> bool:
        """Whether nodes simulate the clients; else they are sites with own images."""
        return self.dataset.name != SITES

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


def _contradictions(config: RunConfig) -> list[str]:
    """Return what is wrong between keys that are each in range."""
    problems = []
    sampled, clients = config.federation.clients_per_round, config.partition.clients
    if sampled > clients and config.simulated:
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
    return problems + contradictions(config)
