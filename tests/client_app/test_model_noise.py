"""Test bound and noise on a client's model update."""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client_app.model_noise import noisy_local_model
from clip2fl_common.randomness import seeded_noise
from clip2fl_common.updates import bounded_update
from tests.site_node import SiteNode, policy, refusal, site_run

Model = dict[str, npt.NDArray[np.float32]]


def models(length: float, seed: int = 0) -> tuple[Model, Model]:
    """Return a model after and before training, apart by a length."""
    rng = np.random.default_rng(seed)
    sent = {
        "weight": rng.normal(size=(60, 50)).astype(np.float32),
        "running_var": np.full(40, 1e3, np.float32),
    }
    moved = {name: rng.normal(size=values.shape) for name, values in sent.items()}
    norm = math.sqrt(sum(float(np.square(part).sum()) for part in moved.values()))
    local = {
        name: (sent[name] + part * length / norm).astype(np.float32)
        for name, part in moved.items()
    }
    return local, sent


def norm_of(update: dict[str, npt.NDArray[np.float64]]) -> float:
    return float(np.linalg.norm(np.concatenate([u.ravel() for u in update.values()])))


@given(length=st.floats(0.01, 100), max_norm=st.floats(0.01, 100))
def test_update_is_as_long_as_allowed_and_keeps_its_direction(
    length: float, max_norm: float
) -> None:
    local, sent = models(length)
    free, bounded = (
        bounded_update(local, sent, 0),
        bounded_update(local, sent, max_norm),
    )
    expected = min(norm_of(free), max_norm)
    assert norm_of(bounded) == pytest.approx(expected, rel=1e-9)
    for name, part in free.items():
        assert np.allclose(bounded[name] * norm_of(free), part * expected, rtol=1e-9)


@pytest.mark.parametrize(("max_norm", "multiplier"), [(0.5, 1.0), (2.0, 0.25)])
def test_noise_has_twice_the_norm_times_the_multiplier(
    max_norm: float, multiplier: float
) -> None:
    """On every value, around the bounded update: 200 draws of 3,040 values."""
    local, sent = models(10.0)
    noise = seeded_noise(torch.Generator().manual_seed(1))
    drawn = [
        noisy_local_model(local, sent, max_norm, multiplier, noise) for _ in range(200)
    ]
    exact = bounded_update(local, sent, max_norm)
    for name in sent:
        values = np.stack([model[name] - sent[name] for model in drawn]).astype(float)
        assert drawn[0][name].dtype == np.float32
        deviation = multiplier * 2 * max_norm
        assert values.std() == pytest.approx(deviation, rel=0.03)
        error = (values.mean(0) - exact[name]) / (deviation / math.sqrt(len(drawn)))
        assert np.abs(error).max() < 5.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["sent", "local", "both"])
def test_value_that_is_not_finite_does_not_switch_the_bound_off(
    value: float, where: str
) -> None:
    """No other value then depends on the images."""
    local, sent = models(100.0)
    for name, model in {"sent": sent, "local": local}.items():
        if where in (name, "both"):
            model["running_var"][0] = value
    noise = seeded_noise(torch.Generator().manual_seed(1))
    noisy = noisy_local_model(local, sent, 0.01, 1e-9, noise)
    assert np.allclose(noisy["weight"], sent["weight"], atol=1e-6)
    assert np.allclose(noisy["running_var"][1:], sent["running_var"][1:], atol=1e-3)
    for part in bounded_update(local, sent, 0.01).values():
        assert np.isnan(part).all()


def test_variances_stay_possible() -> None:
    local, sent = models(1.0)
    sent["running_var"][:] = local["running_var"][:] = 0.0
    noise = seeded_noise(torch.Generator().manual_seed(1))
    noisy = noisy_local_model(local, sent, 1.0, 1.0, noise)
    assert noisy["running_var"].min() == 0 < noisy["running_var"].max()
    assert noisy["weight"].min() < 0


@pytest.mark.usefixtures("federation_process")
def test_site_demands_noise_on_its_model(tmp_path: Path) -> None:
    node = SiteNode(tmp_path, policy(tmp_path, min_model_noise_multiplier=0.5))
    assert "min-model-noise-multiplier is 0.5" in refusal(node.ask("query", site_run()))
    run = site_run(
        privacy__model_noise_multiplier=0.4, aggregation__max_update_norm=1.0
    )
    assert refusal(node.ask("train", run)) == (
        "the run has privacy.model-noise-multiplier = 0.4, and the site's "
        "min-model-noise-multiplier is 0.5"
    )


def test_rounding_of_what_was_sent_does_not_make_an_update_longer() -> None:
    """The server chooses numbers that are a little less than twice the norm apart."""
    sent = {"weight": np.array([1.5 * 2**23])}
    distance = float(np.spacing(sent["weight"][0]))
    longest = 0.51 * distance
    drawn: dict[int, list[float]] = {1: [], -1: []}
    for sign, found in drawn.items():
        local = {"weight": sent["weight"] + sign * distance}
        noise = seeded_noise(torch.Generator().manual_seed(3))
        for _ in range(4000):
            noisy = noisy_local_model(local, sent, longest, 0.5, noise)
            found.append(float(noisy["weight"][0] - sent["weight"][0]))
    moved = (np.mean(drawn[1]) - np.mean(drawn[-1])) / longest
    assert moved == pytest.approx(2, rel=0.05)
