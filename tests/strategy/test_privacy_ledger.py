"""Test the accounting against the exact Gaussian bound, and noise on the update."""

import math
from collections import Counter
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.privacy import NOISE, RELEASES
from clip2fl_cli.comparison import Comparison
from clip2fl_common import messages
from clip2fl_common.config import ConfigError
from clip2fl_common.epsilon import epsilon
from clip2fl_common.messages import GRADIENTS, MOMENTS
from strategy.clients import SimulatedClients
from strategy.fedavg import FedAvg
from strategy.privacy_ledger import PrivacyLedger
from strategy.site_clients import SiteClients
from tests.defaults import ROOT, run_config
from tests.strategy.messages import (
    client_plan,
    configure,
    global_model,
    made,
    random_model,
    safeguards,
    train_reply,
)

DELTA = 1e-5


def exact_epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    """Return epsilon from Balle and Wang's (2018) exact delta of Gaussian releases."""
    mu = math.sqrt(releases) / noise_multiplier
    cumulative = NormalDist().cdf
    low, high = 0.0, 200.0
    for _ in range(100):
        middle = (low + high) / 2
        found = cumulative(mu / 2 - middle / mu) - math.exp(middle) * cumulative(
            -mu / 2 - middle / mu
        )
        low, high = (middle, high) if found > delta else (low, middle)
    return high


def classic_epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    """Return epsilon from Renyi divergence by Mironov's (2017) Prop. 3, best order."""
    rho = releases / (2 * noise_multiplier**2)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


@given(
    noise_multiplier=st.floats(1.0, 20.0),
    releases=st.integers(1, 60),
    delta=st.sampled_from([1e-3, 1e-5, 1e-6]),
)
def test_epsilon_lies_between_the_exact_and_the_classic_bound(
    noise_multiplier: float, releases: int, delta: float
) -> None:
    found = epsilon(noise_multiplier, releases, delta)
    exact = exact_epsilon(noise_multiplier, releases, delta)
    assert exact * (1 - 1e-6) <= found
    # The orders form a grid; if the best order is off the grid, epsilon is some percent
    # larger.
    assert found <= 1.05 * classic_epsilon(noise_multiplier, releases, delta) + 0.01


def test_nothing_released_costs_nothing() -> None:
    assert epsilon(1.0, 0, DELTA) == 0


def test_ledger_tells_the_worst_off() -> None:
    """The client asked three times decides; other clients do not add to it."""
    ledger = PrivacyLedger({"class_gradients": 2.0, "updates": 0.0}, DELTA)
    for client in (3, 1, 3, 2, 3, 1):
        ledger.note(client)
    assert ledger.spent() == {
        "class_gradients": {
            "epsilon_round": epsilon(2.0, 1, DELTA),
            "epsilon_total": epsilon(2.0, 3, DELTA),
            "delta": DELTA,
        }
    }
    again = PrivacyLedger({"class_gradients": 2.0, "updates": 0.0}, DELTA)
    again.load_state(ledger.state())
    again.note(3)
    total = again.spent()["class_gradients"]["epsilon_total"]
    assert total == epsilon(2.0, 4, DELTA)


def test_requests_are_kept_before_they_leave() -> None:
    """A run that ends within a round and is resumed asks again, for another noise."""
    kept: list[dict[int, int]] = []
    ledger = PrivacyLedger({"class_gradients": 2.0}, DELTA)
    ledger.note(1, 2)
    checkpoint = ledger.state()
    ledger.keep = lambda asked: kept.append(dict(asked))
    ledger.note(2, 3)
    assert kept == [{1: 1, 2: 2, 3: 1}]
    resumed = PrivacyLedger({"class_gradients": 2.0}, DELTA)
    resumed.load_state(checkpoint)
    resumed.at_least(kept[-1])
    resumed.note(2)
    total = resumed.spent()["class_gradients"]["epsilon_total"]
    assert total == epsilon(2.0, 3, DELTA)
    assert resumed.state()["privacy-clients"].tolist() == [1, 2, 3]


def test_one_client_moves_the_noisy_mean_as_far_as_the_noise_is_made_for() -> None:
    """Ten short updates, ten long ones, and one that decides which of them is usual."""
    arrays = global_model()
    sent = messages.arrays_to_numpy(arrays)

    def mean_with(last: float) -> npt.NDArray[np.float32]:
        strategy = made(
            FedAvg,
            client_plan(21, 21),
            # So small that the noise is lost in the rounding.
            **safeguards(max_update_norm=0.5, privacy__update_noise_multiplier=1e-9),
        )
        sizes = [0.02] * 10 + [0.5] * 10 + [last]
        replies = []
        for request, size in zip(configure(strategy, arrays), sizes, strict=True):
            moved = {name: values.copy() for name, values in sent.items()}
            moved["0.weight"].flat[0] += size
            replies.append(train_reply(request, moved, 5))
        result, _ = strategy.aggregate_train(1, replies)
        assert result is not None
        found = messages.arrays_to_numpy(result)
        return np.concatenate([(found[n] - sent[n]).ravel() for n in sent])

    moved = np.linalg.norm(mean_with(0.02) - mean_with(0.5))
    assert 0.02 < moved <= 2 * 0.5 / 21


def test_without_noise_nothing_is_claimed_or_kept() -> None:
    ledger = PrivacyLedger.of(run_config().privacy, [GRADIENTS])
    ledger.note(1)
    assert ledger.spent() == {}
    assert ledger.state() == {}


def test_methods_without_class_gradients_claim_nothing_about_them() -> None:
    privacy = run_config(
        privacy__gradient_clip_norm=1.0, privacy__gradient_noise_multiplier=2.0
    ).privacy
    assert PrivacyLedger.of(privacy).spent() == {}
    ledger = PrivacyLedger.of(privacy, [GRADIENTS])
    assert list(ledger.spent()) == ["class_gradients"]


def test_image_in_gradients_and_moments_spends_on_both() -> None:
    """Together they are as one release with the summed squares of 1 / multiplier."""
    privacy = run_config(
        privacy__gradient_clip_norm=1.0,
        privacy__gradient_noise_multiplier=3.0,
        privacy__moment_clip_norm=1.0,
        privacy__moment_noise_multiplier=4.0,
    ).privacy
    ledger = PrivacyLedger.of(privacy, [GRADIENTS, MOMENTS])
    ledger.note(1)
    spent = {name: cost["epsilon_round"] for name, cost in ledger.spent().items()}
    assert spent["class_gradients"] == epsilon(3.0, 1, DELTA)
    assert spent["class_moments"] == epsilon(4.0, 1, DELTA)
    assert spent["images"] == pytest.approx(epsilon(2.4, 1, DELTA))
    assert spent["images"] > max(spent["class_gradients"], spent["class_moments"])
    alone = PrivacyLedger.of(privacy, [MOMENTS])
    assert list(alone.spent()) == ["class_moments"]


def test_noise_on_the_mean_update() -> None:
    """All clients have equal weight; the deviation covers one reversed update."""
    arrays = global_model()

    def aggregated(noise: float, examples: tuple[int, ...]) -> dict[str, np.ndarray]:
        strategy = made(
            FedAvg,
            client_plan(4, 4),
            **safeguards(max_update_norm=0.5, privacy__update_noise_multiplier=noise),
        )
        replies = [
            train_reply(request, random_model(arrays, seed), examples[seed])
            for seed, request in enumerate(configure(strategy, arrays))
        ]
        result, _ = strategy.aggregate_train(1, replies)
        assert result is not None
        spent = strategy.round.privacy
        assert spent == (
            {
                "updates": {
                    "epsilon_round": epsilon(noise, 1, DELTA),
                    "epsilon_total": epsilon(noise, 1, DELTA),
                    "delta": DELTA,
                }
            }
            if noise
            else {}
        )
        return dict(messages.arrays_to_numpy(result))

    plain = aggregated(0.0, (5, 5, 5, 5))
    noisy = aggregated(3.0, (900, 1, 2, 3))
    again = aggregated(3.0, (5, 5, 5, 5))
    differences = []
    for name, values in noisy.items():
        assert values.dtype == plain[name].dtype
        np.testing.assert_array_equal(values, again[name])
        if values.dtype.kind == "f" and not name.endswith("running_var"):
            differences.append((values - plain[name]).ravel())
        elif values.dtype.kind == "f":
            assert values.min() >= 0
        else:
            np.testing.assert_array_equal(values, plain[name])
    found = np.concatenate(differences)
    assert found.std() == pytest.approx(3.0 * 2 * 0.5 / 4, rel=0.15)
    assert len(found) > 100


def test_noise_can_be_repeated_only_where_clients_are_simulated() -> None:
    def drawn(plan: SimulatedClients | SiteClients) -> list[float]:
        numbers: list[float] = plan.noise_source(3)((3,)).tolist()
        return numbers

    simulated, sites = client_plan(), SiteClients(2, 7, 100)
    assert drawn(simulated) == drawn(simulated)
    assert drawn(sites) != drawn(sites)


@pytest.mark.parametrize("target", NOISE)
@pytest.mark.parametrize("what", ["gradients", "moments", "models", "all"])
def test_demo_comparison_has_the_noise_that_it_says(
    what: str, target: int, tmp_path: Path
) -> None:
    """The attack benchmark uses the same multipliers, after 23 releases."""
    comparison = Comparison.read(ROOT / "conf" / "demo-privacy.toml", tmp_path)
    runs = [run for run in comparison.plan if run.variant == f"{what}-{target}"]
    privacy = runs[0].config.privacy
    multipliers = [
        privacy.gradient_noise_multiplier,
        privacy.moment_noise_multiplier,
        privacy.model_noise_multiplier,
    ]
    noises = [z for z in multipliers if z > 0]
    assert len(noises) == (3 if what == "all" else 1)
    together = sum(z**-2 for z in noises) ** -0.5
    assert together == pytest.approx(NOISE[target], rel=1e-3)
    assert target - 0.02 < epsilon(NOISE[target], RELEASES, DELTA) <= target


def test_number_of_releases_is_that_of_the_client_asked_most_often() -> None:
    """In 30 rounds of the demo, over the seeds of its comparison."""
    asked = [
        Counter(
            client
            for server_round in range(1, 31)
            for client in client_plan(10, 5, seed).sample(server_round)
        )
        for seed in (7, 8, 9)
    ]
    assert max(max(times.values()) for times in asked) == RELEASES


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"privacy__gradient_noise_multiplier": 1.0},
            "privacy.gradient-clip-norm = 0 does not bound",
        ),
        (
            {"privacy__moment_noise_multiplier": 1.0},
            "privacy.moment-clip-norm = 0 does not bound",
        ),
        (
            {
                "privacy__moment_noise_multiplier": 1.0,
                "privacy__moment_clip_norm": 1.0,
                "aggregation__rule": "median",
            },
            "needs aggregation.rule = 'mean', but it is 'median'",
        ),
        (
            {"privacy__update_noise_multiplier": 1.0},
            "needs aggregation.rule = 'mean' and aggregation.max-update-norm above 0",
        ),
        (
            {
                "privacy__update_noise_multiplier": 1.0,
                "aggregation__max_update_norm": 1.0,
                "aggregation__rule": "median",
            },
            "needs aggregation.rule = 'mean'",
        ),
    ],
)
def test_noise_without_a_bound_is_refused(
    settings: dict[str, float | str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_config(**settings)


def test_ledger_adds_up_all_that_a_client_sends_with_noise() -> None:
    """By Gaussian composition: inverse squares of the multipliers add up."""
    config = run_config(
        head__delivered="discriminant",
        aggregation__max_update_norm=1.0,
        privacy__gradient_clip_norm=1.0,
        privacy__gradient_noise_multiplier=3.0,
        privacy__moment_clip_norm=1.0,
        privacy__moment_noise_multiplier=4.0,
        privacy__model_noise_multiplier=12.0,
    )
    ledger = PrivacyLedger.of(config.privacy, [GRADIENTS, MOMENTS])
    for _ in range(5):
        ledger.note(1)
    spent = ledger.spent()
    assert set(spent) == {"class_gradients", "class_moments", "models", "images"}
    together = (3**-2 + 4**-2 + 12**-2) ** -0.5
    total = spent["images"]["epsilon_total"]
    assert total == pytest.approx(epsilon(together, 5, DELTA), rel=1e-9)
    assert total > max(
        spent[name]["epsilon_total"]
        for name in ("class_gradients", "class_moments", "models")
    )
    # A method without class gradients and moments spends on its models alone.
    alone = PrivacyLedger.of(config.privacy)
    alone.note(1)
    assert set(alone.spent()) == {"models"}
