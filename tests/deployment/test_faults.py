"""Nodes, links and the SuperLink fail in mid-run; the run completes all the same."""

import contextlib
import sqlite3
from datetime import UTC, datetime

import pytest

from tests.deployment.conftest import COUNTS, TINY
from tests.deployment.stack import Stack, wait_for
from tests.site_folders import write_site
from tests.tiny_teacher import write_teacher

pytestmark = pytest.mark.slow
ALL = sorted(COUNTS)
# A round takes half a minute on two idle cores; others may use them.
ROUND_S = 300.0


def start(federation: Stack, rounds: int) -> None:
    """Start a run, and wait until the second round has reached the node east."""
    federation.start_run(f"{TINY} federation.rounds={rounds}")
    federation.wait_for_round(1, 2 * ROUND_S)
    east = federation.nodes["east"]
    wait_for("train message", lambda: east.log("supernode").count("train m") > 2, 120)


def clients(federation: Stack) -> list[list[str]]:
    """Return whose replies were used, round by round."""
    return [sorted(line["clients"]) for line in federation.rounds()]


def test_killed_node_is_left_out_by_name_and_comes_back(federation: Stack) -> None:
    start(federation, 8)
    since = datetime.now(UTC)
    federation.nodes["east"].kill_all()  # SIGKILL, the training process too
    lost = federation.told("away", "east", since, ROUND_S)
    assert lost["shown"]["east"]["state"] == "away"
    assert lost["shown"]["north"]["state"] != "away"
    (east,) = [s for s in federation.status()["sites"] if s["name"] == "east"]
    assert east["state"] == "away"
    since = datetime.now(UTC)
    federation.start_node("east", federation.nodes["east"].folder / "images")
    back = federation.told("back", "east", since, ROUND_S)
    assert back["shown"]["east"]["state"] != "away"
    assert federation.wait_for_run(8 * ROUND_S) == 0, federation.server.log("run")
    trained = clients(federation)
    assert trained[0] == ALL and ["north", "west"] in trained[1:]
    assert trained[-1] == ALL
    log = federation.server.log("run")
    assert "dropped the reply of node" in log and "(east)" in log


# Rounds of two nodes take 20 s on a fast machine: the run must outlast the cut, and the
# minute after which the node that was taken for lost may come back.
@pytest.mark.parametrize(("seconds", "rounds"), [(10, 4), (90, 12)])
def test_cut_link_heals_by_itself(federation: Stack, seconds: int, rounds: int) -> None:
    start(federation, rounds)
    east = federation.nodes["east"]
    since = datetime.now(UTC)
    east.link(up=False)
    federation.server.run("sleep", seconds)
    east.link(up=True)
    if seconds > 60:
        federation.told("away", "east", since, ROUND_S)
        back = federation.told("back", "east", since, ROUND_S)
        assert back["shown"]["east"]["state"] != "away"
    assert federation.wait_for_run(rounds * ROUND_S) == 0, federation.server.log("run")
    trained = clients(federation)
    assert len(trained) == rounds and trained[0] == trained[-1] == ALL
    if seconds < 60:  # shorter than two heartbeats: nobody notices
        assert trained == [ALL] * rounds
        assert "away" not in {event["what"] for event in federation.events()}


def test_superlink_killed_and_restarted(federation: Stack) -> None:
    start(federation, 3)
    # A SuperLink that is killed while the ServerApp sends its requests ends the run.
    nodes = federation.nodes.values()
    wait_for(
        "train messages",
        lambda: all(n.log("supernode").count("train m") > 2 for n in nodes),
        120,
    )
    federation.server.kill("superlink")
    # The ServerApp lives on, and what it has written can be read.
    assert federation.status()["state"] == "running"
    federation.start_superlink()
    assert federation.wait_for_run(3 * ROUND_S) == 0, federation.server.log("run")
    assert len(clients(federation)) == 3
    assert federation.status()["state"] == "completed"


def test_locked_database_does_not_end_the_run(federation: Stack) -> None:
    """A disk so slow that Flower's own SuperLink, after 5 s, would answer 500."""
    start(federation, 3)
    database = federation.server.folder / "state.db"
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        federation.server.run("sleep", 15)
        connection.rollback()
    assert federation.wait_for_run(3 * ROUND_S) == 0, federation.server.log("run")
    assert clients(federation) == [ALL] * 3
    assert "database is locked" not in federation.server.log("superlink")


def test_node_with_another_teacher_is_left_out_by_name(server: Stack) -> None:
    """Under the same path, each machine having a home of its own."""
    write_teacher(server.server.folder / "teacher", seed=0)
    for name, counts in COUNTS.items():
        node = server.add_node(name)
        write_site(node.folder / "images", counts)
        write_teacher(node.folder / "teacher", seed=int(name == "east"))
        rules = f'teacher-folders = ["{node.folder / "teacher"}"]\n'
        (node.folder / "keys" / "policy.toml").write_text(rules, "utf-8")
        server.start_node(name, node.folder / "images")
    server.start_run(f'{TINY} federation.rounds=1 teacher.model="local-dir:~/teacher"')
    assert server.wait_for_run(3 * ROUND_S) == 0, server.server.log("run")
    assert clients(server) == [["north", "west"]]
    # Its training and its evaluation.
    dropped = [e for e in server.events() if e["what"] == "dropped"]
    assert [e["site"] for e in dropped] == ["east", "east"]
    assert all("fingerprint" in e["reason"] for e in dropped)
    asked = next(
        e for e in server.events() if (e["what"], e.get("site")) == ("asked", "east")
    )
    since = datetime.fromisoformat(asked["time"])
    told = server.told("dropped", "east", since, 1)
    assert "fingerprint" in told["shown"]["east"]["reason"]
    (line,) = [
        line
        for line in server.server.log("run").splitlines()
        if "dropped the reply of node" in line
    ]
    assert "(east)" in line and "has the fingerprint" in line
    assert "at the server: install the same weights on both" in line
