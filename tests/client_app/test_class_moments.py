"""Class moments of a client: what one image changes, and which images enter."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client_app.class_moments import with_noise
from clip2fl_common.class_moments import (
    COUNT_UNIT,
    SENSITIVITY,
    ClassMoments,
    moment_width,
    noise_deviations,
    shorten_rows,
)
from clip2fl_common.models import MODELS, POOLED_WIDTH, build_model
from clip2fl_common.randomness import seeded_noise
from tests.defaults import run_config


@pytest.mark.parametrize("name", MODELS)
def test_pooled_width_is_the_networks(name: str) -> None:
    with torch.device("meta"):
        assert build_model(name, 2, 4).projection.in_features == POOLED_WIDTH[name]


@pytest.mark.parametrize(("dim", "width"), [(16, 16), (64, 64), (512, 64)])
def test_statistics_are_the_narrower_of_pooled_output_and_features(
    dim: int, width: int
) -> None:
    assert moment_width(run_config(model__feature_dim=dim)) == width


def scaled(statistics: torch.Tensor, labels: torch.Tensor, norm: float) -> torch.Tensor:
    """Return all moments of shortened statistics, in units of their noise."""
    moments = ClassMoments.of(shorten_rows(statistics, norm), labels, 3)
    return torch.cat(
        [
            tensor.flatten() / deviation
            for tensor, deviation in zip(
                moments.named().values(), noise_deviations(1.0, norm), strict=True
            )
        ]
    )


@given(
    norm=st.sampled_from([0.1, 1.0, 7.0]),
    length=st.sampled_from([0.01, 1.0, 100.0, 1e300, math.inf, math.nan]),
    classes=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    seed=st.integers(0, 1000),
)
def test_no_image_changes_more_than_the_noise_is_made_for(
    norm: float, length: float, classes: tuple[int, int], seed: int
) -> None:
    """Whatever replaces it, of the same class or of another."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    other = images.clone()
    other[0] = length * torch.randn(2, generator=generator, dtype=torch.float64)
    labels = torch.tensor([classes[0], 0, 1, 2, 1, 1])
    changed = labels.clone()
    changed[0] = classes[1]
    difference = scaled(images, labels, norm) - scaled(other, changed, norm)
    assert float(difference.norm()) <= 1 + 1e-9


def test_bound_is_reached_by_unit_vectors_at_120_degrees_and_by_other_classes() -> None:
    u = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    v = torch.tensor([[-0.5, math.sqrt(0.75)]], dtype=torch.float64)
    zero, one = torch.tensor([0]), torch.tensor([1])
    same = scaled(u, zero, 1.0) - scaled(v, zero, 1.0)
    across = scaled(u, zero, 1.0) - scaled(u.flip(1), one, 1.0)
    assert float(same.norm()) == pytest.approx(1)
    assert float(across.norm()) == pytest.approx(1)


def test_noise_is_on_absent_classes_too_and_symmetric() -> None:
    privacy = run_config(
        privacy__moment_clip_norm=3.0, privacy__moment_noise_multiplier=0.5
    ).privacy
    nothing = ClassMoments.zeros(500, 60)
    noisy = with_noise(nothing, privacy, seeded_noise(torch.Generator().manual_seed(0)))
    unit = 0.5 * SENSITIVITY
    assert float(noisy.count.std()) == pytest.approx(COUNT_UNIT * unit, rel=0.1)
    assert float(noisy.total.std()) == pytest.approx(3 * unit, rel=0.02)
    assert float(noisy.scatter.diagonal().std()) == pytest.approx(9 * unit, rel=0.3)
    above = noisy.scatter[torch.triu(torch.ones(60, 60), 1) > 0]
    assert float(above.std()) == pytest.approx(9 * unit / math.sqrt(2), rel=0.1)
    assert torch.equal(noisy.scatter, noisy.scatter.T)
