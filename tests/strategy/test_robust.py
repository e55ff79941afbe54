"""Test rules of aggregation and bounds against slow versions and their guarantees."""

import itertools
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_common.class_gradients import ClassGradient, CodedGradient, LowRankGradient
from clip2fl_common.config import Aggregation
from strategy.fedavg import FedAvg
from strategy.gradient_mean import mean_class_gradients
from strategy.robust import (
    combine_class_gradients,
    gradient_norm,
    shorten_gradient,
    shorten_update,
    trimmed_mean,
)
from tests.defaults import run_config
from tests.strategy.messages import (
    client_plan,
    configure,
    global_model,
    made,
    random_gradients,
    random_model,
    safeguards,
    train_reply,
)

SHAPE = (3, 4)
EXAMPLES = [10, 3, 25, 7, 9]


def aggregation(**settings: Any) -> Aggregation:
    """Return the settings of an aggregation."""
    return run_config(**safeguards(**settings)).aggregation


def aggregated(clients: int = 5, **settings: Any) -> tuple[FedAvg, ArrayRecord]:
    """Return a strategy and its model after a round of clients with random models."""
    arrays = global_model()
    strategy = made(FedAvg, client_plan(clients, clients), **safeguards(**settings))
    replies = [
        train_reply(request, random_model(arrays, seed), EXAMPLES[seed])
        for seed, request in enumerate(configure(strategy, arrays))
    ]
    result, _ = strategy.aggregate_train(1, replies)
    assert result is not None
    return strategy, result


def slow_rule(rule: str, trim: float, values: list[float]) -> float:
    """Return the median or the trimmed mean of numbers."""
    if rule == "median":
        return statistics.median(values)
    cut = int(trim * len(values))
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


@pytest.mark.parametrize("clients", [1, 2, 4, 5])
@pytest.mark.parametrize(("rule", "trim"), [("median", 0.2), ("trimmed-mean", 0.25)])
def test_models_are_put_together_coordinate_by_coordinate(
    rule: str, trim: float, clients: int
) -> None:
    _, result = aggregated(clients, rule=rule, trim=trim)
    arrays = global_model()
    models = [random_model(arrays, seed) for seed in range(clients)]
    for name, array in result.items():
        values = array.numpy()
        assert values.dtype == np.float32 and values.shape == arrays[name].shape
        for place in np.ndindex(values.shape):
            expected = slow_rule(rule, trim, [float(m[name][place]) for m in models])
            assert values[place] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("rule", "trim"), [("median", 0.2), ("trimmed-mean", 0.34)])
def test_class_gradients_are_put_together_by_the_same_rule(
    rule: str, trim: float
) -> None:
    """Only clients that hold the class take part, low-rank gradients among them."""
    held = [[0, 1], [1], [2, 1], [1, 2], [1]]
    replies: list[dict[int, CodedGradient]] = [
        dict(random_gradients(classes, SHAPE, seed))
        for seed, classes in enumerate(held)
    ]
    replies[1][1] = LowRankGradient(
        torch.randn(3, 1), torch.randn(1, 4), torch.randn(3)
    )
    combined = combine_class_gradients(replies, aggregation(rule=rule, trim=trim))
    assert list(combined) == [0, 1, 2]
    for c, gradient in combined.items():
        of_class = [reply[c] for reply in replies if c in reply]
        for part in ("weight", "bias"):
            values = getattr(gradient, part)
            for place in np.ndindex(tuple(values.shape)):
                own = [float(getattr(g, part)[place]) for g in of_class]
                expected = slow_rule(rule, trim, own)
                assert float(values[place]) == pytest.approx(expected, abs=1e-6)


def test_mean_of_class_gradients_is_the_streamed_one() -> None:
    replies = [random_gradients([0, 2], SHAPE, seed) for seed in range(3)]
    mean = mean_class_gradients(replies)
    combined = combine_class_gradients(iter(replies), aggregation())
    assert list(combined) == list(mean)
    assert all(torch.equal(combined[c].weight, mean[c].weight) for c in mean)


@given(
    scale=st.floats(1e-3, 1e6),
    bound=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
def test_update_is_shortened_to_the_bound_and_keeps_its_direction(
    scale: float, bound: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    sent = {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=4)}
    reference = {n: v.astype(np.float32) for n, v in sent.items()}
    local = {
        n: (v + scale * rng.normal(size=v.shape)).astype(np.float32)
        for n, v in reference.items()
    }

    def flat(model: dict[str, Any]) -> Any:
        return np.concatenate(
            [model[n].astype(np.float64).ravel() - reference[n].ravel() for n in "ab"]
        )

    update = flat(local)
    norm = np.linalg.norm(update)
    shortened = shorten_update(local, reference, bound)
    if norm <= bound:
        assert shortened is None
        return
    assert shortened is not None
    assert all(v.dtype == np.float32 for v in shortened.values())
    np.testing.assert_allclose(
        flat(shortened), update * bound / norm, atol=1e-6 * bound + 1e-6
    )


def test_model_that_did_not_move_is_no_obstacle() -> None:
    model = {"a": np.ones(3, np.float32)}
    assert shorten_update(model, model, 1.0) is None


def test_one_client_moves_the_mean_no_further_than_its_share_of_the_bound() -> None:
    arrays = global_model()
    bound, far = 0.5, 1e6
    strategy = made(
        FedAvg,
        client_plan(4, 4),
        **safeguards(max_update_norm=bound, max_length_ratio=0.0),
    )
    requests = configure(strategy, arrays)
    sent = {name: array.numpy() for name, array in arrays.items()}
    models = [sent, sent, sent, {n: v + np.float32(far) for n, v in sent.items()}]
    result, _ = strategy.aggregate_train(
        1, [train_reply(r, m, 10) for r, m in zip(requests, models, strict=True)]
    )
    assert result is not None
    moved = np.sqrt(
        sum(
            np.square(a.numpy().astype(float) - sent[n]).sum()
            for n, a in result.items()
        )
    )
    assert moved == pytest.approx(bound / 4, rel=1e-4)
    assert strategy.round.shortened_updates == 1


def test_bound_that_is_not_reached_changes_no_bit() -> None:
    free, one = aggregated()
    bounded, other = aggregated(max_update_norm=1e6)
    assert {n: a.data for n, a in one.items()} == {n: a.data for n, a in other.items()}
    assert free.round.shortened_updates == bounded.round.shortened_updates == 0


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_gradients_norm_and_shortening(rank: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(3, rank or 1, generator=generator)
    right = torch.randn(rank or 1, 4, generator=generator)
    bias = torch.randn(3, generator=generator)
    gradient: CodedGradient = (
        LowRankGradient(left, right, bias)
        if rank
        else ClassGradient(left @ right, bias)
    )
    exact = torch.cat([(left @ right).flatten(), bias]).double()
    assert gradient_norm(gradient) == pytest.approx(float(exact.norm()), rel=1e-6)
    assert shorten_gradient(gradient, float(exact.norm()) * 1.001) is None
    shorter = shorten_gradient(gradient, 0.25)
    assert shorter is not None and type(shorter) is type(gradient)
    flat = torch.cat([shorter.weight.flatten(), shorter.bias]).double()
    torch.testing.assert_close(flat, exact * 0.25 / exact.norm(), atol=1e-6, rtol=1e-5)


def test_gradient_of_zero_is_no_obstacle() -> None:
    assert (
        shorten_gradient(ClassGradient(torch.zeros(3, 4), torch.zeros(3)), 1.0) is None
    )


def test_summary_names_rule_and_bounds(flower_log: pytest.LogCaptureFixture) -> None:
    with flower_log.at_level("INFO", logger="flwr"):
        made(
            FedAvg,
            client_plan(),
            **safeguards(2, rule="median", max_update_norm=3.5, max_gradient_norm=0.5),
        ).summary()
    assert "Rule: median, trim 0.2" in flower_log.text
    assert "Norms allowed (0: any): update 3.5, class gradient 0.5" in flower_log.text
    assert "Good replies a round needs: 2" in flower_log.text


def test_one_of_three_is_trimmed_where_replies_are_missing() -> None:
    """0.2 of four values is less than one; 1/3 in six digits is less than a third."""
    for trim, count in ((0.2, 5), (0.2, 4), (0.2, 3), (0.333333, 3), (0.01, 9)):
        values = np.array([0.0] * (count - 1) + [100.0])
        assert trimmed_mean(values, trim) == 0
    assert trimmed_mean(np.array([0.0, 100.0]), 0.2) == 50
    assert trimmed_mean(np.array([0.0, 0.0, 99.0]), 0.0) == 33
    values = np.arange(20.0) ** 2
    for trim in (0.05, 0.1, 0.25, 0.45):
        expected = slow_rule("trimmed-mean", trim, values.tolist())
        assert trimmed_mean(values, trim) == pytest.approx(expected)


@pytest.mark.parametrize(("clients", "warns"), [(2, True), (3, False), (4, False)])
def test_trimmed_mean_that_trims_nobody_warns(
    flower_log: pytest.LogCaptureFixture, clients: int, warns: bool
) -> None:
    settings = safeguards(rule="trimmed-mean", trim=0.2)
    made(FedAvg, client_plan(clients, clients), **settings).summary()
    said = "aggregation.trim = 0.2 of 2 clients a round drops no client"
    assert (said in flower_log.text) == warns


def test_order_of_replies_changes_no_bit() -> None:
    arrays = global_model()
    for rule in ("median", "trimmed-mean"):
        outcomes = set()
        for order in itertools.permutations(range(3)):
            strategy = made(FedAvg, client_plan(3, 3), **safeguards(rule=rule))
            requests = configure(strategy, arrays)
            replies = [
                train_reply(requests[i], random_model(arrays, i), 10) for i in order
            ]
            result, _ = strategy.aggregate_train(1, replies)
            assert result is not None
            outcomes.add(tuple(array.data for array in result.values()))
        assert len(outcomes) == 1
