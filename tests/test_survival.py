"""A run survives hostile clients: real ServerApp and ClientApps in one process."""

import json
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)

from clip2fl_common import messages
from clip2fl_common.config import Scalar
from server_app import checkpoints as resume
from server_app.app import main
from strategy.clients import find_nodes, found_later
from tests.defaults import run_config
from tests.federation import metrics
from tests.in_process_grid import InProcessGrid, Tamper

pytestmark = pytest.mark.usefixtures("federation_process")

HOSTILE = 1
TRAIN = {"partition__clients": 4, "federation__clients_per_round": 4}


def run(
    folder: Path, tamper: Tamper | None, method: str = "fedavg", **changes: Scalar
) -> None:
    """Run a federation of four clients into a folder, or go on with the one there."""
    there = {"run__resume": str(folder)} if folder.exists() else {}
    settings: dict[str, Scalar] = {
        "method": method,
        "run__dir": str(folder.parent),
        "run__name": folder.name,
        "federation__rounds": 5,
    }
    config = run_config(**{**settings, **TRAIN, **there, **changes})
    grid = InProcessGrid(config, 4, 1, tamper)
    main(grid, Context(1, 0, {}, RecordDict(), cast(Any, config.to_flat())))


def partition(request: Message) -> int:
    return cast(int, request.content.config_records["config"][messages.PARTITION])


def server_round(request: Message) -> int:
    return cast(int, request.content.config_records["config"][messages.ROUND])


def filled(reply: Message, value: float) -> Message:
    """Let all weights be this number."""
    model = reply.content.array_records[messages.ARRAYS]
    for name, array in list(model.items()):
        model[name] = Array(np.full(tuple(array.shape), value, np.float32))
    return reply


def hostile(change: Callable[[Message], Message], rounds: range = range(99)) -> Tamper:
    """Change one client's replies in some rounds."""

    def tamper(request: Message, reply: Message) -> Message:
        chosen = partition(request) == HOSTILE and server_round(request) in rounds
        return change(reply) if chosen and not reply.has_error() else reply

    return tamper


@pytest.mark.parametrize("value", [1e3, 1e6, 1e12])
@pytest.mark.parametrize("method", ["fedavg", "creff", "clip2flm"])
def test_one_client_with_huge_weights_is_dropped_and_named(
    tmp_path: Path,
    method: str,
    value: float,
    flower_log: pytest.LogCaptureFixture,
) -> None:
    run(tmp_path / "run", hostile(lambda r: filled(r, value)), method)
    rounds = metrics(tmp_path / "run")
    assert [line["dropped_replies"] for line in rounds] == [1] * 5
    assert all(line["clients"] == [0, 2, 3] for line in rounds)
    dropped = [m for m in flower_log.messages if "dropped the reply of node" in m]
    assert len(dropped) == 5
    assert all("aggregation.max-length-ratio = 10" in line for line in dropped)


def test_honest_rounds_drop_nobody(tmp_path: Path) -> None:
    run(tmp_path / "run", None, "clip2fl", partition__alpha=0.1)
    assert [line["dropped_replies"] for line in metrics(tmp_path / "run")] == [0] * 5


@pytest.mark.parametrize("method", ["fedavg", "clip2flm"])
def test_poisoned_round_is_undone_and_its_makers_are_left_out(
    tmp_path: Path, method: str, flower_log: pytest.LogCaptureFixture
) -> None:
    """The rule is off, so that the poison gets into the model of round 2."""
    run(
        tmp_path / "run",
        hostile(lambda r: filled(r, 1e12), range(2, 3)),
        method,
        aggregation__max_length_ratio=0.0,
    )
    rounds = metrics(tmp_path / "run")
    assert [line["went_back_to"] for line in rounds] == [None, None, 1, None, None]
    assert rounds[2]["left_out"] == [0, 1, 2, 3]
    assert rounds[2]["kept_model"]
    # All four made it: half of a round comes back, the longest update last.
    assert all(HOSTILE not in line["clients"] for line in rounds[3:])
    assert all(len(line["clients"]) == 2 for line in rounds[3:])
    # What round 3 evaluates and keeps is round 1's model again.
    assert rounds[2]["accuracy"] == rounds[0]["accuracy"]
    assert any(
        "round 2 is at fault; the run goes on with the model of round 1" in m
        for m in flower_log.messages
    )


def test_poisoned_checkpoint_can_be_resumed(tmp_path: Path) -> None:
    """The run stopped right after the poison; the newest checkpoint holds it."""
    poison = hostile(lambda r: filled(r, 1e12), range(2, 3))
    settings: dict[str, Any] = {"aggregation__max_length_ratio": 0.0}
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        def tamper(request: Message, reply: Message) -> Message:
            if server_round(request) == 3:
                stop()
            return poison(request, reply)

        patch.setattr("server_app.run.open_trackers", lambda *_: [])
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", tamper, **settings)
    assert resume.load_newest(tmp_path / "run").round == 2
    run(tmp_path / "run", None, **settings)
    rounds = metrics(tmp_path / "run")
    assert [line["went_back_to"] for line in rounds] == [None, None, 1, None, None]
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_going_back_is_the_same_after_an_interruption(tmp_path: Path) -> None:
    """Who is left out is part of a checkpoint."""
    poison = hostile(lambda r: filled(r, 1e12), range(2, 3))
    settings: dict[str, Any] = {"aggregation__max_length_ratio": 0.0}
    run(tmp_path / "whole", poison, **settings)

    def tamper(request: Message, reply: Message) -> Message:
        if server_round(request) == 4:
            raise KeyboardInterrupt
        return poison(request, reply)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", tamper, **settings)
    run(tmp_path / "parts", None, **settings)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_bad_model_over_several_rounds_is_undone_step_by_step(tmp_path: Path) -> None:
    """Rounds 2 to 4 seem fine; then it shows that none of their models is."""

    def tamper(request: Message, reply: Message) -> Message:
        if server_round(request) in (5, 6, 7):
            return Message(Error(messages.DIVERGED, "nan"), reply_to=request)
        return reply

    run(
        tmp_path / "run",
        tamper,
        federation__rounds=8,
        checkpoint__keep=9,
    )
    rounds = metrics(tmp_path / "run")
    went = [line["went_back_to"] for line in rounds]
    assert went == [None, None, None, None, 3, 2, 1, None]
    assert rounds[6]["accuracy"] == rounds[0]["accuracy"]


def test_run_that_never_gets_further_still_stops(tmp_path: Path) -> None:
    """It goes back twice: no single client can still be the reason then."""

    def tamper(request: Message, reply: Message) -> Message:
        if server_round(request) % 2:
            return reply
        return Message(Error(messages.DIVERGED, "nan"), reply_to=request)

    with pytest.raises(
        RuntimeError, match=r"round 6: training diverged.*lower client\.learning-rate"
    ):
        run(tmp_path / "run", tamper, federation__rounds=30)
    assert [x["went_back_to"] for x in metrics(tmp_path / "run")] == [
        *(None, 0, None, 0, None)
    ]


@pytest.mark.parametrize(
    "answer",
    [
        RecordDict(),
        RecordDict({"metrics": MetricRecord({"x": 1})}),
        RecordDict({"metrics": MetricRecord({messages.PARTITION: 0.5})}),
        RecordDict({"metrics": MetricRecord({messages.PARTITION: -1})}),
        RecordDict({"metrics": MetricRecord({"a" * 20_000_000: 1})}),
        RecordDict({"metrics": ConfigRecord({messages.PARTITION: "\x1b[31m0\n"})}),
        RecordDict({"metrics": ArrayRecord({})}),
        Error(2, "\x1b[31mred\nline" * 10**6),
    ],
)
def test_malformed_answers_to_queries_are_passed_over(
    answer: RecordDict | Error,
) -> None:
    class Grid(InProcessGrid):
        def send_and_receive(self, messages: Any, *, timeout: Any = None) -> Any:
            first, *rest = list(messages)
            return [Message(answer, reply_to=first), *super().send_and_receive(rest)]

    nodes = find_nodes(Grid(run_config(), 3))
    assert len(nodes) == 2

    class Alone(InProcessGrid):
        def send_and_receive(self, messages: Any, *, timeout: Any = None) -> Any:
            return [Message(answer, reply_to=m) for m in messages]

    with pytest.raises(RuntimeError) as caught:
        find_nodes(Alone(run_config(), 2))
    text = str(caught.value)
    assert text.isprintable() and len(text) < 1000


def test_nodes_are_looked_for_while_the_run_is_prepared() -> None:
    """The caller does not wait; the result and the error come when it asks for them."""
    asked, prepared = Event(), Event()

    class Slow(InProcessGrid):
        def send_and_receive(self, messages: Any, *, timeout: Any = None) -> Any:
            asked.set()
            assert prepared.wait(60)
            return super().send_and_receive(messages)

    class Broken(InProcessGrid):
        def send_and_receive(self, messages: Any, *, timeout: Any = None) -> Any:
            raise OSError("no nodes")

    grid = Slow(run_config(), 3)
    found = found_later(grid)
    assert asked.wait(60)
    assert not found.done()
    prepared.set()
    assert found.result(60) == find_nodes(grid)
    assert len(set(found.result())) == 3
    with pytest.raises(OSError, match="no nodes"):
        found_later(Broken(run_config(), 2)).result(60)


def _named(reply: Message, name: str) -> Message:
    reply.content.metric_records[messages.METRICS][name] = 1.0
    return reply


def _array_named(reply: Message, name: str) -> Message:
    model = reply.content.array_records[messages.ARRAYS]
    model[name] = model[next(iter(model))]
    return reply


HOSTILE_NAME = "\x1b[2J\nround 1: all is well\u202e" + "x" * 20_000_000


@pytest.mark.parametrize("change", [_named, _array_named])
def test_texts_of_clients_are_bounded_and_escaped(
    tmp_path: Path,
    change: Callable[[Message, str], Message],
    flower_log: pytest.LogCaptureFixture,
) -> None:
    run(
        tmp_path / "run",
        hostile(lambda r: change(r, HOSTILE_NAME), range(1, 2)),
        federation__rounds=1,
    )
    (line,) = [m for m in flower_log.messages if "dropped the reply of node" in m]
    assert line.isprintable() and len(line) < 500
    assert "\\x1b[2J\\nround 1: all is well\\u202e" in line


def test_error_of_a_client_is_bounded_and_escaped(
    tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    def tamper(request: Message, reply: Message) -> Message:
        if partition(request) != HOSTILE:
            return reply
        return Message(Error(2, HOSTILE_NAME + "DatasetError"), reply_to=request)

    run(tmp_path / "run", tamper, federation__rounds=1)
    (line,) = [m for m in flower_log.messages if "dropped the reply of node" in m]
    assert line.isprintable() and len(line) < 500
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text("utf-8"))[
        "clients"
    ] == [0, 2, 3]
