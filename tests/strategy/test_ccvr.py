"""Test CCVR's round: the statistics it keeps, and the classifier it calibrates."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from flwr.app import ArrayRecord, Message
from torch.nn import functional

from client_app.class_statistics import class_statistics
from clip2fl_common import messages
from clip2fl_common.config import Scalar
from clip2fl_common.messages import StatisticsFormat
from clip2fl_common.models import build_model
from clip2fl_common.randomness import generator
from strategy.ccvr import CCVR
from strategy.creff import CLASSIFIER
from strategy.retraining import retrain_classifier
from tests.federation import federate, metrics
from tests.strategy.messages import (
    client_plan,
    configure,
    made,
    safeguards,
    train_reply,
)

CLASSES, WIDTH, DIM, VIRTUAL = 3, 64, 80, 50
# The classes of each client's images.
HELD = {0: [0, 0, 0, 0, 1, 1], 1: [1, 1, 1, 1], 2: [1, 0, 0, 0, 0, 0]}

Features = dict[int, tuple[torch.Tensor, torch.Tensor]]


def ccvr(per_round: int = 3, **changes: Any) -> CCVR:
    """Return a small CCVR whose pooled features are narrower than the projected."""
    settings: dict[str, Scalar] = {
        "ccvr__virtual_features": VIRTUAL,
        "retraining__epochs": 3,
        "retraining__learning_rate": 0.05,
        **safeguards(),
        **changes,
    }
    plan = client_plan(clients=3, per_round=per_round)
    return made(CCVR, plan, (CLASSES, DIM), **settings)


def model() -> ArrayRecord:
    """Return the arrays of a global model."""
    torch.manual_seed(0)
    return messages.model_to_arrays(build_model("resnet8-slim", CLASSES, DIM))


def images_of(held: Mapping[int, Sequence[int]], seed: int = 0) -> Features:
    """Return features and labels of each client's images, well apart by class."""
    rng = np.random.default_rng(seed)
    return {
        client: (
            torch.from_numpy(rng.normal(size=(len(labels), WIDTH)) + np.c_[labels] * 2),
            torch.tensor(labels, dtype=torch.int64),
        )
        for client, labels in held.items()
    }


def replies_of(
    strategy: CCVR, features: Features, server_round: int = 1
) -> list[Message]:
    """Return replies with the statistics of each client that trains."""
    arrays = model()
    replies = []
    for request in configure(strategy, arrays, server_round):
        config = request.content.config_records[messages.CONFIG]
        own, labels = features[int(str(config[messages.PARTITION]))]
        reply = train_reply(
            request, {n: a.numpy() for n, a in arrays.items()}, max(1, len(labels))
        )
        reply.content[messages.CLASS_STATISTICS] = StatisticsFormat(
            CLASSES, WIDTH
        ).encode(class_statistics(own, labels))
        replies.append(reply)
    return replies


def run_round(strategy: CCVR, features: Features, server_round: int = 1) -> None:
    result, _ = strategy.aggregate_train(
        server_round, replies_of(strategy, features, server_round)
    )
    assert result is not None


def slow_classifier(
    images: Sequence[tuple[torch.Tensor, torch.Tensor]], server_round: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the calibrated classifier, by numpy from the features of all images."""
    features = np.concatenate([own.numpy() for own, _ in images])
    labels = np.concatenate([of_client.numpy() for _, of_client in images])
    normal = torch.randn(
        CLASSES,
        VIRTUAL,
        WIDTH,
        generator=generator(7, "virtual-features", server_round),
    ).numpy()
    drawn: list[npt.NDArray[np.float64]] = []
    known = np.unique(labels)
    for c in known:
        pooled = features[labels == c]
        covariance = np.zeros((WIDTH, WIDTH))
        if len(pooled) > 1:
            covariance = np.cov(pooled, rowvar=False)
        values, vectors = np.linalg.eigh(covariance)
        root = vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T
        drawn.append(pooled.mean(0) + normal[c] @ root)
    arrays = model()
    weight, bias = (
        torch.from_numpy(arrays[f"projection.{name}"].numpy().copy())
        for name in ("weight", "bias")
    )
    narrow = torch.from_numpy(np.stack(drawn)).float()
    classifier = retrain_classifier(
        functional.linear(narrow, weight, bias),
        epochs=3,
        batch_size=32,
        learning_rate=0.05,
        generator=generator(7, "retraining", server_round),
        classes=torch.from_numpy(known),
        num_classes=CLASSES,
    )
    return classifier.weight, classifier.bias


def assert_classifier(strategy: CCVR, expected: tuple[torch.Tensor, ...]) -> None:
    for found, wanted in zip(strategy.classifier.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_classifier_is_calibrated_on_the_pooled_features() -> None:
    """Class 2 is held by no client: its output is trained, its features are not."""
    strategy, images = ccvr(), images_of(HELD)
    before = strategy.classifier.weight.clone()
    run_round(strategy, images)
    assert not torch.allclose(strategy.classifier.weight, before, atol=1e-2)
    assert_classifier(strategy, slow_classifier(list(images.values()), 1))
    assert {"sampling", "retraining"} <= strategy.round.seconds.keys()


def test_last_statistics_of_absent_clients_stay() -> None:
    """Each client counts once, with what it sent last."""
    strategy = ccvr(per_round=2)
    latest: Features = {}
    seen = []
    for server_round in (1, 2, 3):
        images = images_of(HELD, server_round)
        run_round(strategy, images, server_round)
        clients = [int(client) for client in strategy.round.clients]
        seen.append(set(clients))
        latest |= {client: images[client] for client in clients}
        expected = slow_classifier(list(latest.values()), server_round)
        assert_classifier(strategy, expected)
    assert len(set.union(*seen)) == 3 and any(a != b for a, b in pairwise(seen))


def test_client_that_has_no_class_any_more_counts_no_more() -> None:
    strategy, images = ccvr(), images_of(HELD)
    run_round(strategy, images)
    images[0] = (torch.empty(0, WIDTH), torch.empty(0, dtype=torch.int64))
    run_round(strategy, images, 2)
    assert_classifier(strategy, slow_classifier([images[1], images[2]], 2))


def test_without_any_statistics_the_classifier_stays(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    strategy, images = ccvr(), images_of({client: [] for client in HELD})
    before = strategy.classifier.weight.clone()
    run_round(strategy, images)
    assert torch.equal(strategy.classifier.weight, before)
    assert "no client has sent statistics of class 0, 1, 2" in flower_log.text


def test_warm_start_begins_with_the_last_classifier() -> None:
    """Without epochs of consequence the classifier hardly moves from its start."""
    images = images_of(HELD)
    tiny: dict[str, Any] = {"retraining__learning_rate": 1e-9}
    warm, fresh = ccvr(retraining__init="warm", **tiny), ccvr(**tiny)
    for strategy, close in ((warm, True), (fresh, False)):
        before = strategy.classifier.weight.clone()
        run_round(strategy, images)
        assert torch.allclose(strategy.classifier.weight, before, atol=1e-5) == close


def test_restored_state_continues_alike() -> None:
    first, second = ccvr(per_round=2), ccvr(per_round=2)
    second.load_state(ccvr(per_round=2).state())  # of a run before its first round
    for server_round in (1, 2):
        run_round(first, images_of(HELD, server_round), server_round)
    second.load_state(first.state())
    assert first.state().keys() == second.state().keys()
    for strategy in (first, second):
        run_round(strategy, images_of(HELD, 3), 3)
    for name, tensor in first.state().items():
        assert torch.equal(tensor, second.state()[name]), name


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ([4, 3], "class statistics of 7 images, but the client has 6"),
        ([2**62, 2**62], "images, but the client has 6"),
        ([4, 2], "class gradients or statistics imply features with the norm"),
    ],
)
def test_impossible_statistics_are_dropped_with_their_model(
    flower_log: pytest.LogCaptureFixture, counts: list[int], reason: str
) -> None:
    strategy, expected, images = ccvr(), ccvr(), images_of(HELD)
    replies = replies_of(strategy, images)
    record = replies[0].content.array_records[messages.CLASS_STATISTICS]
    record["counts"] = messages.state_to_arrays({"n": torch.tensor(counts)})["n"]
    if "norm" in reason:
        means = torch.from_numpy(record["means"].numpy().copy()) * 100
        record["means"] = messages.state_to_arrays({"m": means})["m"]
    strategy.aggregate_train(1, replies)
    expected.aggregate_train(1, replies_of(expected, images)[1:])
    assert strategy.round.dropped == 1
    assert reason in flower_log.text
    assert torch.equal(strategy.classifier.weight, expected.classifier.weight)


def test_statistics_of_a_round_of_two_do_not_stay(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    """Two clients cannot tell which of them lies; three can, a round later."""
    strategy = ccvr(per_round=2)
    images = images_of(HELD)
    replies = replies_of(strategy, images)
    record = replies[0].content.array_records[messages.CLASS_STATISTICS]
    means = torch.from_numpy(record["means"].numpy().copy()) * 1000
    record["means"] = messages.state_to_arrays({"m": means})["m"]
    strategy.aggregate_train(1, replies)
    liar = strategy.round.clients[0]
    for server_round in range(2, 30):
        run_round(strategy, images, server_round)
        if (
            liar not in strategy.round.clients
            and "left out the class" in flower_log.text
        ):
            break
    assert f"left out the class statistics of {liar}" in flower_log.text


def test_statistics_that_overflow_change_nothing(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    """The check of norms is off; later rounds go on without the client's statistics."""
    off: dict[str, Any] = {"aggregation__max_length_ratio": 0.0}
    strategy, images = ccvr(**off), images_of(HELD)
    run_round(strategy, images)
    before = strategy.state()
    replies = replies_of(strategy, images, 2)
    record = replies[0].content.array_records[messages.CLASS_STATISTICS]
    huge = {
        "means": np.full(record["means"].shape, 1e12, np.float32),
        "projection.weight": np.full((DIM, WIDTH), 1e12, np.float32),
    }
    record["means"] = messages.numpy_to_arrays(huge)["means"]
    strategy.sent = {**strategy.sent, "projection.weight": huge["projection.weight"]}
    strategy.aggregate_train(2, replies)
    assert "the calibrated classifier is not finite" in flower_log.text
    for name, tensor in strategy.state().items():
        if name.startswith((CLASSIFIER, "class-statistics")):
            assert torch.equal(tensor, before[name]), name
    run_round(strategy, images, 3)
    assert_classifier(strategy, slow_classifier(list(images.values()), 3))


def test_summary_names_every_setting(flower_log: pytest.LogCaptureFixture) -> None:
    with flower_log.at_level("INFO", logger="flwr"):
        ccvr().summary()
    for text in (
        "features 64 wide, 8592 bytes for each class",
        "Virtual features per class: 50",
        "fresh start, 3 epochs, batch size 32, learning rate 0.05",
        "Drawn each round: 3 of 3 (seed 7)",
    ):
        assert text in flower_log.text


@pytest.mark.usefixtures("federation_process")
def test_short_run_learns(tmp_path: Path) -> None:
    """Chance is 10 %; the run reached 34 % when this test was written."""
    settings: dict[str, Any] = {
        "dataset__demo_train_per_class": 100,
        "dataset__demo_test_per_class": 20,
        "dataset__image_size": 16,
        "partition__clients": 2,
        "partition__alpha": 100.0,
        "client__epochs": 6,
        "client__batch_size": 16,
        "client__optimizer": "muon",
        "client__learning_rate": 0.02,
        "federation__rounds": 3,
        "retraining__epochs": 50,
    }
    federate(tmp_path / "run", "ccvr", **settings)
    accuracy = metrics(tmp_path / "run")[-1]["accuracy"]
    assert accuracy["retrained"]["balanced"] > 20
