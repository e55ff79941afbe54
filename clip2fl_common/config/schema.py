"""The run configuration: every key with its default, its bounds and its meaning.

Each key is one field here: the dotted key ``synthesis.learning-rate`` is
``config.synthesis.learning_rate``. A field has the key's type (with the range that it
may have), its default and, below it, the meaning of the key. `ReadBy` and `MayChange`
say which methods read it and whether it may change when a run is resumed. From this
file ``make docs`` writes the block in pyproject.toml that Flower reads,
docs/configuration.md, and the JSON schemas with which editors complete keys.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from clip2fl_common.choices import TF32, OptimizerName, Precision
from clip2fl_common.config.checks import (
    FEWEST_CLASSES,
    SITES,
    contradictions,
    known_classes,
)
from clip2fl_common.config.keys import (
    AUTO,
    DefaultOf,
    Key,
    MayChange,
    ReadBy,
    kebab,
    keys_of,
)
from clip2fl_common.config.messages import (
    explain,
    key_problems,
    listed,
    scalar_problem,
)
from clip2fl_common.config.types import (
    GRADIENT_METHODS,
    MOMENTUM_METHODS,
    PLUS,
    RETRAINING_METHODS,
    TEACHER_METHODS,
    Concentration,
    ConfigError,
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
    Momentum,
    NameList,
    Padding,
    PathText,
    Positive,
    Ratio,
    Replies,
    Scalar,
    Seconds,
    Share,
    SplitName,
    StepSize,
    Temperature,
    Text,
    TrackerNames,
    ViewKind,
    ViewMix,
    Views,
    Weight,
)

_strict = ConfigDict(
    extra="forbid",
    strict=True,
    allow_inf_nan=False,
    alias_generator=kebab,
    use_attribute_docstrings=True,
)


@dataclass(frozen=True, config=_strict)
class Run:
    """Where a run leaves its results."""

    dir: PathText = ""
    """Absolute folder in which each run gets its own; empty: the user's data folder."""
    name: FolderName = ""
    """Name of the run's folder; empty: made from method, data set, seed and run id."""
    resume: PathText = ""
    """Absolute folder of an interrupted run to resume; empty: a new run."""
    trackers: TrackerNames = ""
    """Experiment trackers, separated by spaces: tensorboard, mlflow, wandb; empty:
    none."""


@dataclass(frozen=True, config=_strict)
class CheckpointConfig:
    """Which states of a run are kept, to resume it and to deliver the model."""

    every: Annotated[Positive, MayChange()] = 1
    """Rounds from one checkpoint to the next; the last round always has one."""
    keep: Annotated[Positive, MayChange()] = 2
    """Number of last checkpoints to keep, besides the best one. At least two are kept,
    since only the next round shows whether the newest model is usable."""
    best_metric: Literal["top1", "balanced", "many", "medium", "few"] = "balanced"
    """Accuracy that decides which round is best: top1, balanced, many, medium or
    few."""


@dataclass(frozen=True, config=_strict)
class Dataset:
    """The images, and the length of their tail."""

    name: Literal[
        "demo",
        "cifar10",
        "cifar100",
        "imagenet-lt",
        "image-folder",
        "list",
        "hugging-face",
        "sites",
    ] = "demo"
    """demo (drawn, no download), cifar10, cifar100, imagenet-lt, image-folder, list
    (CSV or Parquet), hugging-face (a saved folder or a name on the hub), or sites (each
    node trains on its own images: docs/own-images.md)."""
    root: PathText = ""
    """Absolute folder of the images; cifar10 and cifar100 are downloaded there. list:
    empty for the lists' own folders. hugging-face: also
    hf-hub:OWNER/NAME@REVISION."""
    train_list: PathText = ""
    """imagenet-lt and list: absolute path of the list of training images: one `path
    label` per line (imagenet-lt), or a CSV or Parquet file with the columns path and
    label (list)."""
    test_list: PathText = ""
    """imagenet-lt and list: absolute path of the list of test images."""
    train_split: SplitName = "train"
    """hugging-face: split with the training images."""
    test_split: SplitName = "test"
    """hugging-face: split with the test images."""
    image_column: Text = ""
    """list: column with the images' paths (empty: path). hugging-face: column with the
    images (empty: the only one of type Image)."""
    label_column: Text = ""
    """list: column with the classes (empty: label). hugging-face: column with the
    classes (empty: the only one of type ClassLabel)."""
    client_column: Text = "client"
    """list and hugging-face: column with the clients that training images come from,
    for partition.kind = natural."""
    class_names: NameList = ""
    """sites: names of the classes, separated by commas, from the most frequent to the
    rarest if known; many/medium/few are 30/40/30 % of this order. list and
    hugging-face: the same, where labels are numbers or another order is wanted."""
    validation_share: Share = 0.2
    """sites: share of each site's images, chosen by their content, on which the site
    evaluates the model."""
    image_size: ImageSize = 32
    """Side in pixels to which images are scaled."""
    imbalance_factor: Ratio = 100.0
    """Most frequent over least frequent class (IF >= 1); 1 keeps every sample."""
    demo_train_per_class: DrawnImages = 600
    """demo: number of training images drawn for the most frequent class."""
    demo_test_per_class: DrawnImages = 200
    """demo: number of test images drawn for each class."""
    skip_unreadable: Annotated[bool, MayChange()] = False
    """Skip and count unreadable images, instead of stopping."""


@dataclass(frozen=True, config=_strict)
class Partition:
    """How the training images are divided among clients."""

    kind: Literal["dirichlet", "shards", "quantity", "natural"] = "dirichlet"
    """What clients differ in: dirichlet (class shares; as published), shards (a few
    classes each), quantity (number of images), or natural (where images come from)."""
    clients: Positive = 10
    """Number of clients; any number of nodes can simulate them (sites: each node is
    one)."""
    alpha: Concentration = 0.5
    """dirichlet and quantity: concentration of the Dirichlet distribution (> 0);
    smaller is more non-IID."""
    shards: Positive = 2
    """shards: number of pieces of the images, sorted by class, that each client
    gets."""


@dataclass(frozen=True, config=_strict)
class Federation:
    """The rounds."""

    rounds: Positive = 30
    """Number of rounds."""
    clients_per_round: Positive = 5
    """Clients drawn without replacement each round. A run with sites waits for this
    many at its start; later rounds draw fewer if fewer are connected."""
    round_timeout: Annotated[Seconds, MayChange()] = 3600.0
    """Seconds to wait for a round's replies."""
    min_replies: Replies = 0
    """Valid replies that a round needs; with fewer, the model does not change. 0: one,
    and with sites more than half of the sites seen in the run."""
    site_registry: Annotated[PathText, MayChange()] = ""
    """Absolute path, at the server, of the file that binds sites' names to their keys
    (`clip2fl site register` writes it); empty: a node may call itself any site."""


@dataclass(frozen=True, config=_strict)
class Aggregation:
    """How the clients' replies become one model, and how far one client can move it."""

    rule: Literal["mean", "median", "trimmed-mean"] = "mean"
    """Rule that averages the clients' models and class gradients: mean (models are
    weighted by images), or per coordinate median or trimmed-mean (not weighted)."""
    trim: Annotated[
        float,
        Field(ge=0, lt=0.5),
        ReadBy("clip2fl", "creff", "ccvr", "fedavg", "fedlda", "fedprox"),
    ] = 0.2
    """trimmed-mean: share of the values cut off at each end, below 0.5."""
    max_length_ratio: LengthRatio = 10.0
    """Drops a reply whose update is this many times longer than the round's median
    update (or whose class gradients are out of all proportion); 0: drops none."""
    max_update_norm: Weight = 0.0
    """Norm to which longer model updates of a client are clipped; 0: no bound."""
    max_gradient_norm: Annotated[Weight, ReadBy(*GRADIENT_METHODS)] = 0.0
    """Norm to which a client's longer class gradients are clipped; 0: no bound."""
    max_site_images: Images = 1000000
    """sites: largest number of training images that a site may report, which is its
    weight in the mean."""
    secure: bool = False
    """Secure aggregation: the server learns the sum over a round's clients, at least
    three, and no client's model or statistics (docs/secure-aggregation.md). Clients
    clip themselves, and max-length-ratio bounds the sum."""


@dataclass(frozen=True, config=_strict)
class Model:
    """The student."""

    name: Literal["resnet8", "resnet8-slim", "resnet18", "resnet50"] = "resnet8-slim"
    """Student: resnet8 (4x width, the paper's), resnet8-slim, or resnet18 or resnet50,
    which need images of more than 32 pixels."""
    feature_dim: FeatureDim = 512
    """Width of the student's features; must equal the teacher's embedding width."""


@dataclass(frozen=True, config=_strict)
class Client:
    """Local training."""

    epochs: Positive = 5
    """Passes over a client's images each round."""
    batch_size: Positive = 32
    """Mini-batch size of local training."""
    optimizer: Annotated[OptimizerName, DefaultOf({PLUS: "muon"})] = "sgd"
    """sgd (plain, as published), momentum, adam or muon (orthogonalised momentum); each
    round starts without memory of earlier ones."""
    learning_rate: Annotated[StepSize, DefaultOf({PLUS: 0.03})] = 0.1
    """Step size of the optimizer: about 0.1 for sgd, 0.02 for momentum and muon, 0.002
    for adam."""
    learning_rate_final: FinalStepSize = 0.0
    """Step size of the last round, on a geometric schedule; 0: the same in all
    rounds."""
    learning_rate_other: StepSize = 0.1
    """muon: step size of the biases, BatchNorm and the classifier, which are not
    orthogonalised; it follows the same schedule."""
    momentum: Momentum = 0.9
    """momentum, muon and adam (beta_1): share of the earlier direction in the next one;
    sgd has none."""
    weight_decay: Weight = 0.0
    """Each step first shrinks every parameter by this share times the step size; 0: no
    decay."""
    label_weight: Weight = 1.0
    """Weight of the cross-entropy with the labels; 0: distillation alone trains the
    local models."""
    crop_padding: Padding = 4
    """Zero pixels around an image before its random crop; 0: no crop. Resized views
    have no padding."""
    augment_per: Literal["batch", "image"] = "batch"
    """Draw the crop and the flip once per batch (the released code) or per image. Views
    are made per image."""
    logit_adjustment: Weight = 0.0
    """tau: logit-adjusted loss by the client's own class frequencies; 0: plain loss."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """float32, or bfloat16 (mixed precision: faster on GPUs, slower on most CPUs)."""
    tf32: TF32 = "convolutions"
    """NVIDIA GPUs: which float32 products of training and class gradients round their
    factors to 10 bits (TF32, several times as fast): off, convolutions or all (also
    matrix products)."""


@dataclass(frozen=True, config=_strict)
class Distillation:
    """Knowledge distillation from the teacher."""

    weight: Annotated[Weight, DefaultOf({PLUS: 3.0})] = 1.0
    """alpha: weight of the distillation loss; 0 switches distillation off."""
    temperature: Annotated[Temperature, DefaultOf({PLUS: 6.0})] = 3.0
    """T: distillation temperature of teacher and student."""
    views: Annotated[Views, DefaultOf({PLUS: 10})] = 0
    """Augmented pictures (views) of each training image. Each epoch trains on a random
    one and distils from the teacher's logits of the same picture. 0: the image is
    augmented anew, and the teacher sees it without augmentation."""
    view_kind: Annotated[ViewKind, DefaultOf({PLUS: "resized-crop"})] = "crop-flip"
    """How views are made: crop-flip (client.crop-padding and a flip), or resized-crop
    (35 to 100 % of the area, a flip and other colours)."""
    view_mix: ViewMix = "none"
    """Mix each view with a view of another image of the same client: mixup (weighted
    sum) or cutmix (a square of the other). The labels are weighted alike."""


@dataclass(frozen=True, config=_strict)
class FedProx:
    """The proximal term."""

    mu: Weight = 0.01
    """Weight of the proximal term."""


@dataclass(frozen=True, config=_strict)
class FedAvgM:
    """Momentum at the server."""

    momentum: Annotated[Momentum, DefaultOf({PLUS: 0.7})] = 0.9
    """Momentum of the server's steps."""
    learning_rate: Annotated[float, Field(ge=1e-06, le=1)] = 1.0
    """Step size of the server; 1 goes all the way to the clients' average."""


@dataclass(frozen=True, config=_strict)
class EMA:
    """Exponential moving average of the rounds' models, evaluated and delivered."""

    decay: Annotated[float, Field(ge=0, lt=1), DefaultOf({PLUS: 0.6})] = 0.0
    """Decay of the exponential moving average of the rounds' models, which is evaluated
    and delivered. Each round has decay times the weight of the next round; 0: only the
    last model."""


@dataclass(frozen=True, config=_strict)
class Head:
    """The classifier that is delivered."""

    delivered: Literal["method", "discriminant"] = "method"
    """Classifier that is delivered: method (the re-trained one where there is one, else
    the model's own), or discriminant (closed form: clients send sums of features). All
    of a run's classifiers are evaluated. fedlda always delivers the discriminant."""
    decay: Momentum = 0.5
    """discriminant: weight of a round's statistics relative to the next round's; 0:
    only the clients of the last round count."""


@dataclass(frozen=True, config=_strict)
class ClassGradients:
    """Class gradients of the re-trained classifier."""

    draws: Annotated[Draws, DefaultOf(many_classes=2)] = 5
    """Augmented draws over which a class gradient is averaged. Each draw is a forward
    pass of nearly all of a client's images if it has few of each class."""
    samples_per_class: Positive = 32
    """Largest number of images of a class in one draw."""
    augment: bool = True
    """Differentiable Siamese augmentation of each draw."""


@dataclass(frozen=True, config=_strict)
class Upload:
    """How class gradients are sent to the server."""

    precision: Precision = "half"
    """Precision of uploaded class gradients: half (bfloat16: float32's range, 8 bits of
    precision) or full (float32)."""
    min_cosine: Annotated[Cosine, DefaultOf(many_classes=0.99)] = 1.0
    """Smallest cosine between a row of a class gradient and the row that the server
    decodes. 1 uploads all rows; below 1, e.g. 0.99, a low-rank factorisation of the
    smallest rank that keeps the bound."""


@dataclass(frozen=True, config=_strict)
class Privacy:
    """Limits on what statistics and models reveal (docs/privacy.md)."""

    min_class_samples: Positive = 1
    """Smallest number of a class's images for which a client sends a class gradient,
    class statistics or class moments. Those of a single image reveal its feature
    (docs/privacy.md)."""
    gradient_clip_norm: Annotated[Weight, ReadBy(*GRADIENT_METHODS)] = 0.0
    """Norm to which each image's part of a class gradient is clipped; 0: no bound."""
    gradient_noise_multiplier: Annotated[Weight, ReadBy(*GRADIENT_METHODS)] = 0.0
    """Scale of the Gaussian noise that clients add to class gradients, relative to the
    largest change that one image can cause; 0: no noise."""
    moment_clip_norm: Weight = 0.0
    """discriminant: norm to which each image's features in the class moments are
    clipped; 0: no bound."""
    moment_noise_multiplier: Weight = 0.0
    """discriminant: scale of the Gaussian noise that clients add to class moments,
    relative to the largest change that one image can cause; 0: no noise."""
    model_noise_multiplier: Weight = 0.0
    """Scale of the Gaussian noise that clients add to their own model updates, relative
    to the largest change that one image can cause, which aggregation.max-update-norm
    bounds; 0: no noise."""
    update_noise_multiplier: Weight = 0.0
    """Scale of the Gaussian noise that the server adds to the mean update, relative to
    the largest change that one client can cause, which aggregation.max-update-norm
    bounds; 0: no noise."""
    delta: Delta = 1e-05
    """delta of the reported (epsilon, delta) guarantee."""


@dataclass(frozen=True, config=_strict)
class Synthesis:
    """Federated features."""

    features_per_class: FeaturesPerClass = 100
    """m: federated features of each class."""
    steps: Positive = 100
    """Gradient descent steps on the federated features each round."""
    learning_rate: StepSize = 0.1
    """Step size on the federated features."""
    learning_rate_final: FinalStepSize = 0.0
    """Step size of the last round, on a geometric schedule; 0: the same in all
    rounds."""
    contrast_weight: Annotated[Weight, ReadBy(*TEACHER_METHODS)] = 0.001
    """eta: weight of the prototype contrastive loss; 0 switches it off."""
    contrast_temperature: Annotated[Temperature, ReadBy(*TEACHER_METHODS)] = 0.1
    """tau: temperature of the prototype contrastive loss."""


@dataclass(frozen=True, config=_strict)
class Retraining:
    """The balanced classifier."""

    init: Literal["fresh", "warm"] = "fresh"
    """Start of re-training: fresh (the released code) or warm (last round's
    classifier)."""
    epochs: Annotated[Positive, DefaultOf(many_classes=30)] = 300
    """Passes over the federated features when the classifier is re-trained. A pass has
    a number of steps that grows with the classes."""
    batch_size: Positive = 32
    """Mini-batch size of re-training."""
    learning_rate: StepSize = 0.01
    """Step size of re-training (plain SGD)."""


@dataclass(frozen=True, config=_strict)
class CCVR:
    """Virtual features."""

    virtual_features: FeaturesPerClass = 100
    """Features of each class that the server draws from the class's normal distribution
    each round, to re-train the classifier on them."""


@dataclass(frozen=True, config=_strict)
class TeacherConfig:
    """The frozen vision-language model."""

    model: Text = "demo"
    """Teacher: an open_clip name (ViT-B-32), local-dir:PATH, hf-hub:NAME, or demo."""
    pretrained: Text = ""
    """open_clip tag of the weights (openai, laion2b_s34b_b79k, ...) for a model by
    name."""
    prompt: Text = "a photo of a {class}"
    """Prompt of a class; {class} is replaced by the class name."""
    batch_size: Positive = 64
    """Images in one forward pass of the teacher."""


@dataclass(frozen=True, config=_strict)
class Evaluation:
    """Central evaluation at the server."""

    max_images: ImageLimit = 0
    """Number of test images in each round; the last round uses all. 0: always all."""
    tuning_share: Share = 0.0
    """Share of each class's test images on which settings and the best round are
    chosen, the same images in all runs. Accuracy on them and on all others (held out)
    is then recorded apart. 0: none."""
    batch_size: Positive = 32
    """Images in one forward pass without gradients; 32 suits a CPU's cache, 512 a
    GPU."""


@dataclass(frozen=True, config=_strict)
class Delivery:
    """How the model reaches the sites (docs/model-delivery.md)."""

    signing_key: PathText = ""
    """sites: absolute path, at the server, of the private key that signs the model; the
    run makes it if it is missing. At its end the run sends the signed model to all
    connected sites. Empty: the model stays at the server."""
    run: PathText = ""
    """Absolute folder, at the server, of a complete run of sites. This run then trains
    nothing and only sends that run's model (clip2fl deliver). Empty: it trains."""


@dataclass(frozen=True, config=_strict)
class RunConfig:
    """Everything that decides a run's outcome."""

    method: MethodName = "clip2fl"
    """Algorithm: clip2fl, clip2flm (with momentum at the server), clip2fl-plus (with
    four extensions), creff (no teacher), ccvr, fedavg, fedprox, fedavgm or fedlda
    (fedavg with a closed-form classifier)."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 7
    """Fixes partition, initial model, sampling, batches, augmentation and synthesis."""
    device: Device = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""
    run: Annotated[Run, MayChange()] = Run()
    checkpoint: CheckpointConfig = CheckpointConfig()
    dataset: Dataset = Dataset()
    partition: Partition = Partition()
    federation: Federation = Federation()
    aggregation: Aggregation = Aggregation()
    model: Model = Model()
    client: Client = Client()
    distillation: Annotated[Distillation, ReadBy(*TEACHER_METHODS)] = Distillation()
    fedprox: Annotated[FedProx, ReadBy("fedprox")] = FedProx()
    fedavgm: Annotated[FedAvgM, ReadBy(*MOMENTUM_METHODS)] = FedAvgM()
    ema: EMA = EMA()
    head: Head = Head()
    class_gradients: Annotated[ClassGradients, ReadBy(*GRADIENT_METHODS)] = (
        ClassGradients()
    )
    upload: Annotated[Upload, ReadBy(*GRADIENT_METHODS)] = Upload()
    privacy: Privacy = Privacy()
    synthesis: Annotated[Synthesis, ReadBy(*GRADIENT_METHODS)] = Synthesis()
    retraining: Annotated[Retraining, ReadBy(*RETRAINING_METHODS)] = Retraining()
    ccvr: Annotated[CCVR, ReadBy("ccvr")] = CCVR()
    teacher: Annotated[TeacherConfig, ReadBy(*TEACHER_METHODS)] = TeacherConfig()
    evaluation: Evaluation = Evaluation()
    delivery: Annotated[Delivery, MayChange()] = Delivery()

    @classmethod
    def from_run_config(
        cls, flat: Mapping[str, Scalar], classes: int | None = None
    ) -> "RunConfig":
        """Parse and check Flower's flat run configuration.

        Parameters
        ----------
        flat : mapping
            Dotted kebab-case keys to scalars, as in ``context.run_config``.
        classes : int or None
            Number of classes C of the images; None: as far as the keys tell it
            (`known_classes`). If it is unknown, the keys whose defaults depend on it
            stay ``"auto"``, for `for_classes`.

        Returns
        -------
        RunConfig

        Raises
        ------
        ConfigError
            Names each invalid key, its value and what is allowed.
        """
        problems = list(key_problems(flat, known_keys()))
        classes = classes or known_classes(flat)
        nested: dict[str, Any] = {}
        for key, known in KEYS.items():
            if key in flat and scalar_problem(flat[key]) is None:
                value = flat[key]
                waits = known.many_classes is not None and classes is None
                if known.chosen and value == AUTO and not waits:
                    value = known.default_of(flat.get("method"), classes)
                group, dot, leaf = key.partition(".")
                if dot:
                    nested.setdefault(group, {})[leaf] = value
                else:
                    nested[key] = value
        try:
            # Only JSON input lets strict types and nested dataclasses go together.
            config = _adapter.validate_json(json.dumps(nested))
        except ValidationError as error:
            auto = {name for name, key in KEYS.items() if key.chosen}
            problems += [explain(dict(problem), auto) for problem in error.errors()]
        if not problems and classes is not None:
            problems = contradictions(config, classes)
        if problems:
            raise ConfigError(listed(problems))
        if classes is None:
            # Raises what contradicts itself with any number of classes.
            cls.from_run_config(flat, FEWEST_CLASSES)
        return config

    def for_classes(self, classes: int) -> "RunConfig":
        """Return the configuration of a run whose images have a number of classes.

        Parameters
        ----------
        classes : int
            Number of classes C.

        Returns
        -------
        RunConfig
            Without ``"auto"``, which only `device` may then be.

        Raises
        ------
        ConfigError
            If an array of the run would not fit any memory with so many classes.
        """
        return self.from_run_config(self.to_flat(), classes)

    @property
    def simulated(self) -> bool:
        """Whether nodes simulate clients; otherwise nodes are sites with own images."""
        return self.dataset.name != SITES

    def to_flat(self) -> dict[str, Scalar]:
        """Return the configuration as dotted kebab-case keys, sorted."""
        flat: dict[str, Scalar] = {}
        for key, value in dataclasses.asdict(self).items():
            if isinstance(value, dict):
                for leaf, scalar in value.items():
                    flat[f"{kebab(key)}.{kebab(leaf)}"] = scalar
            else:
                flat[kebab(key)] = value
        return dict(sorted(flat.items()))


_adapter: TypeAdapter[RunConfig] = TypeAdapter(RunConfig)


KEYS: Mapping[str, Key] = {key.name: key for key in keys_of(RunConfig)}
"""Every key by name, in the order in which the schema declares them."""


def known_keys() -> list[str]:
    """Return every dotted key that a run configuration has, sorted."""
    return sorted(KEYS)


def defaults() -> dict[str, Scalar]:
    """Return every dotted key with its default, in the order of `KEYS`.

    A key whose default depends on the method or on the number of classes has
    ``"auto"``, which `RunConfig.from_run_config` and `RunConfig.for_classes` replace.
    """
    return {name: key.written_default for name, key in KEYS.items()}
