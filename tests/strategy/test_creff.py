"""Test CReFF's round: its requests, its replies and the server's new state."""

import copy
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from flwr.app import Message

from clip2fl_common import messages
from clip2fl_common.class_gradients import (
    ClassGradient,
    LowRankGradient,
    Precision,
    encode_gradients,
)
from clip2fl_common.config import Scalar
from clip2fl_common.randomness import generator
from strategy.creff import CReFF
from strategy.fedavg import FedAvg
from strategy.retraining import retrain_classifier
from strategy.synthesis import (
    gradient_matching_loss,
    mean_class_gradients,
    synthesize,
)
from tests.strategy.messages import (
    client_plan,
    configure,
    global_model,
    made,
    random_gradients,
    random_model,
    safeguards,
    train_reply,
    wire_bytes,
)

CLASSES, PER_CLASS, DIM = 3, 4, 6
# The classes that each client holds. The keys seed the gradients.
HELD = {0: [0, 1, 2], 1: [1], 2: [2, 1]}


def creff(
    seed: int = 7,
    init: Literal["fresh", "warm"] = "fresh",
    upload: dict[str, Scalar] | None = None,
    final_step: float = 0.0,
    method: type[CReFF] = CReFF,
) -> CReFF:
    """Return a small CReFF."""
    uploads: dict[str, Scalar] = {"upload__precision": "full", **(upload or {})}
    return made(
        method,
        client_plan(clients=3, per_round=3, seed=seed),
        (CLASSES, DIM),
        synthesis__features_per_class=PER_CLASS,
        synthesis__steps=7,
        synthesis__learning_rate=0.2,
        synthesis__learning_rate_final=final_step,
        retraining__init=init,
        retraining__epochs=4,
        retraining__batch_size=5,
        retraining__learning_rate=0.05,
        federation__rounds=2,
        **uploads,
        **safeguards(),
    )


def gradients(held: dict[int, list[int]]) -> list[dict[int, ClassGradient]]:
    """Return each client's class gradients."""
    return [random_gradients(c, (CLASSES, DIM), seed) for seed, c in held.items()]


def round_of(
    strategy: CReFF, held: dict[int, list[int]], server_round: int = 1
) -> list[Message]:
    """Return the replies to a round's requests."""
    arrays = global_model()
    requests = configure(strategy, arrays, server_round)
    return [
        train_reply(request, random_model(arrays, seed), 10, of_client)
        for seed, (request, of_client) in enumerate(
            zip(requests, gradients(held), strict=True)
        )
    ]


def test_second_base_uses_its_replies_too() -> None:
    class Counting(FedAvg):
        counted = 0

        def use_replies(
            self, server_round: int, replies: Sequence[messages.TrainReply]
        ) -> None:
            super().use_replies(server_round, replies)
            self.counted += len(replies)

    class Joined(CReFF, Counting):
        pass

    strategy = creff(method=Joined)
    before = strategy.features
    strategy.aggregate_train(1, round_of(strategy, HELD))
    assert isinstance(strategy, Joined) and strategy.counted == len(HELD)
    assert not torch.equal(before, strategy.features)


def test_requests_carry_the_classifier() -> None:
    strategy = creff()
    for request in configure(strategy, global_model()):
        assert set(request.content) == {
            messages.ARRAYS,
            messages.CLASSIFIER,
            messages.CONFIG,
        }
        parsed = messages.TrainRequest.parse(request.content)
        assert parsed.classifier is not None
        weight, bias = parsed.classifier
        assert torch.equal(weight, strategy.classifier.weight)
        assert torch.equal(bias, strategy.classifier.bias)
        assert parsed.distillation_weight == 0
        assert parsed.teacher_fingerprint == ""
        assert parsed.proximal_mu == 0


def test_initial_state_comes_from_the_seed() -> None:
    """The same seed gives the same standard normal features and linear layer."""
    first, same, other = creff(7), creff(7), creff(8)
    assert first.features.shape == (CLASSES, PER_CLASS, DIM)
    assert torch.equal(first.features, same.features)
    assert torch.equal(first.classifier.weight, same.classifier.weight)
    assert not torch.equal(first.features, other.features)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    expected = torch.randn(CLASSES, PER_CLASS, DIM, generator=generator(7, "features"))
    assert torch.equal(first.features, expected)
    assert first.classifier.weight.abs().max() <= DIM**-0.5


@pytest.mark.parametrize(
    ("init", "steps"),
    [("fresh", (0.2, 0.2)), ("warm", (0.2, 0.2)), ("fresh", (0.2, 5.0))],
)
def test_round_equals_its_parts_called_by_hand(
    init: Literal["fresh", "warm"], steps: tuple[float, float]
) -> None:
    """Each of two rounds starts from the features and classifier of the one before."""
    strategy = creff(init=init, final_step=steps[1] if steps[1] != steps[0] else 0.0)
    classifier = copy.deepcopy(strategy.classifier)
    features = strategy.features.clone()
    weight = strategy.classifier.weight.detach().clone()
    bias = strategy.classifier.bias.detach().clone()
    for server_round in (1, 2):
        strategy.aggregate_train(server_round, round_of(strategy, HELD, server_round))

        mean = mean_class_gradients(gradients(HELD))
        features = synthesize(
            features,
            mean,
            weight,
            bias,
            None,
            steps=7,
            learning_rate=steps[server_round - 1],
            contrast_weight=0.0,
            temperature=1.0,
        )
        loss = gradient_matching_loss(features, mean, weight, bias)
        classifier = retrain_classifier(
            features,
            epochs=4,
            batch_size=5,
            learning_rate=0.05,
            generator=generator(7, "retraining", server_round),
            initial=classifier if init == "warm" else None,
        )
        weight, bias = classifier.weight.detach(), classifier.bias.detach()
        assert torch.equal(strategy.features, features)
        assert torch.equal(strategy.classifier.weight, weight)
        assert torch.equal(strategy.classifier.bias, bias)
        assert strategy.round.losses["gradient_matching"] == float(loss)
        assert {s for s in strategy.round.seconds if "clients-" not in s} == {
            "clients",
            "checks",
            "synthesis",
            "retraining",
            "aggregation",
        }


@pytest.mark.parametrize("precision", ["half", "full"])
def test_coded_gradients_are_used_as_the_clients_encoded_them(
    precision: Precision,
) -> None:
    """Class 0 has one direction at each client and is low-rank; others are dense."""
    strategy = creff(
        upload={"upload__precision": precision, "upload__min_cosine": 0.99}
    )
    arrays = global_model()
    encoded = []
    replies = []
    for seed, request in enumerate(configure(strategy, arrays)):
        own = random_gradients([0, 1, 2], (CLASSES, DIM), seed)
        own[0] = ClassGradient(torch.outer(own[1].bias, own[1].weight[0]), own[0].bias)
        encoded.append(encode_gradients(own, min_cosine=0.99, precision=precision))
        assert [isinstance(g, LowRankGradient) for g in encoded[-1].values()] == [
            True,
            False,
            False,
        ]
        model = random_model(arrays, seed)
        replies.append(train_reply(request, model, 10, encoded[-1], precision))
    weight, bias = (
        strategy.classifier.weight.detach(),
        strategy.classifier.bias.detach(),
    )
    mean = mean_class_gradients(encoded)
    expected = synthesize(
        strategy.features,
        {c: ClassGradient(g.weight, g.bias) for c, g in mean.items()},
        weight,
        bias,
        None,
        steps=7,
        learning_rate=0.2,
        contrast_weight=0.0,
        temperature=1.0,
    )
    strategy.aggregate_train(1, replies)
    assert strategy.round.dropped == 0
    torch.testing.assert_close(strategy.features, expected)


def test_gradients_that_were_not_asked_for_are_dropped(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    """Here the gradients have another precision than the run."""
    strategy = creff(upload={"upload__precision": "half"})
    replies = round_of(strategy, HELD)
    request = configure(strategy, global_model())[1]
    model = random_model(global_model(), 1)
    replies[1] = train_reply(request, model, 10, gradients(HELD)[1], "half")
    strategy.aggregate_train(1, replies)
    dropped = [m for m in flower_log.messages if "dropped the reply" in m]
    assert len(dropped) == 2
    assert all("weight has type float32, expected uint16" in line for line in dropped)
    assert strategy.round.clients == [1]


def test_next_request_carries_the_retrained_classifier() -> None:
    strategy = creff()
    before = strategy.classifier.weight.clone()
    strategy.aggregate_train(1, round_of(strategy, HELD))
    parsed = messages.TrainRequest.parse(
        configure(strategy, global_model(), 2)[0].content
    )
    assert parsed.classifier is not None
    assert torch.equal(parsed.classifier[0], strategy.classifier.weight)
    assert not torch.equal(parsed.classifier[0], before)


def test_class_gradients_stay_out_of_the_averaged_model() -> None:
    strategy = creff()
    result, _ = strategy.aggregate_train(1, round_of(strategy, HELD))
    assert result is not None
    assert set(result) == set(global_model())


def test_order_of_replies_changes_no_bit() -> None:
    outcomes = []
    for step in (1, -1):
        strategy = creff()
        strategy.aggregate_train(1, round_of(strategy, HELD)[::step])
        outcomes.append((strategy.features, strategy.classifier.weight))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])


def test_class_held_by_nobody_waits(flower_log: pytest.LogCaptureFixture) -> None:
    strategy = creff()
    before = strategy.features.clone()
    with flower_log.at_level("INFO", logger="flwr"):
        strategy.aggregate_train(1, round_of(strategy, {0: [0], 1: [0], 2: [2]}))
    assert torch.equal(strategy.features[1], before[1])
    assert not torch.equal(strategy.features[0], before[0])
    assert not torch.equal(strategy.features[2], before[2])
    (line,) = [m for m in flower_log.messages if "none of the clients" in m]
    assert line.startswith("round 1: none of the clients holds class 1;")


def test_bytes_include_classifier_and_gradients() -> None:
    strategy = creff()
    replies = round_of(strategy, HELD)
    model = wire_bytes(array.numpy() for array in global_model().values())
    classifier = wire_bytes(
        tensor.detach().numpy()
        for tensor in (strategy.classifier.weight, strategy.classifier.bias)
    )
    returned = sum(
        wire_bytes(array.numpy() for array in record.values())
        for reply in replies
        for record in reply.content.array_records.values()
    )
    gradients_of_each = [
        wire_bytes(
            array.numpy()
            for array in reply.content.array_records[messages.GRADIENTS].values()
        )
        for reply in replies
    ]
    strategy.aggregate_train(1, replies)
    assert strategy.round.bytes_down == 3 * (model + classifier)
    assert sum(strategy.round.upload_bytes) == returned
    assert strategy.round.gradient_bytes == gradients_of_each
    assert strategy.round.upload_bytes == [model + g for g in gradients_of_each]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (None, "records are ['arrays', 'metrics'], expected"),
        (
            random_gradients([0], (CLASSES, DIM + 1), 0),
            "array class-gradients.weight has shape (1, 3, 7), expected (1, 3, 6)",
        ),
        (
            random_gradients([CLASSES], (CLASSES, DIM), 0),
            "class gradients for classes [3]; they must differ and be from 0 to 2",
        ),
        (
            {0: ClassGradient(torch.full((CLASSES, DIM), torch.nan), torch.zeros(3))},
            "array class-gradients.weight has values that are not finite",
        ),
    ],
)
def test_bad_gradients_are_dropped_with_their_model(
    flower_log: pytest.LogCaptureFixture,
    bad: dict[int, ClassGradient] | None,
    reason: str,
) -> None:
    """The state is the same as without the client that sent them."""
    strategy, expected = creff(), creff()
    arrays = global_model()
    replies = round_of(strategy, HELD)
    request = configure(strategy, arrays)[0]
    replies[0] = train_reply(request, random_model(arrays, 0), 10, bad)
    result, _ = strategy.aggregate_train(1, replies)
    expected_result, _ = expected.aggregate_train(1, round_of(expected, HELD)[1:])

    (line,) = [m for m in flower_log.messages if "dropped the reply" in m]
    assert line.startswith(f"round 1: dropped the reply of node 71: {reason}")
    assert torch.equal(strategy.features, expected.features)
    assert torch.equal(strategy.classifier.weight, expected.classifier.weight)
    assert result is not None and expected_result is not None
    assert {n: a.data for n, a in result.items()} == {
        n: a.data for n, a in expected_result.items()
    }


def test_summary_names_every_setting(flower_log: pytest.LogCaptureFixture) -> None:
    with flower_log.at_level("INFO", logger="flwr"):
        creff(final_step=0.5).summary()
    for text in (
        "Shape (classes, per class, width): (3, 4, 6)",
        "7 steps, learning rate 0.2 in round 1, 0.5 in the last",
        "4 epochs, batch size 5, learning rate 0.05",
        "Drawn each round: 3 of 3 (seed 7)",
        "full precision, smallest cosine of a row 1",
    ):
        assert text in flower_log.text
