"""Flower ClientApp: answers queries about the node, trains and evaluates."""

import time
from collections.abc import Callable
from functools import lru_cache, partial
from logging import getLogger
from typing import cast

import torch
from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client_app.gradients import coded_class_gradients
from client_app.images import (
    OtherCodeError,
    SiteError,
    gradient_images,
    names_kept_here,
    training_images,
    validation_images,
)
from client_app.noise import gradient_protection
from client_app.own_site import OwnSite, data_folder
from client_app.shared_training import train_or_recall
from client_app.site_evaluation import recalls
from client_app.site_ledger import Kind
from client_app.site_policy import SiteRefusal, is_real_site
from client_app.training import (
    LocalObjective,
    PixelImages,
    augmented_features,
    logit_offsets,
    train_locally,
)
from clip2fl_common import messages
from clip2fl_common.config import SITES, RunConfig, TeacherConfig
from clip2fl_common.data.datasets import DatasetError, ImageDataset, open_site
from clip2fl_common.devices import resolve_device, to_device_if_small
from clip2fl_common.metrics import FEDAVG_HEAD, RETRAINED_HEAD, TEACHER_HEAD
from clip2fl_common.models import ImageClassifier, build_model
from clip2fl_common.provenance import PACKAGE_ROOT, code_fingerprint
from clip2fl_common.randomness import generator, secret_generator
from clip2fl_common.schedule import step_size
from clip2fl_common.site_names import NAME_RULE, is_site_name
from clip2fl_common.teacher import OtherTeacherError, Teacher, load_teacher

logger = getLogger(__name__)

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say which simulated partition, or which site, this node is."""

    def answer(config: RunConfig, site: OwnSite | None) -> RecordDict:
        if site is not None:
            name = _site_name(context)
            open_site(config.dataset, site.folder)
            return messages.site_reply(name)
        place = MetricRecord(
            {messages.PARTITION: cast(int, context.node_config["partition-id"])}
        )
        return RecordDict({messages.METRICS: place})

    return _answer(message, context, "query", answer)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Compute class gradients and train the global model on this client's images."""

    def answer(config: RunConfig, site: OwnSite | None) -> RecordDict:
        request = messages.TrainRequest.parse(message.content)
        return _train(config, request, site)

    return _answer(message, context, "train", answer)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Say how well each classifier does on a site's validation images."""

    def answer(config: RunConfig, site: OwnSite | None) -> RecordDict:
        request = messages.TrainRequest.parse(message.content)
        return _evaluate(config, request, site)

    return _answer(message, context, "evaluate", answer)


def _answer(
    message: Message,
    context: Context,
    kind: Kind,
    answer: Callable[[RunConfig, OwnSite | None], RecordDict],
) -> Message:
    """Return what a handler answers, within the site's own rules."""
    try:
        with names_kept_here(context.node_config):
            site = OwnSite.of(context.node_config)
            config = RunConfig.from_run_config(context.run_config)
            if site is not None:
                config = site.admit(
                    config,
                    kind=kind,
                    run=str(context.run_id),
                    request_bytes=messages.message_bytes(message.content),
                )
            elif config.dataset.name == SITES:
                data_folder(context.node_config)  # says that there is none
            content = answer(config, site)
            if site is not None:
                site.check_reply(messages.message_bytes(content))
            return Message(content, reply_to=message)
    except SiteRefusal as refusal:
        logger.error("run %d, %s: %s", context.run_id, kind, refusal)
        error = Error(messages.SITE_REFUSES, refusal.sent)
    except DatasetError as found:
        logger.error("run %d, %s: %s", context.run_id, kind, found)
        told = f"{type(found).__name__}: {found}"
        if is_real_site(context.node_config):
            told = found.summary
        error = Error(messages.DATA_ERROR, told)
    except FloatingPointError as diverged:
        # By this code the server sees whether the model that it sent is at fault.
        error = Error(messages.DIVERGED, messages.plain(diverged))
    return Message(error, reply_to=message)


def _train(
    config: RunConfig, request: messages.TrainRequest, site: OwnSite | None
) -> RecordDict:
    _check_code(request.code_fingerprint)
    device = resolve_device(config.device)
    precision: torch.dtype = getattr(torch, config.client.precision)
    clock = _Stopwatch()

    dataset, loaded = training_images(config, site, request.partition)
    images = PixelImages(
        to_device_if_small(loaded.images, device), dataset.normalization, device
    )
    labels = loaded.labels.to(device)
    objective = LocalObjective(
        distillation_weight=request.distillation_weight,
        distillation_temperature=request.distillation_temperature,
        proximal_mu=request.proximal_mu,
    )
    teacher_logits = None
    if objective.distillation_weight > 0:
        teacher_logits = _teacher_logits(
            config, dataset, loaded.images, request, device, site
        ).to(device)
    clock.lap("data")

    model = _global_model(config, dataset, request, device)
    reply = RecordDict()
    if request.classifier is not None:
        features, drawn = augmented_features(
            model,
            images,
            labels,
            draws=config.class_gradients.draws,
            samples_per_class=config.class_gradients.samples_per_class,
            augment=config.class_gradients.augment,
            batch_size=config.evaluation.batch_size,
            generator=generator(
                config.seed, "augmentation", request.server_round, request.stream
            ),
            precision=precision,
            min_class_samples=config.privacy.min_class_samples,
            fixed=gradient_images(config, site, dataset, loaded),
        )
        gradients = coded_class_gradients(
            features,
            drawn,
            *(tensor.to(device) for tensor in request.classifier),
            min_cosine=config.upload.min_cosine,
            precision=config.upload.precision,
            protection=gradient_protection(
                config.privacy,
                config.class_gradients.samples_per_class,
                _noise_source(config, request, site),
            ),
        )
        reply[messages.GRADIENTS] = messages.gradients_to_arrays(
            gradients,
            config.upload.precision,
            (len(dataset.class_names), config.model.feature_dim),
        )
    clock.lap("gradients")

    strength = config.client.logit_adjustment
    losses = train_or_recall(
        partial(
            train_locally,
            model,
            images,
            labels,
            teacher_logits,
            objective,
            epochs=config.client.epochs,
            batch_size=config.client.batch_size,
            learning_rate=step_size(
                config.client.learning_rate,
                config.client.learning_rate_final,
                request.server_round,
                config.federation.rounds,
            ),
            crop_padding=config.client.crop_padding,
            generator=generator(
                config.seed, "batches", request.server_round, request.stream
            ),
            offsets=(
                logit_offsets(labels, len(dataset.class_names), strength)
                if strength > 0
                else None
            ),
            augment_per_image=config.client.augment_per == "image",
            precision=precision,
        )
    )
    clock.lap("training")
    reply[messages.ARRAYS] = messages.model_to_arrays(model)
    reply[messages.METRICS] = MetricRecord(
        {
            messages.PARTITION: request.partition,
            messages.NUM_EXAMPLES: len(labels),
            "loss": losses.total,
            "distillation-loss": losses.distillation,
            "unreadable-images": len(loaded.unreadable),
            **{f"seconds-{name}": value for name, value in clock.laps.items()},
        }
    )
    return reply


def _noise_source(
    config: RunConfig, request: messages.TrainRequest, site: OwnSite | None
) -> torch.Generator:
    """Return the source of noise: the run's seed only where clients are simulated."""
    if site is not None:
        return secret_generator()
    return generator(config.seed, "privacy", request.server_round, request.stream)


def _evaluate(
    config: RunConfig, request: messages.TrainRequest, site: OwnSite | None
) -> RecordDict:
    _check_code(request.code_fingerprint)
    device = resolve_device(config.device)
    dataset, loaded = validation_images(config, site)
    model = _global_model(config, dataset, request, device)
    own = model.classifier
    classifiers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
        FEDAVG_HEAD: (own.weight, own.bias)
    }
    if request.classifier is not None:
        weight, bias = (tensor.to(device) for tensor in request.classifier)
        classifiers[RETRAINED_HEAD] = (weight, bias)
    teacher_logits = {}
    if request.teacher_fingerprint:
        teacher_logits[TEACHER_HEAD] = _teacher_logits(
            config, dataset, loaded.images, request, device, site
        )
    found = recalls(
        model,
        PixelImages(loaded.images, dataset.normalization, device),
        loaded.labels,
        classifiers,
        teacher_logits,
        config.evaluation.batch_size,
    )
    return messages.recall_reply(len(loaded.labels), found)


def _site_name(context: Context) -> str:
    """Return what the site calls itself; empty where it was given no name.

    A server with a registry of sites knows the name then.
    """
    name = context.node_config.get("site")
    if name is None:
        return ""
    if not is_site_name(name):
        raise SiteError(f"site in the node's --node-config must be {NAME_RULE}")
    return name


def _global_model(
    config: RunConfig,
    dataset: ImageDataset,
    request: messages.TrainRequest,
    device: torch.device,
) -> ImageClassifier:
    model = build_model(
        config.model.name, len(dataset.class_names), config.model.feature_dim
    )
    messages.load_arrays(model, request.model)
    model.to(device)
    return model


def _teacher_logits(
    config: RunConfig,
    dataset: ImageDataset,
    images: torch.Tensor,
    request: messages.TrainRequest,
    device: torch.device,
    site: OwnSite | None,
) -> torch.Tensor:
    """Return the teacher's logits [N, C] of un-augmented images, on the CPU."""
    if site is not None:
        site.check_teacher(config.teacher, request.teacher_fingerprint)
    teacher, prototypes = _teacher(config.teacher, dataset.class_names, device)
    _check_teacher(teacher, request.teacher_fingerprint)
    features = teacher.cached_image_features(images)
    return teacher.logit_scale * features @ prototypes.T


@lru_cache(maxsize=1)
def _teacher(
    config: TeacherConfig, class_names: tuple[str, ...], device: torch.device
) -> tuple[Teacher, torch.Tensor]:
    """Return the teacher and its class prototypes [C, d], once a process."""
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
        raise OtherTeacherError(
            f"teacher {teacher.name} has the fingerprint {teacher.fingerprint[:12]} "
            f"here, but {expected[:12]} at the server: install the same weights on both"
        )


def _check_code(expected: str) -> None:
    if code_fingerprint() != expected:
        raise OtherCodeError(
            f"the client code in {PACKAGE_ROOT} is not the server's. Flower's local "
            "SuperLink was started in another folder and imports its code: stop it "
            "and run again, or use clip2fl run, which starts one of its own"
        )


class _Stopwatch:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under ``name``."""
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
