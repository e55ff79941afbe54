"""Secure aggregation as it is deployed: TLS, own identity keys, real processes."""

import pytest

from tests.deployment.conftest import COUNTS, TINY
from tests.deployment.stack import Stack, wait_for
from tests.site_folders import write_site

pytestmark = pytest.mark.slow
ALL = sorted(COUNTS)
# A round has eight messages for each node, and each starts a process.
ROUND_S = 600.0


def test_killed_node_costs_rounds_and_the_run_completes(server: Stack) -> None:
    """Three sites are the fewest: without one of them there is no sum."""
    for name, counts in COUNTS.items():
        node = server.add_node(name)
        write_site(node.folder / "images", counts)
    for name in COUNTS:
        server.write_secure_rules(name)
        server.start_node(name, server.nodes[name].folder / "images")
    server.start_run(
        f'{TINY} method="fedavg" aggregation.secure=true federation.rounds=5'
    )
    server.wait_for_round(1, 2 * ROUND_S)
    east = server.nodes["east"]
    # Keys to train and to evaluate in the first round, then those of the second.
    wait_for("keys", lambda: east.log("supernode").count("train.keys m") > 2, ROUND_S)
    east.kill_all()
    server.start_node("east", east.folder / "images")
    assert server.wait_for_run(5 * ROUND_S) == 0, server.server.log("run")
    rounds = server.rounds()
    trained = [sorted(line["clients"]) for line in rounds]
    assert len(rounds) == 5 and trained[0] == trained[-1] == ALL
    lost = [line for line in rounds if line["kept_model"]]
    assert lost and all(line["lost"] and not line["clients"] for line in lost)
    for line in (rounds[0], rounds[-1]):
        assert line["accuracy"] and line["summed_evaluation"]["sites"] == len(ALL)
    assert all(line["sites"] == {} for line in rounds)
    assert (server.results / "model.safetensors").is_file()
