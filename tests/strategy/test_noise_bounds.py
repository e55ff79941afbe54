"""Replies with noise: the client's own noise is never too long, and lies are."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client_app.class_moments import with_noise
from client_app.gradients import class_gradients
from client_app.model_noise import noisy_local_model
from client_app.noise import gradient_protection
from clip2fl_common import messages
from clip2fl_common.class_gradients import ClassGradient
from clip2fl_common.class_moments import ClassMoments, moment_width, shorten_rows
from clip2fl_common.config import Scalar
from clip2fl_common.messages import TrainReply
from clip2fl_common.randomness import seeded_noise
from strategy.noise_bounds import NoiseBounds
from strategy.robust import Arrays
from tests.defaults import run_config

CLASSES, DIM, IMAGES = 4, 16, 30
SETTINGS: dict[str, Scalar] = {
    "method": "clip2fl",
    "model__feature_dim": DIM,
    "head__delivered": "discriminant",
    "aggregation__max_update_norm": 0.5,
    "privacy__model_noise_multiplier": 0.7,
    "privacy__gradient_clip_norm": 2.0,
    "privacy__gradient_noise_multiplier": 0.3,
    "privacy__min_class_samples": 3,
    "privacy__moment_clip_norm": 10.0,
    "privacy__moment_noise_multiplier": 2.0,
}
SENT: Arrays = {
    "weight": np.ones((30, 20), np.float32),
    "running_var": np.full(9, 1e-3, np.float32),
}


def reply(seed: int, members: int = 1, **changes: Scalar) -> tuple[TrainReply, str]:
    """Return a reply made as a client makes it, and the objection to it.

    Parameters
    ----------
    seed : int
        Of images, training and noise.
    members : int
        Clients whose moments are summed.
    changes : scalar
        Keys of the configuration that the server has.
    """
    config = run_config(**SETTINGS)
    privacy, gradients = config.privacy, config.class_gradients
    source = torch.Generator().manual_seed(seed)
    features = 30 * torch.randn(IMAGES, DIM, generator=source)
    labels = torch.arange(IMAGES) % CLASSES
    local = {
        name: (
            values + 5 * np.random.default_rng(seed).normal(size=values.shape)
        ).astype(np.float32)
        for name, values in SENT.items()
    }
    noise = seeded_noise(source)
    protection = gradient_protection(privacy, gradients.samples_per_class, noise)
    assert protection is not None
    weight = torch.randn(CLASSES, DIM, generator=source)
    exact = class_gradients(features, labels, weight, torch.zeros(CLASSES), 2.0)
    width = moment_width(config)
    summed = ClassMoments.zeros(CLASSES, width)
    for _ in range(members):
        own = ClassMoments.of(shorten_rows(features[:, :width], 10.0), labels, CLASSES)
        summed = summed.plus(with_noise(own, privacy, noise))
    fields = [
        messages.reply_field(name, config, CLASSES)
        for name in (messages.GRADIENTS, messages.MOMENTS)
    ]
    made = TrainReply(
        node=0,
        client=0,
        images=IMAGES * members,
        model=noisy_local_model(local, SENT, 0.5, 0.7, noise),
        metrics={},
        upload_bytes=0,
        field_bytes=0,
        fields={
            messages.GRADIENTS: protection.with_noise(exact),
            messages.MOMENTS: summed.named(),
        },
        members=tuple(range(members)),
    )
    bounds = NoiseBounds(run_config(**{**SETTINGS, **changes}), fields)
    return made, bounds.objection(made, SENT)


@given(seed=st.integers(0, 10_000), members=st.integers(1, 5))
def test_noise_of_honest_clients_is_allowed(seed: int, members: int) -> None:
    assert reply(seed, members)[1] == ""


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("privacy__model_noise_multiplier", 0.1, "the model's update"),
        ("privacy__gradient_noise_multiplier", 0.01, "the class gradient of class 0"),
        ("privacy__moment_noise_multiplier", 0.05, "the scatter of the class moments"),
    ],
)
def test_more_noise_than_agreed_is_not(key: str, value: float, part: str) -> None:
    """So the bounds are not far above the noise of these clients."""
    changes: dict[str, Scalar] = {key: value}
    assert reply(1, 1, **changes)[1].startswith(f"{part} has the norm ")


@pytest.mark.parametrize("name", ["count", "total", "scatter"])
def test_counts_and_sums_beyond_all_images_are_not(name: str) -> None:
    made, _ = reply(1)
    moments = made.fields[messages.MOMENTS]
    assert isinstance(moments, dict)
    moments[name][...] = -1e12
    config = run_config(**SETTINGS)
    fields = [messages.reply_field(messages.MOMENTS, config, CLASSES)]
    objection = NoiseBounds(config, fields).objection(made, SENT)
    assert objection.startswith(f"the {name} of the class moments has the norm ")


def test_without_noise_nothing_is_bounded() -> None:
    made, _ = reply(1)
    gradients = made.fields[messages.GRADIENTS]
    assert isinstance(gradients, dict)
    gradients[0] = ClassGradient(*(1e6 * part for part in gradients[0]))
    config = run_config(model__feature_dim=DIM)
    fields = [messages.reply_field(messages.GRADIENTS, config, CLASSES)]
    assert NoiseBounds(config, fields).objection(made, SENT) == ""
