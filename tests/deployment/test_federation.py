"""A federation as it is deployed: TLS, node keys, own images, real processes."""

import json
import shutil

import pytest
import torch

from clip2fl_common.site_registry import SiteRegistry
from server_app.delivery import load_model
from tests.deployment.conftest import TINY
from tests.deployment.stack import Stack, wait_for


@pytest.mark.slow
def test_run_completes_without_an_impostor_and_its_model_predicts(
    federation: Stack,
) -> None:
    impostor = federation.add_node("guest")
    keys = impostor.folder / "keys"
    shutil.copy(keys / "guest", keys / "west")
    federation.start_node("guest", federation.nodes["west"].folder / "images", "west")
    wait_for("impostor", lambda: "SuperNode ID" in impostor.log("supernode"), 300)
    federation.start_run(f"{TINY} federation.rounds=2")
    log = federation.server.log
    assert federation.wait_for_run(900) == 0, log("run")
    assert "calls itself west, but its key is registered for guest" in log("run")
    rounds = federation.rounds()
    assert [sorted(line["clients"]) for line in rounds] == [
        ["east", "north", "west"]
    ] * 2
    assert [line["dropped_replies"] for line in rounds] == [0, 0]
    model, card = load_model(federation.results / "model.safetensors")
    pixels = torch.zeros(1, 3, card.image_size, card.image_size, dtype=torch.uint8)
    assert model(card.normalization(pixels)).shape == (1, 10)

    assert "guest: removed" in federation.run_site("remove", "guest")
    sites = {s.name: str(s.node) for s in SiteRegistry.read(federation.registry).sites}
    assert set(sites) == {"east", "north", "west"}
    listed = federation.flwr("supernode", "list", "server", "--format", "json")
    left = {
        node["node-id"]
        for node in json.loads(listed)["nodes"]
        if node["status"] != "unregistered"
    }
    assert left == set(sites.values())
    assert "was removed before, and is of no use" in federation.register("guest")
