"""Test that no reply can stop the server, or move it further than allowed."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from client_app.class_statistics import class_statistics
from clip2fl_common import messages
from strategy.base import Method
from strategy.ccvr import CCVR
from strategy.creff import CReFF
from strategy.fedavg import FedAvg
from tests.strategy.messages import (
    IMAGES,
    client_plan,
    configure,
    error_reply,
    global_model,
    made,
    random_gradients,
    random_model,
    safeguards,
    train_reply,
)

CLASSES, DIM = 3, 6
BOUND = 2.0
NODES = (71, 13, 5)
HOSTILE = 1  # partition of the hostile client, on node 13

Draw = Callable[[st.SearchStrategy[Any]], Any]

ABSURD_NUMBERS = st.one_of(
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0, -1, 1e30, -1e30, IMAGES, IMAGES + 1, 2**63 - 1]),
    st.lists(st.integers(-3, 3), max_size=2),
)
BAD_VALUES = st.sampled_from(
    [np.nan, np.inf, -np.inf, 1e30, -1e30, 3e38, 1e12, -1e12, 1e13, 0.0, -1.0]
)
TYPES = st.sampled_from(["<f8", "<f2", "<i4", "<i8", "<u2", "|b1", "<c8", "<U3", ">f4"])


def some_array(draw: Draw, reply: Message) -> tuple[ArrayRecord, str] | None:
    """Return an array of the reply, chosen at random."""
    found = [
        (record, name)
        for record in reply.content.array_records.values()
        for name in record
    ]
    return draw(st.sampled_from(found)) if found else None


def change_array(draw: Draw, reply: Message) -> None:
    """Remove or rename an array, or change its shape, type, values or bytes."""
    chosen = some_array(draw, reply)
    if chosen is None:
        return
    record, name = chosen
    array = record[name]
    data = array.data
    kind = draw(st.sampled_from("remove rename shape type value bytes header".split()))
    if kind == "remove":
        del record[name]
    elif kind == "rename":
        record[draw(st.text(max_size=5))] = record.pop(name)
    elif kind == "bytes":
        cut = draw(st.integers(0, len(data)))
        record[name] = Array(
            dtype=array.dtype,
            shape=array.shape,
            stype=draw(st.sampled_from([array.stype, "pickle", ""])),
            data=data[:cut] + draw(st.binary(max_size=40)),
        )
    elif kind == "header":
        flipped = bytearray(data)
        for _ in range(draw(st.integers(1, 4))):
            place = draw(st.integers(0, min(127, len(data) - 1)))
            flipped[place] = draw(st.integers(0, 255))
        record[name] = Array(
            dtype=array.dtype, shape=array.shape, stype=array.stype, data=bytes(flipped)
        )
    else:
        try:
            values = array.numpy()
        except Exception:  # changed by an earlier call
            return
        if kind == "shape":
            shape = draw(st.lists(st.integers(0, 4), max_size=4))
            record[name] = Array(np.zeros(shape, values.dtype))
        elif kind == "type":
            with np.errstate(all="ignore"):
                record[name] = Array(values.astype(draw(TYPES)))
        elif values.size and values.dtype.kind in "fiu":
            flat = values.copy().reshape(-1)
            count = draw(st.sampled_from([1, flat.size]))
            with np.errstate(all="ignore"):
                flat[:count] = np.asarray(draw(BAD_VALUES)).astype(flat.dtype)
            record[name] = Array(flat.reshape(values.shape))


def change_metrics(draw: Draw, reply: Message) -> None:
    """Make a metric extreme, missing or unknown."""
    metrics = reply.content.metric_records.get(messages.METRICS)
    if not metrics:
        return
    name = draw(st.sampled_from([*metrics, messages.NUM_EXAMPLES, messages.PARTITION]))
    kind = draw(st.sampled_from(["absurd", "absurd", "missing", "unknown"]))
    if kind == "absurd":
        metrics[name] = draw(ABSURD_NUMBERS)
    elif kind == "missing":
        metrics.pop(name, None)
    else:
        metrics[draw(st.text(max_size=5))] = 1.0


def change_records(draw: Draw, reply: Message) -> None:
    """Remove, add or replace a whole record."""
    name = draw(st.sampled_from([*reply.content, "more", messages.GRADIENTS]))
    kind = draw(st.sampled_from(["remove", "arrays", "metrics", "config"]))
    if kind == "remove":
        if name in reply.content:
            del reply.content[name]
    else:
        other: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {
            "arrays": ArrayRecord({"x": Array(np.zeros(2, np.float32))}),
            "metrics": MetricRecord({"x": 1}),
            "config": ConfigRecord({"x": "y"}),
        }
        reply.content[name] = other[kind]


def change_classes(draw: Draw, reply: Message) -> None:
    """Claim other classes, other ranks or other numbers of images."""
    gradients = reply.content.array_records.get(messages.GRADIENTS)
    if gradients:
        name = draw(st.sampled_from(["classes", "ranks"]))
        values = draw(st.lists(st.integers(-2, CLASSES + 2), max_size=CLASSES + 2))
        gradients[name] = Array(np.asarray(values, np.int64))
    statistics = reply.content.array_records.get(messages.CLASS_STATISTICS)
    if statistics:
        name = draw(st.sampled_from(["classes", "counts"]))
        values = draw(st.lists(st.integers(-2, 2**62), min_size=1, max_size=3))
        statistics[name] = Array(np.asarray(values, np.int64))


CHANGES = [change_array, change_array, change_metrics, change_records, change_classes]


@st.composite
def aggregations(draw: Draw) -> dict[str, Any]:
    """Draw a rule, with or without bounds."""
    rule = draw(st.sampled_from(["mean", "median", "trimmed-mean"]))
    bound = draw(st.sampled_from([0.0, BOUND]))
    return {"rule": rule, "trim": 0.34, "max_update_norm": bound}


def make(method: str, aggregation: dict[str, Any]) -> Method:
    """Return a small strategy."""
    plan = client_plan(clients=3, per_round=3, nodes=NODES)
    common = safeguards(**aggregation)
    if method == "fedavg":
        return made(FedAvg, plan, **common)
    if method == "ccvr":
        return made(
            CCVR,
            plan,
            (CLASSES, DIM),
            ccvr__virtual_features=2,
            retraining__epochs=1,
            **common,
        )
    return made(
        CReFF,
        plan,
        (CLASSES, DIM),
        synthesis__features_per_class=2,
        synthesis__steps=2,
        retraining__epochs=1,
        upload__precision="full",
        upload__min_cosine=0.5,
        **common,
    )


def replies_of(
    strategy: Method, arrays: ArrayRecord
) -> tuple[list[Message], list[Message]]:
    """Return the requests and good replies of a round."""
    requests = configure(strategy, arrays)
    own = [
        random_gradients([0, 2], (CLASSES, DIM), seed) for seed in range(len(requests))
    ]
    replies = [
        train_reply(
            request,
            random_model(arrays, seed),
            [10, 30, 25][seed],
            own[seed] if isinstance(strategy, CReFF) else None,
        )
        for seed, request in enumerate(requests)
    ]
    if isinstance(strategy, CCVR):
        for seed, reply in enumerate(replies):
            features = torch.randn(
                8, DIM, generator=torch.Generator().manual_seed(seed)
            )
            statistics = class_statistics(features, torch.arange(8) % 2)
            declared = messages.StatisticsFormat(CLASSES, DIM)
            reply.content[messages.CLASS_STATISTICS] = declared.encode(statistics)
    return requests, replies


def flat(arrays: ArrayRecord | dict[str, Any]) -> Any:
    """Return all values of a model in one array of double precision."""
    values = (a.numpy() if isinstance(a, Array) else a for a in arrays.values())
    return np.concatenate([v.astype(np.float64).reshape(-1) for v in values])


class Lines(logging.Handler):
    """Keep the messages of Flower's log."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self.messages.append(record.getMessage())


def check_hostile(
    data: st.DataObject, method: str, aggregation: dict[str, Any]
) -> None:
    """Let one of three clients send anything, and check the server's result."""
    arrays = global_model()
    strategy, honest = make(method, aggregation), make(method, aggregation)
    requests, replies = replies_of(strategy, arrays)
    hostile = replies[HOSTILE]
    kind = data.draw(st.sampled_from(["changed"] * 8 + ["error", "twice", "silent"]))
    if kind == "changed":
        for change in data.draw(st.lists(st.sampled_from(CHANGES), max_size=3)):
            change(data.draw, hostile)
    elif kind == "error":
        replies[HOSTILE] = error_reply(requests[HOSTILE], data.draw(st.text()))
    elif kind == "twice":
        replies.insert(data.draw(st.integers(0, 3)), hostile)
    else:
        replies.remove(hostile)

    lines = Lines()
    flower = logging.getLogger("flwr")
    flower.addHandler(lines)
    try:
        result, metrics = strategy.aggregate_train(1, replies)
    finally:
        flower.removeHandler(lines)

    assert result is not None and metrics is not None
    assert np.isfinite(flat(result)).all()
    assert all(np.isfinite(value) for value in metrics.values())
    for tensor in strategy.state().values():
        assert torch.isfinite(tensor).all()
    _, good = replies_of(honest, arrays)
    del good[HOSTILE]
    expected, _ = honest.aggregate_train(1, good)
    assert expected is not None
    dropped = [m for m in lines.messages if "dropped the reply" in m]
    assert strategy.round.dropped == len(dropped)
    if strategy.round.clients == [0, 2]:
        assert len(dropped) == {"silent": 0, "twice": 2}.get(kind, 1)
        for line in dropped:
            begin, _, reason = line.partition("node 13: ")
            assert begin == "round 1: dropped the reply of "
            assert reason or kind == "error"
        assert {n: a.data for n, a in result.items()} == {
            n: a.data for n, a in expected.items()
        }
        for name, tensor in strategy.state().items():
            assert torch.equal(tensor, honest.state()[name])
        return
    assert strategy.round.clients == [0, 1, 2] and not dropped
    if aggregation["max_update_norm"]:
        moved = np.linalg.norm(flat(result) - flat(arrays))
        slack = 1e-4 * np.abs(flat(arrays)).max()
        if aggregation["rule"] == "mean":
            assert moved <= BOUND + slack
        assert np.abs(flat(result) - flat(arrays)).max() <= BOUND + slack
    elif aggregation["rule"] != "mean":
        both = np.stack([flat(random_model(arrays, seed)) for seed in (0, 2)])
        assert (flat(result) >= both.min(0) - 1e-6).all()
        assert (flat(result) <= both.max(0) + 1e-6).all()


@settings(max_examples=100)
@given(data=st.data(), aggregation=aggregations())
@pytest.mark.parametrize("method", ["fedavg", "creff", "ccvr"])
def test_hostile_reply(
    method: str, data: st.DataObject, aggregation: dict[str, Any]
) -> None:
    check_hostile(data, method, aggregation)


@pytest.mark.slow
@settings(max_examples=1200)
@given(data=st.data(), aggregation=aggregations())
@pytest.mark.parametrize("method", ["fedavg", "creff", "ccvr"])
def test_hostile_reply_at_length(
    method: str, data: st.DataObject, aggregation: dict[str, Any]
) -> None:
    check_hostile(data, method, aggregation)


def test_good_reply_is_used_and_one_far_out_is_not() -> None:
    """Both verdicts occur; otherwise the property above could hold trivially."""
    arrays = global_model()
    strategy = make("creff", {"rule": "mean", "trim": 0.34, "max_update_norm": 0.0})
    _, good = replies_of(strategy, arrays)
    strategy.aggregate_train(1, good)
    assert strategy.round.clients == [0, 1, 2]
    model = good[HOSTILE].content.array_records[messages.ARRAYS]
    name = next(iter(model))
    huge = np.full(tuple(model[name].shape), 1e30, np.float32)
    _, replies = replies_of(strategy, arrays)
    replies[HOSTILE].content.array_records[messages.ARRAYS][name] = Array(huge)
    strategy.aggregate_train(1, replies)
    assert strategy.round.clients == [0, 2]
