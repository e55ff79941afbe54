"""A model travels through proxy and SuperLink to real nodes, at once and later."""

import json
import sys
from pathlib import Path

import pytest

from clip2fl_cli.prediction import Model
from clip2fl_common.signed_folder import public_key_of, verify_folder
from server_app.signing import public_key_file
from tests.defaults import ROOT
from tests.deployment.conftest import COUNTS
from tests.deployment.stack import Machine, Stack, wait_for
from tests.site_folders import write_site


def add_site(server: Stack, name: str, key: str) -> Machine:
    """Make a node that takes models signed by a key."""
    node = server.add_node(name)
    write_site(node.folder / "images", COUNTS[name])
    (node.folder / "keys" / "policy.toml").write_text(
        f'models-folder = "{node.folder / "models"}"\nmodel-key = "{key}"\n'
    )
    return node


def clip2fl(machine: Machine, *arguments: object, timeout: float = 600) -> str:
    """Return what a command prints on a machine."""
    return machine.run(
        *("env", f"--chdir={ROOT}", sys.executable, "-m", "clip2fl_cli.app"),
        *arguments,
        timeout=timeout,
    )


@pytest.mark.slow
def test_model_reaches_a_node_at_the_runs_end_and_another_one_later(
    server: Stack,
) -> None:
    signing = server.folder / "signing.key"
    public = public_key_file(signing)
    key = public_key_of(str(public))
    north, east = (add_site(server, name, key) for name in ("north", "east"))
    server.start_node("north", north.folder / "images")
    server.start_run(
        'method="fedavg" federation.clients-per-round=1 client.epochs=1 '
        f'federation.rounds=1 delivery.signing-key="{signing}"'
    )
    assert server.wait_for_run(900) == 0, server.server.log("run")
    printed = server.server.log("run")
    assert "delivery: 1 of 1 connected sites have run-" in printed
    assert "delivery: north: stored" in printed

    server.start_node("east", east.folder / "images")
    wait_for("east", lambda: "SuperNode ID" in east.log("supernode"), 300)
    deliver = ("deliver", server.results, "--root-certificates", server.ca)
    printed = clip2fl(server.server, *deliver)
    assert "delivery: 2 of 2 connected sites have run-" in printed
    assert "delivery: north: was there before" in printed
    assert "delivery: east: stored" in printed

    expected = Model.load(server.results)
    for node in (north, east):
        policy = node.folder / "keys" / "policy.toml"
        fetched = node.folder / "fetched"
        clip2fl(node, "site", "fetch", fetched, "--policy", policy)
        assert verify_folder(fetched, key).run == "run"
        image = next(Path(node.folder / "images").rglob("*.png"))
        answer = clip2fl(node, "predict", "--json", "--model", fetched, image)
        (own,) = json.loads(answer.splitlines()[-1])
        (wanted,) = expected.predict([image], top=1)
        assert own["classes"][0]["name"] == wanted.name
        assert own["classes"][0]["probability"] == pytest.approx(
            wanted.probability, abs=1e-5
        )
    (card,) = (east.folder / "models").glob("[!.]*/card.json")
    described = json.loads(card.read_text("utf-8"))
    assert described["sites"] == {"trained": 1, "listed": []}
    # The commit of the checkout reaches the ServerApp, which runs a copy of it.
    assert described["code"]["commit"]
