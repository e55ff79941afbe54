"""CLIP2FL with momentum: FedAvgM's model, CLIP2FL's features and classifier."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from flwr.app import ArrayRecord
from torch.nn import functional

from clip2fl_common.config import Scalar
from strategy.base import Method
from strategy.clip2fl import CLIP2FL
from strategy.clip2flm import CLIP2FLM
from strategy.creff import CLASSIFIER, FEATURES, CReFF
from strategy.fedavgm import FedAvgM
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

SHAPE = CLASSES, DIM = 3, 6
MOMENTUM: dict[str, Scalar] = {"fedavgm__momentum": 0.6, "fedavgm__learning_rate": 0.5}
S = TypeVar("S", bound=CLIP2FL)


def strategy(
    cls: type[S], momentum: Mapping[str, Scalar] | None = None, rule: str = "mean"
) -> S:
    """Return a small CLIP2FL, with momentum or without."""
    prototypes = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    return made(
        cls,
        client_plan(),
        SHAPE,
        functional.normalize(prototypes, dim=1),
        synthesis__steps=4,
        retraining__epochs=2,
        upload__precision="full",
        federation__rounds=4,
        **(momentum or {}),
        **safeguards(rule=rule),
    )


def one_round(method: Method, arrays: ArrayRecord, server_round: int) -> ArrayRecord:
    """Return the next global model; clients answer with what depends on the round."""
    replies = [
        train_reply(
            request,
            random_model(arrays, 10 * server_round + n),
            10 + n,
            random_gradients(range(CLASSES), SHAPE, 10 * server_round + n)
            if isinstance(method, CReFF)
            else None,
        )
        for n, request in enumerate(configure(method, arrays, server_round))
    ]
    result, _ = method.aggregate_train(server_round, replies)
    assert result is not None
    return ArrayRecord(dict(result.items()))


def assert_same(a: ArrayRecord, b: ArrayRecord) -> None:
    assert list(a) == list(b)
    for name in a:
        assert (a[name].numpy() == b[name].numpy()).all()


def test_each_half_is_that_of_its_method() -> None:
    """Models to the last bit FedAvgM's, features and classifier CLIP2FL's."""
    both = strategy(CLIP2FLM, MOMENTUM)
    clip2fl = strategy(CLIP2FL)
    fedavgm = made(FedAvgM, client_plan(), **MOMENTUM, **safeguards())
    model = plain = other = global_model()
    for server_round in (1, 2, 3):
        model = one_round(both, model, server_round)
        plain = one_round(clip2fl, plain, server_round)
        other = one_round(fedavgm, other, server_round)
        assert_same(model, other)
        found, wanted = both.state(), clip2fl.state()
        for name in (FEATURES, f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias"):
            assert torch.equal(found[name], wanted[name])
    assert any((model[n].numpy() != plain[n].numpy()).any() for n in model)


def test_state_holds_momentum_features_and_classifier() -> None:
    """A strategy that takes it back goes on as the one that gave it."""
    first, second = (strategy(CLIP2FLM, MOMENTUM) for _ in range(2))
    model = one_round(first, one_round(first, global_model(), 1), 2)
    second.load_state(first.state())
    assert_same(one_round(first, model, 3), one_round(second, model, 3))
    assert first.state().keys() == second.state().keys()
    for name, tensor in first.state().items():
        assert torch.equal(tensor, second.state()[name])
