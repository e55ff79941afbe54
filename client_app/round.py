"""One client's round in named steps: images, teacher, declared fields, training."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from client_app.chosen_views import ChosenViews, choose_views
from client_app.images import (
    OtherCodeError,
    training_images,
    validation_images,
)
from client_app.model_noise import noisy_local_model
from client_app.optimizers import OptimizerSettings
from client_app.own_site import OwnSite
from client_app.part import ClientPart, ClientRound
from client_app.registry import part_for
from client_app.shared_training import train_or_reuse
from client_app.site_epsilon import IMPLIED, implied_fields
from client_app.site_evaluation import predictions, recalls
from client_app.site_policy import SiteRefusal
from client_app.training import (
    LocalObjective,
    PixelImages,
    TrainingLosses,
    logit_offsets,
    train_locally,
)
from client_app.views import ViewRecipe
from clip2fl_common import messages
from clip2fl_common.config import RunConfig, TeacherConfig
from clip2fl_common.data.datasets import ImageDataset
from clip2fl_common.devices import resolve_device, tensor_cores, to_device_if_small
from clip2fl_common.messages import Evaluation, TrainRequest
from clip2fl_common.metrics import FEDAVG_HEAD, TEACHER_HEAD, confusion_matrix
from clip2fl_common.models import ImageClassifier, build_model
from clip2fl_common.provenance import PACKAGE_ROOT, code_fingerprint
from clip2fl_common.schedule import step_size
from clip2fl_common.teacher import (
    LOCAL_PREFIX,
    OtherTeacherError,
    Teacher,
    load_teacher,
)


def train_round(
    config: RunConfig, request: TrainRequest, site: OwnSite | None
) -> RecordDict:
    """Return the declared fields and the model trained on this client's images.

    Parameters
    ----------
    config : RunConfig
        The run's configuration, as this client follows it.
    request : TrainRequest
        The server's request.
    site : OwnSite or None
        This node, if it has images of its own.

    Returns
    -------
    RecordDict
        The reply's content.

    Raises
    ------
    DatasetError
        If the images are missing or cannot be used.
    FloatingPointError
        If the training diverges, or the server's model is not finite.
    OtherCodeError, OtherTeacherError
        If the code or the teacher differs from the server's.
    SiteRefusal
        If a rule of the site forbids a field that is asked for.
    """
    _check_code(request.code_fingerprint)
    _check_sent(request)
    parts = _allowed_parts(config, request, site)
    seconds: dict[str, float] = {}
    with _timed(seconds, "data"):
        client = _prepare(config, request, site)
        views = _views(client)
        teacher_logits = None if views is not None else _distilled_logits(client)
    content = RecordDict()
    # The teacher's features, which all runs share, do not depend on the setting.
    with tensor_cores(config.client.tf32):
        with _timed(seconds, "gradients"):
            _add(content, {part.field: part.before_training(client) for part in parts})
        with _timed(seconds, "training"):
            losses = _train(client, teacher_logits, views)
        _add(content, {part.field: part.after_training(client) for part in parts})
    content[messages.ARRAYS] = _released_model(client)
    content[messages.METRICS] = _metrics(client, losses, seconds)
    return content


def evaluate_round(
    config: RunConfig, request: TrainRequest, site: OwnSite | None
) -> Evaluation:
    """Return the accuracy of each classifier on a site's validation images.

    Parameters and errors are the same as for `train_round`.
    """
    started = time.perf_counter()
    _check_code(request.code_fingerprint)
    _check_sent(request)
    device = resolve_device(config.device)
    dataset, loaded = validation_images(config, site)
    model = _global_model(config, dataset, request, device)
    own = model.classifier
    classifiers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
        FEDAVG_HEAD: (own.weight, own.bias)
    }
    for head, (weight, bias) in request.heads.items():
        classifiers[head] = (weight.to(device), bias.to(device))
    teacher_logits = {}
    if request.teacher_fingerprint:
        teacher_logits[TEACHER_HEAD] = _teacher_logits(
            config, dataset, loaded.images, request, device, site
        )
    votes = predictions(
        model,
        PixelImages(loaded.images, dataset.normalization, device),
        classifiers,
        teacher_logits,
        config.evaluation.batch_size,
    )
    confusion = None
    wanted = votes.get(request.confusion_of)
    if site is not None and site.policy.send_confusion_matrix and wanted is not None:
        confusion = confusion_matrix(
            loaded.labels.numpy(), wanted.numpy(), len(dataset.class_names)
        )
    return Evaluation(
        images=len(loaded.labels),
        recalls=recalls(votes, loaded.labels),
        unreadable=len(loaded.unreadable),
        seconds=time.perf_counter() - started,
        confusion=confusion,
    )


def _prepare(
    config: RunConfig, request: TrainRequest, site: OwnSite | None
) -> ClientRound:
    """Load this client's images and the global model."""
    device = resolve_device(config.device)
    dataset, loaded = training_images(config, site, request.partition)
    config = config.for_classes(len(dataset.class_names))
    images = PixelImages(
        to_device_if_small(loaded.images, device), dataset.normalization, device
    )
    return ClientRound(
        config=config,
        request=request,
        site=site,
        dataset=dataset,
        loaded=loaded,
        images=images,
        labels=loaded.labels.to(device),
        model=_global_model(config, dataset, request, device),
    )


def _distilled_logits(client: ClientRound) -> torch.Tensor | None:
    """Return the teacher's logits [N, C] if the request asks for distillation."""
    if client.request.distillation_weight == 0:
        return None
    device = client.images.device
    return _teacher_logits(
        client.config,
        client.dataset,
        client.loaded.images,
        client.request,
        device,
        client.site,
    ).to(device)


def _allowed_parts(
    config: RunConfig, request: TrainRequest, site: OwnSite | None
) -> list[ClientPart]:
    """Return what computes the fields that are asked for.

    Raises
    ------
    SiteRefusal
        If the site requires clipping or noise that a field does not have, or the run's
        method needs no such field. The site has agreed to the configuration, and the
        request alone says what is asked for.
    """
    parts = [part_for(name) for name in request.fields]
    if site is None:
        return parts
    needless = set(IMPLIED).difference(implied_fields(config))
    for field in request.fields:
        problems = list(site.policy.field_violations(field, config.privacy))
        if field in needless:
            problems.append(f"the run's configuration asks for no {field}")
        if problems:
            raise SiteRefusal("; ".join(problems))
    return parts


def _views(client: ClientRound) -> ChosenViews | None:
    """Return this round's views if the teacher's logits are to be those of views."""
    config, request = client.config, client.request
    settings = config.distillation
    recipe = ViewRecipe(
        settings.views,
        settings.view_kind,
        config.client.crop_padding,
        settings.view_mix,
    )
    if recipe.number == 0 or request.distillation_weight == 0:
        return None
    teacher, prototypes = _checked_teacher(
        config, client.dataset, request, client.images.device, client.site
    )
    return choose_views(
        client.images,
        recipe,
        config.client.epochs,
        client.random("views"),
        teacher,
        prototypes,
    )


def _add(content: RecordDict, computed: Mapping[str, ArrayRecord | None]) -> None:
    """Add the computed fields to a reply."""
    for field, arrays in computed.items():
        if arrays is not None:
            content[field] = arrays


def _train(
    client: ClientRound,
    teacher_logits: torch.Tensor | None,
    views: ChosenViews | None,
) -> TrainingLosses:
    """Train the model in place, or reuse the stored result of the same training."""
    settings, request = client.config.client, client.request
    strength = settings.logit_adjustment
    objective = LocalObjective(
        distillation_weight=request.distillation_weight,
        distillation_temperature=request.distillation_temperature,
        proximal_mu=request.proximal_mu,
        label_weight=settings.label_weight,
    )
    learning_rate = step_size(
        settings.learning_rate,
        settings.learning_rate_final,
        request.server_round,
        client.config.federation.rounds,
    )
    optimizer = OptimizerSettings(
        name=settings.optimizer,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        # One schedule for all parameters: the ratio of the step sizes stays.
        other_learning_rate=settings.learning_rate_other
        * (learning_rate / settings.learning_rate),
    )
    return train_or_reuse(
        partial(
            train_locally,
            client.model,
            client.images,
            client.labels,
            teacher_logits,
            objective,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            learning_rate=learning_rate,
            crop_padding=settings.crop_padding,
            generator=client.random("batches"),
            offsets=(
                logit_offsets(client.labels, client.num_classes, strength)
                if strength > 0
                else None
            ),
            augment_per_image=settings.augment_per == "image",
            precision=client.precision,
            optimizer=optimizer,
            views=views,
        )
    )


def _released_model(client: ClientRound) -> ArrayRecord:
    """Return the local model, with a bound and noise if the run asks for noise."""
    arrays = messages.model_to_arrays(client.model)
    multiplier = client.config.privacy.model_noise_multiplier
    if multiplier == 0:
        return arrays
    return messages.numpy_to_arrays(
        noisy_local_model(
            messages.arrays_to_numpy(arrays),
            messages.arrays_to_numpy(client.request.model),
            client.config.aggregation.max_update_norm,
            multiplier,
            client.noise_source("model-noise"),
        )
    )


def _metrics(
    client: ClientRound, losses: TrainingLosses, seconds: Mapping[str, float]
) -> MetricRecord:
    return MetricRecord(
        {
            messages.PARTITION: client.request.partition,
            messages.NUM_EXAMPLES: len(client.labels),
            "loss": losses.total,
            "distillation-loss": losses.distillation,
            "unreadable-images": len(client.loaded.unreadable),
            **{f"seconds-{name}": value for name, value in seconds.items()},
        }
    )


def _global_model(
    config: RunConfig,
    dataset: ImageDataset,
    request: TrainRequest,
    device: torch.device,
) -> ImageClassifier:
    model = build_model(
        config.model.name, len(dataset.class_names), config.model.feature_dim
    )
    messages.load_arrays(model, request.model)
    own = model.classifier
    for head, given in request.heads.items():
        for found, expected in zip(given, (own.weight, own.bias), strict=True):
            # A bias of two dimensions would be another one for each image, by which a
            # server could ask for single images.
            if found.shape != expected.shape or found.dtype != expected.dtype:
                raise SiteRefusal(
                    f"the server's {head} classifier has an array of shape "
                    f"{tuple(found.shape)} and type {found.dtype}, but the model's own "
                    f"has {tuple(expected.shape)} and {expected.dtype}"
                )
    model.to(device)
    return model


def _teacher_logits(
    config: RunConfig,
    dataset: ImageDataset,
    images: torch.Tensor,
    request: TrainRequest,
    device: torch.device,
    site: OwnSite | None,
) -> torch.Tensor:
    """Return the teacher's logits [N, C] for un-augmented images, on the CPU."""
    teacher, prototypes = _checked_teacher(config, dataset, request, device, site)
    features = teacher.cached_image_features(images)
    return teacher.logit_scale * features @ prototypes.T


def _checked_teacher(
    config: RunConfig,
    dataset: ImageDataset,
    request: TrainRequest,
    device: torch.device,
    site: OwnSite | None,
) -> tuple[Teacher, torch.Tensor]:
    """Return the teacher that the server expects, and its class prototypes [C, d]."""
    if site is not None:
        site.check_teacher(config.teacher, request.teacher_fingerprint)
    teacher, prototypes = _teacher(config.teacher, dataset.class_names, device)
    _check_teacher(teacher, request.teacher_fingerprint)
    return teacher, prototypes


@lru_cache(maxsize=1)
def _teacher(
    config: TeacherConfig, class_names: tuple[str, ...], device: torch.device
) -> tuple[Teacher, torch.Tensor]:
    """Return the teacher and its class prototypes [C, d], loaded once per process."""
    teacher = load_teacher(
        config.model,
        config.pretrained,
        device,
        prompt=config.prompt,
        batch_size=config.batch_size,
    )
    return teacher, teacher.text_features(class_names)


def _check_teacher(teacher: Teacher, expected: str) -> None:
    if teacher.fingerprint != expected:
        # The name may be a folder of this site, and the server reads this text.
        local = teacher.name.startswith(LOCAL_PREFIX)
        raise OtherTeacherError(
            f"{'the teacher' if local else f'teacher {teacher.name}'} has the "
            f"fingerprint {teacher.fingerprint[:12]} here, but {expected[:12]} at the "
            "server: install the same weights on both"
        )


def _check_code(expected: str) -> None:
    if code_fingerprint() != expected:
        raise OtherCodeError(
            f"the client code in {PACKAGE_ROOT} is not the server's. Flower's local "
            "SuperLink was started in another folder and imports its code: stop it "
            "and run again, or use clip2fl run, which starts one of its own"
        )


def _check_sent(request: TrainRequest) -> None:
    """Raise if the model to begin with, or a classifier, is not finite or no float32.

    It looks at nothing that depends on images. Where values are not finite, clipping
    and noise have no meaning. More digits than the model's own could make an update
    longer where it is rounded.
    """
    model = messages.arrays_to_tensors(request.model)
    tensors = dict(model)
    for head, (weight, bias) in request.heads.items():
        tensors |= {f"{head} weight": weight, f"{head} bias": bias}
    for name, tensor in tensors.items():
        if name in model and tensor.dtype not in (torch.float32, torch.int64):
            raise SiteRefusal(
                f"the server's {name} has the type {tensor.dtype}, not float32"
            )
        if not torch.isfinite(tensor).all():
            raise FloatingPointError(
                f"the server's {name} has values that are not finite"
            )


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Record the seconds that the block takes, under a name."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
