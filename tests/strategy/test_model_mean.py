"""Test the combined model against Flower's own strategies."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import FedAvgM as FlowerFedAvgM
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg

from clip2fl_common import messages
from clip2fl_common.config import Scalar
from clip2fl_common.randomness import seeded_noise
from strategy.fedavg import FedAvg
from strategy.fedavgm import FedAvgM
from strategy.model_mean import noisy_model, summed_metrics
from tests.strategy.messages import (
    FakeGrid,
    client_plan,
    configure,
    global_model,
    made,
    random_model,
    safeguards,
    train_reply,
)

EXAMPLES = (10, 3, 25, 7, 9)


def replies_to(requests: Sequence[Message], first_seed: int = 0) -> list[Message]:
    """Return replies of clients with random models."""
    arrays = global_model()
    return [
        train_reply(request, random_model(arrays, first_seed + n), EXAMPLES[n])
        for n, request in enumerate(requests)
    ]


@pytest.mark.parametrize(
    ("rule", "flower"),
    [
        ("mean", FlowerFedAvg()),
        ("median", FedMedian()),
        ("trimmed-mean", FedTrimmedAvg(beta=0.3)),
    ],
)
@pytest.mark.parametrize("clients", [1, 2, 4, 5])
def test_every_rule_is_flowers_to_the_last_bit(
    rule: str, flower: FlowerFedAvg, clients: int
) -> None:
    plan = client_plan(clients, clients)
    strategy = made(FedAvg, plan, **safeguards(rule=rule, trim=0.3))
    requests = configure(strategy, global_model())
    found, _ = strategy.aggregate_train(1, replies_to(requests))
    wanted, _ = flower.aggregate_train(1, replies_to(requests))
    assert found is not None and wanted is not None
    assert {n: a.data for n, a in found.items()} == {
        n: a.data for n, a in wanted.items()
    }


@pytest.mark.parametrize(("momentum", "rate"), [(0.9, 1.0), (0.5, 0.25), (0.0, 0.5)])
def test_momentum_of_weights_is_flowers_to_the_last_bit(
    momentum: float, rate: float
) -> None:
    """BatchNorm's statistics are not compared, since they take no momentum here."""
    changes: dict[str, Scalar] = {
        "fedavgm__momentum": momentum,
        "fedavgm__learning_rate": rate,
        **safeguards(),
    }
    strategy = made(FedAvgM, client_plan(), **changes)
    flower = FlowerFedAvgM(server_momentum=momentum, server_learning_rate=rate)
    model = other = global_model()
    for server_round in (1, 2, 3):
        requests = configure(strategy, model, server_round)
        found, _ = strategy.aggregate_train(
            server_round, replies_to(requests, 10 * server_round)
        )
        flower.configure_train(server_round, other, ConfigRecord(), FakeGrid())
        wanted, _ = flower.aggregate_train(
            server_round, replies_to(requests, 10 * server_round)
        )
        assert found is not None and wanted is not None
        model, other = (ArrayRecord(dict(m.items())) for m in (found, wanted))
        for name, array in wanted.items():
            if "running" not in name:
                assert found[name].data == array.data


def test_noise_comes_before_the_servers_momentum() -> None:
    """So later rounds reveal no more of a round's update than the noise allows."""
    noise: dict[str, Scalar] = safeguards(
        max_update_norm=0.5, privacy__update_noise_multiplier=3.0
    )
    momentum: dict[str, Scalar] = {"fedavgm__momentum": 0.9}
    plain = made(FedAvg, client_plan(), **noise)
    moving = made(FedAvgM, client_plan(), **momentum, **noise)
    arrays = global_model()
    results = []
    for strategy in (plain, moving):
        requests = configure(strategy, arrays)
        result, _ = strategy.aggregate_train(1, replies_to(requests))
        assert result is not None
        results.append(messages.arrays_to_numpy(result))
    noisy, moved = results
    sent = messages.arrays_to_numpy(arrays)
    velocity = moving.state()
    for name in sent:
        np.testing.assert_allclose(noisy[name], moved[name], atol=1e-5)
        if "running" not in name:
            np.testing.assert_allclose(
                velocity[f"momentum.{name}"].numpy(),
                sent[name] - noisy[name],
                atol=1e-6,
            )


def test_noise_leaves_counters_and_variances_valid() -> None:
    model: dict[str, npt.NDArray[Any]] = {
        "weight": np.zeros(10_000, np.float32),
        "running_var": np.full(1000, 0.1, np.float32),
        "count": np.arange(3),
    }
    noisy = noisy_model(model, 2.0, seeded_noise(torch.Generator().manual_seed(0)))
    assert noisy["weight"].std() == pytest.approx(2.0, rel=0.05)
    assert noisy["weight"].dtype == np.float32
    assert noisy["running_var"].min() == 0
    assert noisy["count"] is model["count"]


def test_metrics_are_averaged_or_added_up() -> None:
    metrics = [{"loss": 1.0, "seconds": 2.0}, {"loss": 4.0, "seconds": 3.0}]
    assert summed_metrics(metrics, [30, 10], {"loss"}) == pytest.approx(
        {"loss": 1.75, "seconds": 5.0}
    )
