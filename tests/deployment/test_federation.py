"""A federation as it is deployed: TLS, node keys, own images, real processes."""

import pytest
import torch

from server_app.checkpoint import load_model
from tests.deployment.conftest import TINY
from tests.deployment.stack import Stack, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "can be run")


@pytest.mark.slow
def test_run_completes_and_its_model_predicts(federation: Stack) -> None:
    federation.start_run(f"{TINY} federation.rounds=2")
    assert federation.wait_for_run(900) == 0, federation.server.log("run")
    rounds = federation.rounds()
    assert [sorted(line["clients"]) for line in rounds] == [
        ["east", "north", "west"]
    ] * 2
    assert [line["dropped_replies"] for line in rounds] == [0, 0]
    model, card = load_model(federation.results / "model.safetensors")
    pixels = torch.zeros(1, 3, card.image_size, card.image_size, dtype=torch.uint8)
    assert model(card.normalization(pixels)).shape == (1, 10)
