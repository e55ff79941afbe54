"""FedProx switches the proximal term on, and nothing else."""

import pytest

from clip2fl_common import messages
from strategy.fedavg import FedAvg
from strategy.fedprox import FedProx
from tests.strategy.messages import (
    client_plan,
    configure,
    global_model,
    made,
    safeguards,
)


def test_requests_carry_the_proximal_weight() -> None:
    plan = client_plan()
    arrays = global_model()
    requests = configure(made(FedProx, plan, fedprox__mu=0.25, **safeguards()), arrays)
    plain = configure(made(FedAvg, plan, **safeguards()), arrays)
    assert len(requests) == len(plain) == 3
    for request, other in zip(requests, plain, strict=True):
        assert request.metadata.dst_node_id == other.metadata.dst_node_id
        assert set(request.content) == set(other.content)
        assert dict(request.content.config_records[messages.CONFIG]) == {
            **other.content.config_records[messages.CONFIG],
            messages.PROXIMAL_MU: 0.25,
        }
        parsed = messages.TrainRequest.parse(request.content)
        assert parsed.proximal_mu == 0.25
        assert parsed.distillation_weight == 0
        assert parsed.classifier is None


def test_weight_zero_warns(flower_log: pytest.LogCaptureFixture) -> None:
    made(FedProx, client_plan(), fedprox__mu=0.0, **safeguards())
    assert "makes the strategy equivalent to FedAvg" in flower_log.text


def test_summary_names_the_weight(flower_log: pytest.LogCaptureFixture) -> None:
    with flower_log.at_level("INFO", logger="flwr"):
        made(FedProx, client_plan(), fedprox__mu=0.25, **safeguards()).summary()
    assert "Proximal mu: 0.25" in flower_log.text
    assert "Drawn each round: 3 of 4" in flower_log.text
