"""Test what is summed: vectors of replies, and the one reply of a sum."""

import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from clip2fl_common import messages
from clip2fl_common.class_gradients import ClassGradient
from clip2fl_common.messages import GradientFormat, ReplyError
from clip2fl_common.messages.secure import (
    Revealed,
    SecureRequest,
    key_in,
    partition_in,
    request_digest,
    reveal_reply,
    revealed_in,
    signature_in,
)
from clip2fl_common.messages.sums import SumFormat
from clip2fl_common.messages.vectors import client_in, masked_reply
from clip2fl_common.secure.masks import Vector
from clip2fl_common.secure.statements import SecureError
from tests.defaults import run_config

CLASSES, WIDTH = 4, 3
SENT = {
    "layer.weight": np.zeros((2, 2), np.float32),
    "layer.running_var": np.ones(2, np.float32),
}


def sum_format(**changes: float | str) -> SumFormat:
    """Return the format of a run with class gradients and class moments."""
    config = run_config(
        method="creff",
        head__delivered="discriminant",
        model__feature_dim=WIDTH,
        aggregation__secure=True,
        federation__clients_per_round=3,
        **changes,
    )
    names = (messages.GRADIENTS, messages.MOMENTS)
    fields = [messages.reply_field(name, config, CLASSES) for name in names]
    return SumFormat(config, SENT, fields)


def gradient(seed: int) -> ClassGradient:
    """Return a class gradient that is exact in half precision."""
    drawn = np.random.default_rng(seed).integers(-8, 8, (CLASSES, WIDTH + 1)) / 64
    tensor = torch.from_numpy(drawn).float()
    return ClassGradient(tensor[:, :WIDTH].contiguous(), tensor[:, WIDTH].contiguous())


def reply(
    sums: SumFormat, client: int, held: dict[int, ClassGradient], images: int = 5
) -> RecordDict:
    """Return a client's reply without secure aggregation."""
    content = RecordDict()
    for field in sums._fields:
        if isinstance(field, GradientFormat):
            content[field.name] = field.encode(held)
        else:
            assert isinstance(field, messages.ArrayFields)
            content[field.name] = field.encode(
                {
                    n: torch.full(shape, client + 0.5)
                    for n, shape in field.shapes.items()
                }
            )
    names = (*messages.AVERAGED_METRICS, *messages.SUMMED_METRICS)
    content[messages.METRICS] = MetricRecord(
        {messages.NUM_EXAMPLES: images, **dict.fromkeys(names, 1.0)}
    )
    content[messages.ARRAYS] = ArrayRecord(
        {name: Array(values + np.float32(client)) for name, values in SENT.items()}
    )
    return content


def total(sums: SumFormat, replies: list[RecordDict]) -> Vector:
    """Return the sum of the clients' vectors, without masks."""
    added = sums.zeros()
    for content in replies:
        added.add(sums.encode(sums.values_of(content), len(replies)))
    return added


@pytest.mark.parametrize("precision", ["half", "full"])
def test_reply_of_a_sum_has_the_means_and_the_sums(precision: str) -> None:
    sums = sum_format(upload__precision=precision)
    held = [{0: gradient(0), 2: gradient(1)}, {2: gradient(2)}, {}]
    replies = [reply(sums, c, own, 5 + c) for c, own in enumerate(held)]
    found = sums.reply_of(total(sums, replies), 3, {4: 9, 6: 9, 8: 9}, 77)
    assert (found.images, found.members, found.clients) == (18, (4, 6, 8), (4, 6, 8))
    moved = (6 * 1 + 7 * 2) / 18
    np.testing.assert_allclose(found.model["layer.weight"], moved, rtol=1e-6)
    np.testing.assert_allclose(found.model["layer.running_var"], 1 + moved, rtol=1e-6)
    gradients = found.fields[messages.GRADIENTS]
    assert isinstance(gradients, dict) and list(gradients) == [0, 2]
    for c, parts in ((0, [gradient(0)]), (2, [gradient(1), gradient(2)])):
        for name in ("weight", "bias"):
            exact = sum(getattr(part, name) for part in parts) / 3
            torch.testing.assert_close(getattr(gradients[c], name), exact)
    moments = found.fields[messages.MOMENTS]
    assert isinstance(moments, dict)
    assert set(moments["count"].tolist()) == {0.5 + 1.5 + 2.5}
    assert found.metrics["loss"] == 1 and found.metrics["unreadable-images"] == 3
    bits = 32 if precision == "half" else 64
    gradient_bytes = CLASSES * CLASSES * (WIDTH + 1) * bits // 8
    moments_bytes = sum(8 * tensor.numel() for tensor in moments.values())
    assert found.field_bytes == gradient_bytes + moments_bytes


def test_wrong_clock_of_one_client_leaves_seconds_readable() -> None:
    """Sums of more would not fit what readers of a run's files take for seconds."""
    sums = sum_format()
    replies = [reply(sums, client, {}, 5) for client in range(3)]
    replies[1].metric_records[messages.METRICS]["seconds-training"] = 1e11
    found = sums.reply_of(total(sums, replies), 3, {4: 9, 6: 9, 8: 9}, 77)
    assert found.metrics["seconds-training"] == 3e7
    assert found.metrics["seconds-data"] == 3


def test_absent_classes_look_as_held_ones_do() -> None:
    sums = sum_format()
    everything = {c: gradient(c) for c in range(CLASSES)}
    vectors = [
        sums.encode(sums.values_of(reply(sums, 0, held)), 3)
        for held in ({}, everything)
    ]
    sizes = {(vector.wide.size, vector.narrow.size) for vector in vectors}
    assert len(sizes) == 1


@pytest.mark.parametrize("limit", [0.0, 0.01])
def test_long_class_gradients_are_shortened(limit: float) -> None:
    """To a norm that the integers hold; the direction stays."""
    sums = sum_format(aggregation__max_gradient_norm=limit)
    own = gradient(3)
    long = ClassGradient(own.weight * 4096, own.bias * 4096)
    values = sums.values_of(reply(sums, 0, {1: long}))
    weight = values["class-gradients.weight"][1]
    norm = math.hypot(
        float(np.linalg.norm(weight)),
        float(np.linalg.norm(values["class-gradients.bias"][1])),
    )
    assert norm == pytest.approx(limit or 128.0)
    scale = np.abs(weight).max() / float(own.weight.abs().max())
    np.testing.assert_allclose(weight, own.weight.numpy() * scale, rtol=1e-6)
    sums.encode(values, 3)  # fits


def test_rounding_makes_no_negative_variance() -> None:
    sums = sum_format()
    values = {n: v.copy() for n, v in sums.values_of(reply(sums, 0, {})).items()}
    values["model.layer.running_var"] -= 5 * (1 + 1e-6)
    vector = sums.encode(values, 1)
    found = sums.reply_of(vector, 1, {0: 9}, 0)
    assert found.model["layer.running_var"].min() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 0.0}, "the sum is of 0 images, and 1 clients have from 1 to 9"),
        ({"images": 10.0}, "the sum is of 10 images"),
        ({"model.layer.weight": 1e20}, "array layer.weight has values up to"),
        ({"metrics": -1.0}, "metric unreadable-images = -1.0 is negative"),
    ],
)
def test_impossible_sums_are_refused(changes: dict[str, float], message: str) -> None:
    sums = sum_format()
    values = dict(sums.values_of(reply(sums, 0, {})))
    for name, value in changes.items():
        values[name] = np.full(sums.segments[name].shape, value)
    sums.decode = lambda total, parties: values  # type: ignore[method-assign]
    with pytest.raises(ReplyError, match=message):
        sums.reply_of(sums.zeros(), 1, {0: 9}, 0)


def test_malformed_masked_replies_are_refused() -> None:
    sums = sum_format()

    def good() -> RecordDict:
        return masked_reply(3, sums.zeros())

    assert sums.vector_in(good(), {3: 1}).wide.size == sums.zeros().wide.size
    assert client_in(good()) == 3 and client_in(RecordDict()) is None
    with pytest.raises(ReplyError, match=r"metrics are not those of one of \[4\]"):
        sums.vector_in(good(), {4: 1})
    short = good()
    short.array_records["masked-sums"]["wide"] = Array(np.zeros(3, np.uint64))
    with pytest.raises(ReplyError, match="masked-sums.wide has shape"):
        sums.vector_in(short, {3: 1})
    typed = good()
    narrow = sums.zeros().narrow.astype(np.float32)
    typed.array_records["masked-sums"]["narrow"] = Array(narrow)
    with pytest.raises(ReplyError, match="masked-sums.narrow has type"):
        sums.vector_in(typed, {3: 1})
    del typed.array_records["masked-sums"]["narrow"]
    with pytest.raises(ReplyError, match="masked sums have the arrays"):
        sums.vector_in(typed, {3: 1})
    with pytest.raises(ReplyError, match="records are"):
        sums.vector_in(reply(sums, 3, {}), {3: 1})


def test_malformed_requests_are_refused() -> None:
    """A party must not go on with something that it took for another thing."""
    request = SecureRequest(2, b"s", 5, ("a",), (b"k",), (b"t",))
    record = request.record()
    assert SecureRequest.parse(RecordDict({messages.SECURE: record})) == request
    for name, value in (
        ("server-round", 2.0),
        ("server-round", True),
        ("session", "s"),
        ("names", [b"a"]),
        ("public-keys", b"k"),
        ("signatures", ["t"]),
    ):
        changed = ConfigRecord({**record, name: value})
        with pytest.raises(SecureError, match=f"{name} must be"):
            SecureRequest.parse(RecordDict({messages.SECURE: changed}))
    with pytest.raises(SecureError, match="it has no record secure-aggregation"):
        SecureRequest.parse(RecordDict())
    uneven = SecureRequest(2, b"s", 5, ("a", "b"), (b"k",), (b"t",))
    with pytest.raises(SecureError, match="differ in number"):
        assert uneven.directory


def test_malformed_answers_are_refused() -> None:
    good = reveal_reply(3, Revealed(b"x" * 32, {"a": b"y" * 32}))
    assert partition_in(good) == 3
    assert revealed_in(good, {"a"}).pairs == {"a": b"y" * 32}
    with pytest.raises(ReplyError, match=r"seeds of \['a'\], expected \[\]"):
        revealed_in(good, set())
    for bad in (Revealed(b"x", {}), Revealed(b"x" * 32, {"a": b""})):
        with pytest.raises(ReplyError, match="a seed does not have 32 bytes"):
            revealed_in(reveal_reply(3, bad), set(bad.pairs))
    for read in (key_in, signature_in):
        with pytest.raises(ReplyError, match="must be of the type"):
            read(good)
        with pytest.raises(ReplyError, match="records are"):
            read(RecordDict())


def test_place_in_the_sum_does_not_depend_on_the_order_of_a_message() -> None:
    """Another order for one party would put its numbers where others have zeros."""
    config = run_config(
        method="fedavg", aggregation__secure=True, federation__clients_per_round=3
    )
    one_way = SumFormat(config, SENT, [])
    other_way = SumFormat(config, dict(reversed(SENT.items())), [])
    assert list(one_way.segments.items()) == list(other_way.segments.items())


def test_digest_of_a_request_ignores_only_what_differs_between_parties() -> None:
    def request(**changes: object) -> RecordDict:
        values = {"partition-id": 1, "random-stream": 2, "server-round": 3} | changes
        return RecordDict(
            {
                messages.CONFIG: ConfigRecord(values),  # type: ignore[arg-type]
                messages.ARRAYS: ArrayRecord({"w": Array(np.ones(2, np.float32))}),
            }
        )

    digest = request_digest(request(), {"seed": 1})
    same = request(**{"partition-id": 7, "random-stream": 8})
    same[messages.SECURE] = SecureRequest(1, b"s").record()
    assert request_digest(same, {"seed": 1}) == digest
    other = request()
    other.array_records[messages.ARRAYS]["w"] = Array(np.ones((1, 2), np.float32))
    two = {"v": Array(np.zeros(2, np.float32)), "w": Array(np.ones(2, np.float32))}
    one_way, other_way = request(), request()
    one_way[messages.ARRAYS] = ArrayRecord(two)
    other_way[messages.ARRAYS] = ArrayRecord(dict(reversed(two.items())))
    assert request_digest(one_way, {}) != request_digest(other_way, {})
    renamed = request()
    renamed["another"] = renamed.array_records.pop(messages.ARRAYS)
    for content, settings in (
        (request(), {"seed": 2}),
        (request(), {"seed": 1.0}),
        (request(), {}),
        (request(**{"server-round": 4}), {"seed": 1}),
        (request(**{"proximal-mu": 0.0}), {"seed": 1}),
        (other, {"seed": 1}),
        (renamed, {"seed": 1}),
    ):
        assert request_digest(content, settings) != digest
