"""FedAvgM against the update rule written out, and BatchNorm kept sane."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import ArrayRecord

from strategy.base import Method
from strategy.fedavg import FedAvg
from strategy.fedavgm import FedAvgM
from tests.strategy.messages import (
    client_plan,
    configure,
    global_model,
    made,
    random_model,
    safeguards,
    train_reply,
)

Arrays = dict[str, npt.NDArray[np.float32]]


def rounds_of(strategy: Method, numbers: Sequence[int]) -> list[Arrays]:
    """Return the global model after each round; clients answer with random models."""
    arrays = global_model()
    results = []
    for server_round in numbers:
        requests = configure(strategy, arrays, server_round)
        replies = [
            train_reply(request, random_model(arrays, 10 * server_round + n), 10 + n)
            for n, request in enumerate(requests)
        ]
        result, _ = strategy.aggregate_train(server_round, replies)
        assert result is not None
        arrays = ArrayRecord(dict(result.items()))
        results.append({name: a.numpy() for name, a in arrays.items()})
    return results


@pytest.mark.parametrize(("momentum", "rate"), [(0.9, 1.0), (0.5, 0.25), (0.0, 0.5)])
def test_weights_follow_the_rule_and_statistics_the_average(
    momentum: float, rate: float
) -> None:
    """Momentum v = m v + (w - average), w = w - rate v; none for statistics."""
    numbers = (1, 2, 3, 4)
    averages = rounds_of(made(FedAvg, client_plan(), **safeguards()), numbers)
    found = rounds_of(
        made(
            FedAvgM,
            client_plan(),
            fedavgm__momentum=momentum,
            fedavgm__learning_rate=rate,
            **safeguards(),
        ),
        numbers,
    )
    weights = {name: a.numpy() for name, a in global_model().items()}
    velocity = {name: np.zeros_like(w) for name, w in weights.items()}
    for average, result in zip(averages, found, strict=True):
        for name in weights:
            kept = 0.0 if "running" in name else momentum
            velocity[name] = kept * velocity[name] + weights[name] - average[name]
            weights[name] = weights[name] - rate * velocity[name]
            np.testing.assert_allclose(result[name], weights[name], atol=1e-5)


def test_neither_momentum_nor_rate_is_fedavg_and_warns(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    strategy = made(
        FedAvgM,
        client_plan(),
        fedavgm__momentum=0.0,
        fedavgm__learning_rate=1.0,
        **safeguards(),
    )
    assert "equivalent to one without server momentum" in flower_log.text
    for plain, result in zip(
        rounds_of(made(FedAvg, client_plan(), **safeguards()), (1, 2)),
        rounds_of(strategy, (1, 2)),
        strict=True,
    ):
        for name in plain:
            np.testing.assert_array_equal(plain[name], result[name])


def test_summary_names_the_settings(flower_log: pytest.LogCaptureFixture) -> None:
    with flower_log.at_level("INFO", logger="flwr"):
        made(
            FedAvgM,
            client_plan(),
            fedavgm__momentum=0.9,
            fedavgm__learning_rate=0.5,
            **safeguards(),
        ).summary()
    assert "Momentum 0.9, learning rate 0.5" in flower_log.text
    assert "Drawn each round: 3 of 4" in flower_log.text
