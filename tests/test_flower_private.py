"""Each private use of Flower still works; each test says what breaks if it does not."""

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from sqlalchemy import event
from sqlalchemy.pool import Pool

from clip2fl_cli.sites.registration import KEY_IN_USE
from deploy.superlink import (
    LOCK_WAIT_MS,
    check_senders,
    wait_for_locks,
)
from tests.checkout import copy_of_checkout
from tests.flower_private import (
    FleetOfTwo,
    act_as_flower_process,
    claim,
    code_of_a_key_in_use,
    database_wait_ms,
    fleet_handlers,
    flower_error,
    give_id,
    lost_node_error,
    parse_node_config,
    publishable_files,
    wire_bytes,
)

NODE = 42


@pytest.fixture
def request_message(monkeypatch: pytest.MonkeyPatch) -> Message:
    """Return a message to a node."""
    act_as_flower_process(monkeypatch.setattr)
    content = RecordDict({"config": ConfigRecord({"word": "unmistakable"})})
    return Message(content, NODE, "train")


def test_messages_can_be_made_outside_a_process_of_flower(
    request_message: Message,
) -> None:
    """Else no test of the apps and no benchmark without Flower's processes runs."""
    reply = Message(RecordDict(), reply_to=request_message)
    assert request_message.metadata.dst_node_id == NODE
    assert reply.metadata.src_node_id == NODE


def test_message_takes_an_id_that_its_reply_names(request_message: Message) -> None:
    """Else `InProcessGrid` cannot tell which request a reply belongs to."""
    give_id(request_message, "request-7")
    reply = Message(RecordDict(), reply_to=request_message)
    assert request_message.metadata.message_id == "request-7"
    assert reply.metadata.reply_to_message_id == "request-7"


def test_metadata_take_what_a_hostile_node_claims(request_message: Message) -> None:
    """Else no test shows what `AttentiveGrid` does with such a reply."""
    reply = Message(RecordDict(), reply_to=request_message)
    claim(reply, "_src_node_id", NODE + 1)
    claim(reply, "_reply_to_message_id", "request-8")
    assert reply.metadata.src_node_id == NODE + 1
    assert reply.metadata.reply_to_message_id == "request-8"


def test_wire_bytes_hold_all_of_a_message(request_message: Message) -> None:
    """Else the test of what leaves a site (test_sites.py) looks at too little."""
    wire = wire_bytes(request_message)
    assert b"unmistakable" in wire and b"config" in wire


def test_lost_node_is_reported_by_the_superlink(request_message: Message) -> None:
    """Else `AttentiveGrid` corrects an error that Flower no longer sends.

    It names the node that was asked; without that the log would blame the SuperLink.
    """
    lost = lost_node_error(request_message, "request-7")
    assert lost.has_error() and lost.error.code not in (0, 1)
    assert lost.metadata.src_node_id != NODE
    assert lost.metadata.reply_to_message_id == "request-7"
    assert Message(Error(5), reply_to=request_message).metadata.src_node_id == NODE


def test_node_config_is_read_as_toml() -> None:
    """Else `clip2fl site` writes paths that Flower reads otherwise."""
    text = 'data-path="/a\\U00000022b" number=3 on=true'
    expected = {"data-path": '/a"b', "number": 3, "on": True}
    assert parse_node_config(text) == expected


def test_code_of_a_key_in_use_is_the_one_that_registration_knows() -> None:
    """Else `clip2fl site register` takes a site that is registered for one refused."""
    assert f"[code: {code_of_a_key_in_use()}]" == KEY_IN_USE


@pytest.fixture
def patient() -> Iterator[None]:
    """Let connections wait as deploy/superlink.py does."""
    event.listen(Pool, "checkout", wait_for_locks)
    yield
    event.remove(Pool, "checkout", wait_for_locks)


def test_superlink_waits_longer_for_its_database(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Else deploy/superlink.py does nothing, or Flower waits long enough by itself.

    In the first case a slow disk ends runs again; in the second, flower-superlink can
    be started directly.
    """
    assert database_wait_ms(tmp_path / "plain.db") < LOCK_WAIT_MS
    request.getfixturevalue("patient")
    assert database_wait_ms(tmp_path / "patient.db") == LOCK_WAIT_MS


@pytest.fixture
def checking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check senders as deploy/superlink.py does, until the end of the test."""
    name = "push_messages"
    module = fleet_handlers()
    monkeypatch.setattr(module, name, getattr(module, name))
    check_senders()


def test_flower_lets_a_node_give_orders_to_another(tmp_path: Path) -> None:
    """Else the check of senders in deploy/superlink.py can go."""
    fleet = FleetOfTwo(tmp_path)
    hostile, other = fleet.nodes
    fleet.push(hostile, sender=1, receiver=other, reply_to="")
    assert fleet.orders(other) == 1


@pytest.mark.usefixtures("checking")
def test_node_sends_only_replies_in_its_own_name(tmp_path: Path) -> None:
    """Else a site commands other sites, answers for them, or costs them their reply."""
    fleet = FleetOfTwo(tmp_path)
    hostile, other = fleet.nodes
    for sender, receiver, reply_to, reason in (
        (1, other, "", "in the name of 1"),
        (other, 1, "0" * 64, f"in the name of {other}"),
        (hostile, 1, "", "is no reply"),
    ):
        with pytest.raises(flower_error(), match=f"SuperNode {hostile} .*{reason}"):
            fleet.push(hostile, sender, receiver, reply_to)
    assert fleet.orders(other) == 0
    fleet.push(hostile, hostile, 1, reply_to="0" * 64)


def test_a_fresh_clone_may_be_published(tmp_path: Path) -> None:
    """Else `flwr app publish` refuses the app before it uploads anything.

    What is uploaded must hold all that `flwr build` bundles.
    """
    app = copy_of_checkout(tmp_path)
    names = {str(file.relative_to(app)) for file in publishable_files(app)}
    assert {"pyproject.toml", "LICENSE", "README.md", ".gitignore"} <= names
    bundled = ("client_app", "server_app", "strategy", "clip2fl_common")
    wanted = {
        str(file.relative_to(app))
        for package in bundled
        for file in (app / package).rglob("*")
        if file.suffix in (".py", ".json")
    }
    assert wanted <= names


@pytest.mark.parametrize("damage", ["large", "binary"])
def test_publishing_checks_what_it_would_upload(tmp_path: Path, damage: str) -> None:
    """Else the test before this one passes whatever the files are."""
    app = copy_of_checkout(tmp_path)
    content = b" " * (2**20 + 1) if damage == "large" else b"\xff"
    (app / "client_app" / "more.json").write_bytes(content)
    with pytest.raises(click.ClickException, match="too large|not UTF-8"):
        publishable_files(app)
