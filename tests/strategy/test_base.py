"""Test sampling, checks of replies and aggregation against slow versions."""

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import Array, ArrayRecord, Message
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from clip2fl_common import messages
from clip2fl_common.data.datasets import DatasetError
from clip2fl_common.provenance import code_fingerprint
from strategy.fedavg import FedAvg
from strategy.safeguards import NoRepliesError
from tests.strategy.messages import (
    client_plan,
    configure,
    error_reply,
    global_model,
    made,
    random_model,
    safeguards,
    train_reply,
    wire_bytes,
)


def test_sampling_is_pinned() -> None:
    """If this sample changes, all runs of a given seed give other results."""
    plan = client_plan(clients=10, per_round=5, seed=7)
    assert [plan.sample(r) for r in (1, 2, 3)] == [
        [2, 4, 6, 8, 9],
        [0, 4, 5, 6, 7],
        [4, 5, 7, 8, 9],
    ]


def test_sampling_is_ascending_without_replacement_and_even() -> None:
    plan = client_plan(clients=10, per_round=4)
    drawn = [plan.sample(r) for r in range(1, 501)]
    assert all(clients == sorted(set(clients)) for clients in drawn)
    assert all(len(clients) == 4 for clients in drawn)
    times = np.bincount(list(itertools.chain(*drawn)), minlength=10)
    # 500 * 4 / 10 = 200 each; five standard deviations are 55.
    assert len(times) == 10 and abs(times - 200).max() < 55


def test_sampling_depends_on_seed_and_round_only() -> None:
    plan = client_plan(clients=100, per_round=20)
    other_nodes = client_plan(clients=100, per_round=20, nodes=(5, 6, 7))
    other_seed = client_plan(clients=100, per_round=20, seed=8)
    later_first = [plan.sample(r) for r in (3, 2, 1)]
    assert [plan.sample(r) for r in (1, 2, 3)] == later_first[::-1]
    assert other_nodes.sample(1) == plan.sample(1)
    assert other_seed.sample(1) != plan.sample(1)
    assert plan.sample(2) != plan.sample(1)


def test_all_clients_can_train() -> None:
    assert client_plan(clients=4, per_round=4).sample(9) == [0, 1, 2, 3]


@pytest.mark.parametrize("nodes", [(71, 13), (8, 900, 15, 2, 77)])
def test_requests_name_partition_code_and_round(nodes: tuple[int, ...]) -> None:
    """If two or five nodes simulate ten clients, a node gets one message per client."""
    plan = client_plan(clients=10, per_round=10, nodes=nodes)
    arrays = global_model()
    requests = configure(made(FedAvg, plan, **safeguards()), arrays, server_round=4)
    configs = [r.content.config_records[messages.CONFIG] for r in requests]
    assert [c[messages.PARTITION] for c in configs] == list(range(10))
    assert {c[messages.ROUND] for c in configs} == {4}
    assert {c[messages.CODE_FINGERPRINT] for c in configs} == {code_fingerprint()}
    for partition, request in enumerate(requests):
        assert request.metadata.message_type == "train"
        assert request.metadata.dst_node_id == nodes[partition % len(nodes)]
        assert plan.node_of(partition) == request.metadata.dst_node_id
        sent = request.content.array_records[messages.ARRAYS]
        assert {n: a.data for n, a in sent.items()} == {
            n: a.data for n, a in arrays.items()
        }


def test_fedavg_asks_for_nothing_more() -> None:
    for request in configure(
        made(FedAvg, client_plan(), **safeguards()), global_model()
    ):
        assert set(request.content) == {messages.ARRAYS, messages.CONFIG}
        assert set(request.content.config_records[messages.CONFIG]) == {
            messages.PARTITION,
            messages.STREAM,
            messages.ROUND,
            messages.STREAM,
            messages.CODE_FINGERPRINT,
        }


def good_replies(requests: list[Message], arrays: ArrayRecord) -> list[Message]:
    """Return replies of clients with 10, 3, 25, ... images."""
    examples = [10, 3, 25, 7]
    return [
        train_reply(request, random_model(arrays, seed), examples[seed])
        for seed, request in enumerate(requests)
    ]


def slow_mean(
    arrays: ArrayRecord, weights: dict[int, int]
) -> dict[str, npt.NDArray[np.float64]]:
    """Return the mean in double precision; the model of seed s has ``weights[s]``."""
    mean = {}
    for name in arrays:
        total = sum(
            weight * random_model(arrays, seed)[name].astype(np.float64)
            for seed, weight in weights.items()
        )
        mean[name] = np.asarray(total / sum(weights.values()))
    return mean


def test_aggregation_is_the_weighted_mean() -> None:
    """BatchNorm's running mean and variance are averaged like the weights."""
    arrays = global_model()
    strategy = made(FedAvg, client_plan(), **safeguards())
    result, _ = strategy.aggregate_train(
        1, good_replies(configure(strategy, arrays), arrays)
    )
    assert result is not None
    expected = slow_mean(arrays, {0: 10, 1: 3, 2: 25})
    assert {"1.running_mean", "1.running_var"} <= set(result) == set(expected)
    for name, array in result.items():
        assert array.numpy().dtype == np.float32
        np.testing.assert_allclose(array.numpy(), expected[name], atol=1e-6)


def test_order_of_replies_changes_no_bit() -> None:
    arrays = global_model()

    def outcome(order: tuple[int, ...], sort: bool) -> tuple[dict[str, bytes], object]:
        strategy = made(FedAvg, client_plan(clients=4, per_round=4), **safeguards())
        replies = good_replies(configure(strategy, arrays), arrays)
        shuffled = [replies[i] for i in order]
        if sort:
            result, metrics = strategy.aggregate_train(1, shuffled)
        else:
            result, metrics = FlowerFedAvg().aggregate_train(1, shuffled)
        assert result is not None
        return {name: array.data for name, array in result.items()}, metrics

    orders = list(itertools.permutations(range(4)))
    first = outcome(orders[0], sort=True)
    assert all(outcome(order, sort=True) == first for order in orders)
    # Flower alone sums in order of arrival, which changes bits here.
    assert any(outcome(order, sort=False)[0] != first[0] for order in orders)


def _without_metrics(reply: Message) -> None:
    del reply.content[messages.METRICS]


def _missing_array(reply: Message) -> None:
    del reply.content.array_records[messages.ARRAYS]["0.bias"]


def _double_precision(reply: Message) -> None:
    arrays = reply.content.array_records[messages.ARRAYS]
    arrays["0.bias"] = Array(np.zeros(4, np.float64))


def _not_an_array(reply: Message) -> None:
    arrays = reply.content.array_records[messages.ARRAYS]
    arrays["0.bias"] = Array(
        dtype="float32", shape=(4,), stype="numpy.ndarray", data=b"what is this?"
    )


def _infinite_buffer(reply: Message) -> None:
    arrays = reply.content.array_records[messages.ARRAYS]
    arrays["1.running_var"] = Array(np.full(4, np.inf, np.float32))


def _gradients_unasked(reply: Message) -> None:
    reply.content[messages.GRADIENTS] = ArrayRecord()


def _no_loss(reply: Message) -> None:
    del reply.content.metric_records[messages.METRICS]["loss"]


def _loss_not_a_number(reply: Message) -> None:
    reply.content.metric_records[messages.METRICS]["loss"] = float("nan")


def _no_images(reply: Message) -> None:
    reply.content.metric_records[messages.METRICS][messages.NUM_EXAMPLES] = 0


def _set(name: str, value: float | list[int]) -> Callable[[Message], None]:
    def damage(reply: Message) -> None:
        reply.content.metric_records[messages.METRICS][name] = value

    return damage


def _huge(reply: Message) -> None:
    arrays = reply.content.array_records[messages.ARRAYS]
    arrays["0.bias"] = Array(np.array([0, 1, -1e30, 2], np.float32))


def _negative_variance(reply: Message) -> None:
    arrays = reply.content.array_records[messages.ARRAYS]
    arrays["1.running_var"] = Array(np.array([1, 1, -0.5, 1], np.float32))


def _surplus_bytes(reply: Message) -> None:
    arrays = reply.content.array_records[messages.ARRAYS]
    bias = arrays["0.bias"]
    arrays["0.bias"] = Array(bias.dtype, bias.shape, bias.stype, bias.data + bytes(999))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_huge, "array 0.bias has values up to 1.0e+30, expected 1e+12 at most"),
        (_negative_variance, "array 1.running_var is a variance, but has negative"),
        (_surplus_bytes, "array 0.bias has 1127 bytes besides its values"),
        (_set("partition-id", 0), "partition-id = 0, but the node was asked for [1]"),
        (_set("partition-id", 1.0), "partition-id = 1.0, but the node was asked"),
        (_set("num-examples", 2.5), "num-examples = 2.5; it must be a positive int"),
        (
            _set("num-examples", 1001),
            "num-examples = 1001 and 0 unreadable images, but partition 1 has 1000",
        ),
        (
            _set("unreadable-images", 998),
            "num-examples = 3 and 998 unreadable images, but partition 1 has 1000",
        ),
        (_set("unreadable-images", -1), "unreadable-images = -1; it must be from 0"),
        (_set("seconds-data", 1e300), "seconds-data = 1e+300; it must be from 0 to"),
        (_set("seconds-data", 1.1e7), "seconds-data = 11000000.0; it must be from 0"),
        (_set("loss", -1e300), "loss = -1e+300; it must be from -1e+12 to 1e+12"),
        (_set("loss", [1]), "metric loss = [1] is not a finite number"),
        (_without_metrics, "records are ['arrays'], expected ['arrays', 'metrics']"),
        (_missing_array, "model arrays missing or unknown: 0.bias"),
        (_double_precision, "array 0.bias has type float64, expected float32"),
        (_not_an_array, "array 0.bias cannot be decoded"),
        (_infinite_buffer, "array 1.running_var has values that are not finite"),
        (_gradients_unasked, "records are ['arrays', 'class-gradients', 'metrics']"),
        (_no_loss, "metrics missing or unknown: loss"),
        (_loss_not_a_number, "metric loss = nan is not a finite number"),
        (_no_images, "num-examples = 0; it must be a positive integer"),
        (None, "the disk is full"),
    ],
)
def test_bad_reply_is_dropped_and_the_rest_used(
    flower_log: pytest.LogCaptureFixture,
    damage: Callable[[Message], None] | None,
    reason: str,
) -> None:
    arrays = global_model()
    strategy = made(
        FedAvg, client_plan(clients=3, per_round=3, nodes=(71, 13, 5)), **safeguards()
    )
    requests = configure(strategy, arrays)
    replies = good_replies(requests, arrays)
    if damage is None:
        replies[1] = error_reply(requests[1], "the disk is full")
    else:
        damage(replies[1])

    result, metrics = strategy.aggregate_train(1, replies)

    (line,) = [m for m in flower_log.messages if "dropped the reply" in m]
    assert line.startswith("round 1: dropped the reply of node 13: ")
    assert reason in line
    assert result is not None and metrics is not None
    expected = slow_mean(arrays, {0: 10, 2: 25})
    for name, array in result.items():
        np.testing.assert_allclose(array.numpy(), expected[name], atol=1e-6)
    assert metrics[messages.NUM_EXAMPLES] == 35
    assert strategy.round.clients == [0, 2]
    assert strategy.round.dropped == 1


def test_reply_for_another_nodes_partition_is_dropped(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    """The reply is dropped even if another node was asked for that partition."""
    arrays = global_model()
    strategy = made(FedAvg, client_plan(clients=2, per_round=2), **safeguards())
    first, second = configure(strategy, arrays)
    replies = good_replies([first, second], arrays)
    _set("partition-id", 1)(replies[0])
    strategy.aggregate_train(1, replies)
    assert strategy.round.clients == [1]
    (line,) = [m for m in flower_log.messages if "dropped the reply" in m]
    assert line.endswith("node 71: partition-id = 1, but the node was asked for [0]")


def test_of_two_replies_for_one_partition_none_is_used(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    """Which reply came first is chance, so the outcome must not depend on it."""
    arrays = global_model()
    for order in itertools.permutations(range(3)):
        flower_log.clear()
        strategy = made(FedAvg, client_plan(clients=2, per_round=2), **safeguards())
        requests = configure(strategy, arrays)
        replies = [
            *good_replies(requests, arrays),
            train_reply(requests[0], random_model(arrays, 9), 10),
        ]
        strategy.aggregate_train(1, [replies[i] for i in order])
        assert strategy.round.clients == [1]
        assert strategy.round.dropped == 2
        lines = [m for m in flower_log.messages if "dropped the reply" in m]
        assert len(lines) == 2
        assert all(m.endswith("node 71: 2 replies for partition 0") for m in lines)


@pytest.mark.parametrize(("needed", "kept"), [(1, False), (2, False), (3, True)])
def test_round_with_too_few_good_replies_keeps_the_model(
    flower_log: pytest.LogCaptureFixture, needed: int, kept: bool
) -> None:
    arrays = global_model()
    strategy = made(FedAvg, client_plan(), **safeguards(min_replies=needed))
    replies = good_replies(configure(strategy, arrays), arrays)
    _no_images(replies[0])
    result, metrics = strategy.aggregate_train(4, replies)
    assert (result is None) == (metrics is None) == kept
    assert strategy.round.kept_model == kept
    assert strategy.round.clients == ([] if kept else strategy.clients.sample(1)[1:])
    assert strategy.round.dropped == 1
    said = "round 4: 2 good replies, fewer than federation.min-replies = 3; the model"
    assert any(m.startswith(said) for m in flower_log.messages) == kept


def test_no_usable_reply_stops_with_every_reason() -> None:
    arrays = global_model()
    strategy = made(FedAvg, client_plan(clients=2, per_round=2), **safeguards())
    requests = configure(strategy, arrays)
    replies = good_replies(requests, arrays)
    _no_images(replies[1])
    replies[0] = error_reply(requests[0], "the disk is full")
    with pytest.raises(NoRepliesError) as caught:
        strategy.aggregate_train(5, replies)
    assert str(caught.value) == (
        "round 5: no usable reply from 2 clients (node 71: the disk is full; "
        "node 13: num-examples = 0; it must be a positive integer)"
    )


def test_no_reply_at_all_stops() -> None:
    strategy = made(FedAvg, client_plan(), **safeguards())
    configure(strategy, global_model())
    with pytest.raises(
        NoRepliesError,
        match=r"round 1: no usable reply from 3 clients \(none arrived before "
        r"federation.round-timeout\)",
    ):
        strategy.aggregate_train(1, [])


def test_unreadable_images_at_a_client_stop_the_run() -> None:
    """The run stops although the other replies are good. The error's code decides."""
    arrays = global_model()
    strategy = made(FedAvg, client_plan(), **safeguards())
    requests = configure(strategy, arrays)
    replies = good_replies(requests, arrays)
    replies[1] = error_reply(requests[1], "DatasetError: DatasetError")
    result, _ = strategy.aggregate_train(2, replies)
    assert result is not None and strategy.round.dropped == 1
    replies = good_replies(requests, arrays)
    replies[1] = error_reply(
        requests[1], "/data/a.png is unreadable", messages.DATA_ERROR
    )
    with pytest.raises(DatasetError, match=r"round 2: .*/data/a\.png is unreadable"):
        strategy.aggregate_train(2, replies)


def test_bytes_are_those_on_the_wire() -> None:
    """All requests count for the download, used replies for the upload."""
    arrays = global_model()
    strategy = made(FedAvg, client_plan(), **safeguards())
    requests = configure(strategy, arrays)
    replies = good_replies(requests, arrays)
    _no_images(replies[0])
    strategy.aggregate_train(1, replies)
    model = wire_bytes(array.numpy() for array in arrays.values())
    assert strategy.round.bytes_down == 3 * model
    assert strategy.round.upload_bytes == [model, model]
    assert strategy.round.gradient_bytes == [0, 0]


def test_metrics_are_averaged_or_summed() -> None:
    """Losses are averaged by images; images and seconds are summed."""
    arrays = global_model()
    strategy = made(FedAvg, client_plan(clients=2, per_round=2), **safeguards())
    first, second = configure(strategy, arrays)
    model = random_model(arrays, 0)
    replies = [
        train_reply(
            first,
            model,
            30,
            loss=1.0,
            distillation_loss=0.4,
            unreadable_images=2,
            seconds_data=1.5,
            seconds_gradients=0.25,
            seconds_training=4.0,
        ),
        train_reply(
            second,
            model,
            10,
            loss=3.0,
            distillation_loss=0.8,
            unreadable_images=1,
            seconds_data=0.5,
            seconds_gradients=0.5,
            seconds_training=8.0,
        ),
    ]
    _, metrics = strategy.aggregate_train(1, replies)
    assert metrics is not None
    expected = {
        "num-examples": 40,
        "loss": 1.5,
        "distillation-loss": 0.5,
        "unreadable-images": 3,
        "seconds-data": 2.0,
        "seconds-gradients": 0.75,
        "seconds-training": 12.0,
    }
    assert dict(metrics) == pytest.approx(expected)
    assert strategy.round.losses == pytest.approx({"client": 1.5, "distillation": 0.5})
    assert strategy.round.unreadable == 3
    seconds = dict(strategy.round.seconds)
    of_clients = {
        name: seconds.pop(f"clients-{name}")
        for name in ("data", "gradients", "training")
    }
    assert of_clients == pytest.approx({"data": 2, "gradients": 0.75, "training": 12})
    assert set(seconds) == {"clients", "checks", "aggregation"}
    assert all(s >= 0 for s in seconds.values())


def test_a_round_starts_with_a_clean_record() -> None:
    arrays = global_model()
    strategy = made(FedAvg, client_plan(), **safeguards())
    replies = good_replies(configure(strategy, arrays), arrays)
    _no_images(replies[0])
    strategy.aggregate_train(1, replies)
    assert strategy.round.dropped == 1
    requests = configure(strategy, arrays, server_round=2)
    strategy.aggregate_train(2, good_replies(requests, arrays))
    assert strategy.round.dropped == 0
    assert strategy.round.clients == strategy.clients.sample(2)


def test_summary_says_who_trains(flower_log: pytest.LogCaptureFixture) -> None:
    with flower_log.at_level("INFO", logger="flwr"):
        made(
            FedAvg, client_plan(clients=10, per_round=5, seed=3), **safeguards()
        ).summary()
    assert "Drawn each round: 5 of 10 (seed 3)" in flower_log.text
    assert "Simulated by 2 nodes" in flower_log.text
