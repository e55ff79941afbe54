"""Test how much one image can change a class gradient, and the noise that hides it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from client_app.gradients import class_gradients, coded_class_gradients
from client_app.noise import GradientProtection, gradient_protection
from client_app.own_site import OwnSite
from client_app.part import ClientRound
from client_app.site_ledger import SiteLedger
from client_app.site_policy import SitePolicy
from client_app.training import augmented_features
from clip2fl_common import messages
from clip2fl_common.class_gradients import ClassGradient
from clip2fl_common.models import build_model
from clip2fl_common.randomness import Noise, secret_noise, seeded_noise
from tests.defaults import run_config

Vectors = dict[int, torch.Tensor]


def seeded(seed: int) -> Noise:
    """Return noise that can be drawn again."""
    return seeded_noise(torch.Generator().manual_seed(seed))


def vectors(gradients: dict[int, ClassGradient]) -> Vectors:
    """Return each class gradient as one vector."""
    return {
        c: torch.cat([gradient.weight.flatten(), gradient.bias])
        for c, gradient in gradients.items()
    }


def slow_clipped(
    features: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    max_norm: float,
) -> Vectors:
    """Return gradients after differentiating, shortening and averaging each sample."""
    parts: dict[int, list[torch.Tensor]] = {}
    for feature, label in zip(features, labels, strict=True):
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        loss = functional.cross_entropy(functional.linear(feature, w, b), label)
        part = torch.cat([g.flatten() for g in torch.autograd.grad(loss, (w, b))])
        part = part * min(1.0, max_norm / part.norm().item())
        parts.setdefault(int(label), []).append(part)
    return {c: torch.stack(found).mean(0) for c, found in parts.items()}


@given(
    classes=st.integers(2, 5),
    samples=st.integers(1, 8),
    max_norm=st.floats(0.05, 5),
    seed=st.integers(0, 1000),
)
def test_each_sample_is_shortened_by_itself(
    classes: int, samples: int, max_norm: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features, weight, bias = normal(samples, 3), normal(classes, 3), normal(classes)
    labels = torch.randint(classes, (samples,), generator=generator)
    found = vectors(class_gradients(features, labels, weight, bias, max_norm))
    expected = slow_clipped(features, labels, weight, bias, max_norm)
    assert found.keys() == expected.keys()
    for c, vector in expected.items():
        torch.testing.assert_close(found[c], vector)
        assert found[c].norm() <= max_norm * (1 + 1e-9)


@pytest.mark.parametrize("entry", [math.inf, -math.inf, math.nan, 3e19, 1e38])
def test_sample_that_overflows_does_not_reach_the_others(entry: float) -> None:
    """A server could choose the model so that one image overflows, or a part is NaN."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(10, 4, generator=generator)
    weight, bias = torch.randn(3, 4, generator=generator), torch.zeros(3)
    labels = torch.zeros(10, dtype=torch.int64)
    features[3, 1] = entry
    found = vectors(class_gradients(features, labels, weight, bias, 1.0))[0]
    other = torch.arange(10) != 3
    others = vectors(
        class_gradients(features[other], labels[other], weight, bias, 1.0)
    )[0]
    assert torch.isfinite(found).all()
    assert (10 * found - 9 * others).norm() <= 1 + 1e-4


@given(
    images=st.integers(2, 6),
    draws=st.integers(1, 3),
    scale=st.sampled_from([0.01, 1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_no_image_changes_more_than_the_noise_is_made_for(
    images: int, draws: int, scale: float, seed: int
) -> None:
    """Holds for any replacement image and any augmentations."""
    generator = torch.Generator().manual_seed(seed)
    privacy = run_config(
        privacy__min_class_samples=2,
        privacy__gradient_clip_norm=0.7,
        privacy__gradient_noise_multiplier=1.0,
    ).privacy
    protection = gradient_protection(privacy, 32, seeded_noise(generator))
    assert protection is not None

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features, weight, bias = normal(draws, images, 4), normal(3, 4), normal(3)
    other = features.clone()
    other[:, 0] = scale * normal(draws, 4)
    labels = torch.ones(draws * images, dtype=torch.int64)
    first, second = (
        vectors(class_gradients(f.flatten(0, 1), labels, weight, bias, 0.7))[1]
        for f in (features, other)
    )
    # With a noise multiplier of 1, the deviation equals the sensitivity.
    assert (first - second).norm() <= protection.deviation * (1 + 1e-9)


@pytest.mark.parametrize("size", [1e-30, 1e-19, 1.0, 1e19, 1e30])
@pytest.mark.parametrize("margin", [0.0, 52.5, 80.0, 1e4])
def test_no_sent_model_makes_an_image_count_more(size: float, margin: float) -> None:
    """Residuals whose squares are zero in float32, and features that make up for it."""
    generator = torch.Generator().manual_seed(0)
    features = size * torch.randn(6, 8, generator=generator)
    bias = torch.tensor([margin, 0.0, 0.0])
    labels = torch.zeros(6, dtype=torch.int64)
    found = class_gradients(features, labels, torch.zeros(3, 8), bias, 1e-9)
    assert found[0].weight.dtype == torch.float32
    norm = torch.linalg.vector_norm(vectors(found)[0].double())
    assert norm <= 1e-9 * (1 + 1e-6)


def test_noise_has_the_deviation_that_was_asked_for() -> None:
    """Weight and bias of all classes have noise; without noise nothing changes."""
    exact = {
        c: ClassGradient(torch.zeros(100, 512), torch.zeros(100)) for c in range(2)
    }
    noisy = GradientProtection(1.0, 0.3, seeded(0))
    drawn = vectors(noisy.with_noise(exact))
    for vector in drawn.values():
        assert vector.std().item() == pytest.approx(0.3, rel=0.01)
        assert abs(vector.mean().item()) < 0.01
    assert not torch.equal(drawn[0], drawn[1])
    silent = GradientProtection(1.0, 0.0, secret_noise)
    assert silent.with_noise(exact) is exact


@pytest.mark.parametrize(
    ("clip", "noise", "fewest", "samples", "deviation"),
    [(0.5, 3.0, 5, 32, 0.6), (0.5, 0.0, 5, 32, 0.0), (1.0, 1.0, 50, 20, 0.1)],
)
def test_deviation_follows_from_the_smallest_class(
    clip: float, noise: float, fewest: int, samples: int, deviation: float
) -> None:
    """It must not follow a class's number of images, which the noise would reveal."""
    privacy = run_config(
        class_gradients__samples_per_class=fewest,
        privacy__min_class_samples=fewest,
        privacy__gradient_clip_norm=clip,
        privacy__gradient_noise_multiplier=noise,
    ).privacy
    protection = gradient_protection(privacy, samples, secret_noise)
    assert protection is not None
    assert protection.deviation == pytest.approx(deviation)
    assert gradient_protection(run_config().privacy, samples, secret_noise) is None


def test_coded_gradients_are_bounded_and_noisy() -> None:
    features = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 2
    weight, bias = torch.zeros(3, 8), torch.zeros(3)

    def coded(deviation: float) -> Vectors:
        found = coded_class_gradients(
            features,
            labels,
            weight,
            bias,
            min_cosine=1.0,
            precision="full",
            protection=GradientProtection(0.1, deviation, seeded(1)),
        )
        return vectors({c: ClassGradient(g.weight, g.bias) for c, g in found.items()})

    exact, noisy = coded(0.0), coded(0.5)
    noise = seeded(1)((3, 8)).float()
    assert exact.keys() == noisy.keys() == {0, 1}
    assert all(vector.norm() <= 0.1 + 1e-6 for vector in exact.values())
    torch.testing.assert_close(noisy[0][:24] - exact[0][:24], 0.5 * noise.flatten())


@pytest.mark.parametrize(
    ("least", "kept"), [(1, {0, 1, 2}), (3, {1, 2}), (5, {2}), (6, set())]
)
def test_small_classes_send_nothing(least: int, kept: set[int]) -> None:
    """Classes have 2, 4 and 5 images; a client may be left without a class."""
    labels = torch.tensor([0] * 2 + [1] * 4 + [2] * 5)
    model = build_model("resnet8-slim", num_classes=4, feature_dim=16)
    features, drawn = augmented_features(
        model,
        torch.randn(11, 3, 32, 32),
        labels,
        draws=2,
        samples_per_class=3,
        augment=True,
        batch_size=8,
        generator=torch.Generator().manual_seed(0),
        min_class_samples=least,
    )
    assert features.shape == (2 * sum(min(3, (2, 4, 5)[c]) for c in kept), 16)
    assert set(drawn.tolist()) == kept
    assert set(class_gradients(features, drawn, *weights(4, 16))) == kept


def weights(num_classes: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a classifier."""
    return torch.zeros(num_classes, dim), torch.zeros(num_classes)


def test_noise_can_be_repeated_only_where_clients_are_simulated(
    tmp_path: Path,
) -> None:
    """The server knows the run's seed, and could subtract seeded noise."""
    request = messages.TrainRequest(
        model=ArrayRecord(),
        classifier=None,
        server_round=2,
        partition=1,
        stream=1,
        code_fingerprint="",
        teacher_fingerprint="",
        fields=(),
        distillation_weight=0.0,
        distillation_temperature=1.0,
        proximal_mu=0.0,
        heads={},
    )
    site = OwnSite(tmp_path, SitePolicy(), SiteLedger(tmp_path))
    unused = ("dataset", "loaded", "images", "labels", "model")
    nothing: dict[str, Any] = dict.fromkeys(unused)

    def drawn(place: OwnSite | None) -> list[float]:
        noise = ClientRound(
            config=run_config(), request=request, site=place, **nothing
        ).noise_source()
        numbers: list[float] = noise((4,)).tolist()
        return numbers

    assert drawn(None) == drawn(None)
    assert drawn(site) != drawn(site)
