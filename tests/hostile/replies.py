"""What a hostile client answers, to a query, a train and an evaluate request."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)

from clip2fl_common import messages

# Takes a request and the honest reply, returns what arrives.
Change = Callable[[Message, Message], Message]

HOSTILE_TEXTS = (
    "",
    "\x1b[2J\x1b[31mred",
    "two\nlines\r\nof text",
    "\u202eright to left",
    "DatasetError: DatasetError",
    "x" * 5_000_000,
    "\x00" * 1000,
    "%s %d {0} {name}",
)
VALUES = (1e3, 1e6, 1e12, -1e12, 1e30, np.nan, np.inf, -np.inf, 0.0)
NUMBERS: tuple[Any, ...] = (
    *(0, -1, 2**62, -(2**62), 0.5, float("nan"), float("inf"), -1e300, 1e300),
    *([], [1], [1.5] * 100_000),
)


def _arrays(reply: Message) -> ArrayRecord:
    return reply.content.array_records[messages.ARRAYS]


def _filled(value: float) -> Change:
    def change(_: Message, reply: Message) -> Message:
        model = _arrays(reply)
        for name, array in list(model.items()):
            model[name] = Array(np.full(tuple(array.shape), value, np.float32))
        return reply

    return change


def _one_array(index: int, value: float) -> Change:
    def change(_: Message, reply: Message) -> Message:
        model = _arrays(reply)
        name = list(model)[index % len(model)]
        model[name] = Array(np.full(tuple(model[name].shape), value, np.float32))
        return reply

    return change


def _times(factor: float) -> Change:
    def change(request: Message, reply: Message) -> Message:
        sent = request.content.array_records[messages.ARRAYS]
        model = _arrays(reply)
        for name, array in list(model.items()):
            before = sent[name].numpy()
            moved = before + np.float32(factor) * (array.numpy() - before)
            if name.endswith(messages.VARIANCE):
                moved = np.abs(moved)
            model[name] = Array(moved.astype(np.float32))
        return reply

    return change


def _metric(name: str, value: Any) -> Change:
    def change(_: Message, reply: Message) -> Message:
        reply.content.metric_records[messages.METRICS][name] = value
        return reply

    return change


def _array_named(name: str) -> Change:
    def change(_: Message, reply: Message) -> Message:
        _arrays(reply)[name] = Array(np.zeros(1, np.float32))
        return reply

    return change


def _raw(data: bytes, dtype: str = "float32", stype: str = "numpy.ndarray") -> Change:
    def change(_: Message, reply: Message) -> Message:
        model = _arrays(reply)
        name = next(iter(model))
        model[name] = Array(
            dtype=dtype, shape=model[name].shape, stype=stype, data=data
        )
        return reply

    return change


def _gradient(name: str, values: Any) -> Change:
    def change(_: Message, reply: Message) -> Message:
        if messages.GRADIENTS in reply.content.array_records:
            reply.content.array_records[messages.GRADIENTS][name] = Array(values)
        return reply

    return change


def _scaled_gradients(factor: float) -> Change:
    def change(_: Message, reply: Message) -> Message:
        gradients = reply.content.array_records.get(messages.GRADIENTS)
        if gradients:
            for name in ("weight", "bias"):
                bits = gradients[name].numpy().astype(np.uint32) << 16
                scaled = bits.view(np.float32) * np.float32(factor)
                wire = (scaled.view(np.uint32) >> 16).astype(np.uint16)
                gradients[name] = Array(wire)
        return reply

    return change


def _content(content: RecordDict) -> Change:
    def change(request: Message, _: Message) -> Message:
        return Message(content, reply_to=request)

    return change


def _error(code: int, text: str) -> Change:
    def change(request: Message, _: Message) -> Message:
        return Message(Error(code, text), reply_to=request)

    return change


def _header(shape: str, descr: str = "<f4") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    padded = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode()


def hostile_replies() -> Iterator[tuple[str, Change]]:
    """Yield changes of a train reply, by name."""
    for value in VALUES:
        yield f"all weights {value}", _filled(value)
        for index in (0, 1, 3):
            yield f"array {index} of {value}", _one_array(index, value)
    for factor in (-1.0, -10.0, 9.0, 100.0, 1e4, 1e8):
        yield f"update times {factor}", _times(factor)
        yield f"gradients times {factor}", _scaled_gradients(factor)
    for metric in (messages.NUM_EXAMPLES, messages.PARTITION, "loss", "seconds-data"):
        for number, value in enumerate(NUMBERS):
            yield f"metric {metric}, number {number}", _metric(metric, value)
    for number, text in enumerate(HOSTILE_TEXTS):
        yield f"metric named by text {number}", _metric(text, 1.0)
        yield f"array named by text {number}", _array_named(text)
        for code in (0, 2, 5, messages.DATA_ERROR, messages.DIVERGED, 2**31 - 1):
            yield f"error {code} with text {number}", _error(code, text)
    for number, content in enumerate(_contents()):
        yield f"content {number}", _content(content)
    for number, data in enumerate(
        (
            b"",
            b"\x93NUMPY",
            b"\x80\x04\x95" + b"x" * 50,
            _header("(4294967296, 4294967296)"),
            _header("(1,)", "|O"),
            _header("((" * 40 + "))" * 40),
            _header("(__import__('os').system('true'),)"),
            _header("(16, 3, 3, 3)") + bytes(100_000_000),
            _header("(16, 3, 3, 3)", ">f4") + bytes(16 * 27 * 4),
        )
    ):
        yield f"bytes {number}", _raw(data)
    yield "pickle", _raw(b"cos\nsystem\n(S'true'\ntR.", stype="pickle")
    for number, values in enumerate(
        (
            np.arange(10),
            np.zeros(3, np.int64),
            np.full(2, 2**62, np.int64),
            np.zeros((10, 10, 512), np.uint16),
            np.zeros(0, np.float64),
        )
    ):
        for name in ("classes", "ranks", "weight", "bias"):
            yield f"gradient {name} {number}", _gradient(name, values)


def hostile_answers() -> Iterator[tuple[str, Change]]:
    """Yield changes of an answer to a query or to an evaluate request, by name."""
    for number, content in enumerate(_contents()):
        yield f"content {number}", _content(content)
    for number, text in enumerate(HOSTILE_TEXTS):
        yield f"error with text {number}", _error(2, text)
        site = RecordDict({messages.CONFIG: ConfigRecord({messages.SITE: text})})
        yield f"site {number}", _content(site)
        versions = ConfigRecord({messages.SITE: "a", "versions": [f"torch={text}"]})
        yield f"versions {number}", _content(RecordDict({messages.CONFIG: versions}))
    honest: dict[str, Any] = {
        **{messages.NUM_EXAMPLES: 4, "classes": [0], "recall-fedavg": [100]},
        **{"unreadable-images": 0, "seconds-evaluation": 1.0},
    }
    for number, value in enumerate(NUMBERS):
        for name in honest:
            metrics = MetricRecord({**honest, name: value})
            content = RecordDict({messages.METRICS: metrics})
            yield f"evaluation {name} {number}", _content(content)
    records: tuple[ConfigRecord | ArrayRecord, ...] = (
        ConfigRecord({"a": 1}),
        ArrayRecord(cast(Any, {})),
        messages.numpy_to_arrays({"other": np.zeros((10, 10), np.int64)}),
        messages.numpy_to_arrays({"confusion": np.full((10, 10), 2**62)}),
        messages.numpy_to_arrays({"confusion": np.full((10, 10), -1)}),
        messages.numpy_to_arrays({"confusion": np.zeros((1, 10**6), np.int64)}),
        messages.numpy_to_arrays({"confusion": np.zeros((10, 10), complex)}),
    )
    for number, record in enumerate(records):
        content = RecordDict({messages.METRICS: MetricRecord(honest)})
        content["confusion"] = record
        yield f"confusion matrix {number}", _content(content)


def _contents() -> list[RecordDict]:
    """Return contents that are no reply's."""
    empty = cast(Any, {})
    return [
        RecordDict(),
        RecordDict({"x" * 1_000_000: MetricRecord({"a": 1})}),
        RecordDict({messages.METRICS: MetricRecord(empty)}),
        RecordDict({messages.METRICS: ConfigRecord({"a": "b" * 1_000_000})}),
        RecordDict({messages.METRICS: ArrayRecord(empty)}),
        RecordDict({messages.ARRAYS: MetricRecord({"a": 1})}),
        RecordDict({messages.ARRAYS: ArrayRecord(empty)}),
        RecordDict({messages.GRADIENTS: ArrayRecord(empty)}),
        RecordDict({messages.CONFIG: ConfigRecord({messages.SITE: 7})}),
        RecordDict({messages.CONFIG: ConfigRecord({messages.SITE: ["a", "b"]})}),
        RecordDict({messages.CONFIG: ConfigRecord({messages.SITE: b"\xff\xfe"})}),
    ]
