"""Whole federations with secure aggregation, beside the same ones without."""

import gc
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict

from client_app.round import train_round
from client_app.secure_sum import SecureParty
from clip2fl_common.config import ConfigError, RunConfig, Scalar
from clip2fl_common.messages import METRICS, PARTITION
from clip2fl_common.messages.secure import (
    SecureRequest,
    key_reply,
    partition_in,
    reveal_reply,
)
from clip2fl_common.messages.sums import SumFormat
from clip2fl_common.messages.vectors import WIDE
from clip2fl_common.secure.statements import RoundName, SignedKey, key_statement
from server_app.app import main
from server_app.checkpoints import load_checkpoint
from strategy.registry import method_named
from strategy.safeguards import NoRepliesError
from tests.conftest import be_flower
from tests.defaults import run_config
from tests.flower_private import wire_bytes
from tests.in_process_grid import InProcessGrid, Tamper, client_of
from tests.strategy.messages import client_plan, made

CLIENTS = 4


class Interfering(InProcessGrid):
    """Loses a client's answer to one kind of message in one round."""

    kind, client, at = "", 0, 1

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Return the replies without the one that is lost."""
        requests = list(messages)
        replies = super().send_and_receive(requests, timeout=timeout)
        if not requests or requests[0].metadata.message_type != self.kind:
            return replies
        self.at -= 1
        return [r for r in replies if self.at != 0 or self._client(r) != self.client]

    def _client(self, reply: Message) -> int:
        return client_of(reply) if self.kind == "train" else partition_in(reply.content)


@pytest.fixture
def federate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs a tiny federation, each with a cache of its own."""

    def run(
        name: str,
        lost: tuple[str, int, int] | None = None,
        setup: Any = lambda grid: None,
        tamper: Tamper | None = None,
        **changes: Scalar,
    ) -> InProcessGrid:
        be_flower(tmp_path / f"cache-{name}", monkeypatch)
        settings: dict[str, Scalar] = {
            "method": "fedavg",
            "aggregation__secure": True,
            "partition__clients": CLIENTS,
            "federation__clients_per_round": CLIENTS,
            "run__dir": str(tmp_path),
            "run__name": name,
        }
        config: RunConfig = run_config(**{**settings, **changes})
        grid = Interfering(config, 2, order_seed=5, tamper=tamper)
        if lost is not None:
            grid.kind, grid.client, grid.at = lost
        setup(grid)
        main(grid, Context(1, 0, {}, RecordDict(), cast(Any, config.to_flat())))
        return grid

    return run


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def model(folder: Path, server_round: int) -> dict[str, npt.NDArray[Any]]:
    """Return the global model after a round."""
    state = load_checkpoint(folder, server_round).model
    return {
        name: values.numpy()
        for name, values in state.items()
        if values.is_floating_point()
    }


def same(found: Any, expected: Any, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(
            found[name], values, rtol=tolerance, atol=tolerance, err_msg=name
        )


def test_model_is_the_plain_one_within_the_bound(
    federate: Any, tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    federate("plain", aggregation__secure=False)
    federate("secure")
    # Half a step for each client, divided by the number of images: at least one each.
    bound = WIDE.step(CLIENTS) / 2
    # Both models are rounded to float32, and the plain one in each addition.
    same(model(tmp_path / "secure", 1), model(tmp_path / "plain", 1), bound + 1e-6)
    for secure, plain in zip(
        metrics(tmp_path / "secure"), metrics(tmp_path / "plain"), strict=True
    ):
        assert secure["clients"] == plain["clients"]
        assert secure["losses"] == pytest.approx(plain["losses"], abs=1e-3)
        assert secure["unreadable_images"] == plain["unreadable_images"]
        assert "lost" not in secure and not secure["kept_model"]
        assert secure["dropped_replies"] == 0
    assert any("protects nothing" in line for line in flower_log.messages)


@pytest.mark.parametrize("method", ["clip2fl", "fedlda"])
def test_statistics_of_classes_are_summed(
    federate: Any, tmp_path: Path, method: str
) -> None:
    """Class gradients by their directions, moments as sums."""
    rounds = {"federation__rounds": 1, "upload__precision": "full"}
    federate("plain", method=method, aggregation__secure=False, **rounds)
    federate("secure", method=method, **rounds)
    plain, secure = (
        load_checkpoint(tmp_path / name, 1).strategy for name in ("plain", "secure")
    )
    names = {
        "clip2fl": ["federated-features", "retrained-classifier.weight"],
        "fedlda": ["class-moments.count", "class-moments.total"],
    }[method]
    for name in names:
        torch.testing.assert_close(secure[name], plain[name], rtol=1e-3, atol=1e-3)


def test_only_masked_sums_leave_a_client(federate: Any, tmp_path: Path) -> None:
    grid = federate("secure", method="clip2fl", federation__rounds=1)
    trained = [r for r in grid.replies if r.metadata.message_type == "train"]
    assert len(trained) == CLIENTS
    for reply in trained:
        assert set(reply.content) == {"masked-sums", "metrics"}
        assert set(reply.content.metric_records["metrics"]) == {"partition-id"}
    kinds = [reply.metadata.message_type for reply in grid.replies]
    for kind in ("train.keys", "train.commit", "train.reveal"):
        assert kinds.count(kind) == CLIENTS
    # All vectors have one size, whichever classes a client holds.
    assert len({len(wire_bytes(reply)) for reply in trained}) == 1


def needles(replies: Iterable[RecordDict], sent: RecordDict) -> Iterator[bytes]:
    """Yield pieces of what single clients would send, in several forms."""
    for reply in replies:
        images = cast(int, reply.metric_records["metrics"]["num-examples"])
        for name in ("conv1.weight", "classifier.weight"):
            local = reply.array_records["arrays"][name].numpy().reshape(-1)[:12]
            before = sent.array_records["arrays"][name].numpy().reshape(-1)[:12]
            update = local.astype(np.float64) - before
            yield local.tobytes()
            yield local.astype(np.float64).tobytes()
            yield update.tobytes()
            yield update.astype(np.float32).tobytes()
            yield (images * update).tobytes()
            yield WIDE.encode(images * update, CLIENTS).tobytes()


def reachable(root: object) -> Iterator[bytes]:
    """Yield all bytes and arrays that an object's memory holds."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(
            found, type | ModuleType | FunctionType | MethodType | logging.Logger
        ):
            continue
        seen.add(id(found))
        if isinstance(found, bytes | bytearray):
            yield bytes(found)
        elif isinstance(found, np.ndarray):
            yield found.tobytes()
        elif isinstance(found, torch.Tensor):
            yield found.detach().cpu().numpy().tobytes()
        waiting += gc.get_referents(found)


@pytest.mark.parametrize("secure", [True, False])
def test_no_message_and_no_memory_of_the_server_has_a_clients_update(
    federate: Any, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    """The same search finds the updates where secure aggregation is off."""
    plain: list[RecordDict] = []
    methods: list[Any] = []

    def recorded(*arguments: Any) -> RecordDict:
        plain.append(train_round(*arguments))
        return plain[-1]

    def made(name: str) -> Any:
        def make(setting: Any) -> Any:
            methods.append(method_named(name)(setting))
            return methods[-1]

        return make

    monkeypatch.setattr("client_app.app.train_round", recorded)
    monkeypatch.setattr("server_app.app.method_named", made)
    grid = federate("run", aggregation__secure=secure, federation__rounds=1)
    assert len(plain) == CLIENTS
    searched = list(needles(plain, grid.requests[0].content))
    wires = [wire_bytes(reply) for reply in grid.replies]
    found = [n for n in searched if any(n in wire for wire in wires)]
    assert bool(found) is not secure
    if secure:
        memory = list(reachable([vars(method) for method in methods]))
        assert sum(map(len, memory)) > 100_000  # the model that was sent is there
        assert not [n for n in searched if any(n in part for part in memory)]


def test_client_lost_before_its_masked_sums_costs_only_its_update(
    federate: Any, tmp_path: Path
) -> None:
    """As a plain federation in which the same client's reply is lost."""
    for kind in ("train", "train.keys"):
        federate(f"secure-{kind}", lost=(kind, 2, 1), federation__rounds=1)
    federate(
        "plain", lost=("train", 2, 1), federation__rounds=1, aggregation__secure=False
    )
    for kind in ("train", "train.keys"):
        (line,) = metrics(tmp_path / f"secure-{kind}")
        assert line["clients"] == [0, 1, 3] and not line["kept_model"]
        same(model(tmp_path / f"secure-{kind}", 1), model(tmp_path / "plain", 1), 2e-6)


def test_node_that_answers_for_anothers_client_costs_only_its_update(
    federate: Any, tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    """Client 1 says that it is client 0, which another node simulates."""

    def tamper(request: Message, reply: Message) -> Message:
        if client_of(reply) == 1:
            reply.content.metric_records[METRICS][PARTITION] = 0
        return reply

    federate("run", tamper=tamper)
    for line in metrics(tmp_path / "run"):
        assert line["clients"] == [0, 2, 3] and not line["kept_model"]
    assert sum("it answers for client 0, and" in m for m in flower_log.messages) == 2


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("train.commit", "client 2 did not sign the set to be summed: no answer in t"),
        ("train.reveal", "client 2 did not reveal its seeds: no answer in time"),
    ],
)
def test_client_lost_after_its_masked_sums_costs_the_round(
    federate: Any, tmp_path: Path, kind: str, reason: str
) -> None:
    federate("run", lost=(kind, 2, 1))
    first, second = metrics(tmp_path / "run")
    assert first["kept_model"] and first["clients"] == []
    assert first["lost"].startswith(reason)
    assert not second["kept_model"] and "lost" not in second
    assert second["clients"] == [0, 1, 2, 3]


def test_too_few_masked_sums_make_no_model(federate: Any, tmp_path: Path) -> None:
    federate("run", lost=("train", 2, 1), federation__min_replies=4)
    first, second = metrics(tmp_path / "run")
    assert first["kept_model"]
    assert first["lost"] == "masked sums of 3 of 4 clients, and 4 are needed"
    assert not second["kept_model"]


def test_without_enough_keys_nobody_trains(federate: Any, tmp_path: Path) -> None:
    grid = federate(
        "run",
        lost=("train.keys", 2, 1),
        partition__clients=3,
        federation__clients_per_round=3,
    )
    first, second = metrics(tmp_path / "run")
    assert first["kept_model"]
    assert first["lost"] == "2 clients sent a key, and 3 are needed"
    assert not second["kept_model"] and second["clients"] == [0, 1, 2]
    assert len(grid.requests) == 3


@pytest.mark.parametrize(
    ("public", "clients", "reason"),
    [
        (bytes(32), [1], "no secret can be agreed on with its key"),
        (bytes(31), [1], "no secret can be agreed on with its key"),
        (b"9" * 32, [0, 1], "another client sent the same key"),
    ],
    ids=["weak", "short", "shared"],
)
def test_signed_key_that_no_party_accepts_costs_only_its_owner(
    federate: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flower_log: pytest.LogCaptureFixture,
    public: bytes,
    clients: list[int],
    reason: str,
) -> None:
    keys = SecureParty.keys

    def hostile(self: SecureParty, request: SecureRequest) -> RecordDict:
        honest, own = keys(self, request), self.identity
        if request.partition not in clients:
            return honest
        name = RoundName(self.run, request.server_round, request.session)
        signed = own.sign(key_statement(name, own.name, public))
        return key_reply(request.partition, SignedKey(own.name, public, signed))

    monkeypatch.setattr(SecureParty, "keys", hostile)
    federate("run", partition__clients=5, federation__clients_per_round=5)
    for line in metrics(tmp_path / "run"):
        assert line["clients"] == sorted({0, 1, 2, 3, 4} - set(clients))
        assert not line["kept_model"]
    told = [m for m in flower_log.messages if "sent no usable key to train" in m]
    assert len(told) == 2 * len(clients) and all(reason in m for m in told)


def test_sum_that_is_far_too_long_is_dropped(
    federate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client adds a huge update; nobody can tell which one did."""
    encode = SumFormat.encode
    calls = 0

    def huge(self: SumFormat, values: Any, parties: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            values = {**values, "model.classifier.bias": np.full(10, 1e6)}
        return encode(self, values, parties)

    monkeypatch.setattr(SumFormat, "encode", huge)
    federate("run")
    first, second = metrics(tmp_path / "run")
    assert first["kept_model"]
    assert first["lost"].startswith("of the sum: its update has the norm")
    assert "aggregation.max-length-ratio = 10" in first["lost"]
    assert not second["kept_model"]


def test_wrong_seed_spoils_the_round_and_nothing_else(
    federate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that lies in the last exchange makes the sum random."""
    calls = 0

    def lying(partition: int, revealed: Any) -> RecordDict:
        nonlocal calls
        calls += 1
        if calls == 1:
            revealed = type(revealed)(b"x" * 32, revealed.pairs)
        return reveal_reply(partition, revealed)

    monkeypatch.setattr("client_app.secure_sum.reveal_reply", lying)
    federate("run")
    first, second = metrics(tmp_path / "run")
    assert first["kept_model"] and first["lost"].startswith("the sum is of ")
    assert not second["kept_model"]


def test_run_without_any_sum_ends(federate: Any) -> None:
    def refuse(grid: Any) -> None:
        def tamper(request: Message, reply: Message) -> Message:
            return Message(Error(2, "out of memory"), reply_to=request)

        grid._tamper = tamper

    with pytest.raises(NoRepliesError, match="masked sums of 0 of 4 clients, and 3"):
        federate("run", setup=refuse, federation__rounds=9)


def test_noisy_models_are_summed_as_they_are(federate: Any, tmp_path: Path) -> None:
    """Neither client nor server shortens or drops what noise has made long."""
    noise = {
        "aggregation__max_update_norm": 0.01,
        "privacy__model_noise_multiplier": 0.5,
        "federation__rounds": 1,
    }
    plain = federate("plain", aggregation__secure=False, **noise)
    federate("secure", **noise)
    sent = plain.requests[0].content.array_records["arrays"]
    for reply in plain.replies:
        if reply.metadata.message_type == "train":
            arrays = reply.content.array_records["arrays"]
            name = "projection.weight"
            update = arrays[name].numpy() - sent[name].numpy()
            # The update itself has the norm 0.01, over 115,000 values.
            assert update.std() == pytest.approx(0.5 * 2 * 0.01, rel=0.02)
    same(model(tmp_path / "secure", 1), model(tmp_path / "plain", 1), 2e-6)
    for name in ("plain", "secure"):
        (line,) = metrics(tmp_path / name)
        assert line["dropped_replies"] == 0 and line["shortened"]["updates"] == 0
        assert set(line["privacy"]) == {"models"}


@pytest.mark.parametrize(
    ("name", "classes", "refused"),
    [("clip2fl", 700, False), ("clip2fl", 800, True), ("fedlda", 5000, False)],
)
def test_sums_that_no_machine_was_tried_with_are_refused_at_the_start(
    name: str, classes: int, refused: bool
) -> None:
    """C matrices of C times d numbers in 32 bits, with d = 512 of the default."""
    method = method_named(name)
    plan, shape = client_plan(4, 4), (classes, 512)
    prototypes = torch.eye(classes, 512) if method.needs_teacher else None
    changes: dict[str, Scalar] = {"method": name, "aggregation__secure": True}
    if not refused:
        made(method, plan, shape, prototypes, **changes)
        return
    with pytest.raises(ConfigError, match=r"1\.31 GB in each round .* Use method"):
        made(method, plan, shape, prototypes, **changes)
