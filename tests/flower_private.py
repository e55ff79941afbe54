"""All private names of Flower that tests and benchmarks use, each in one function.

Flower may change these in any release. ``tests/test_flower_private.py`` has a test for
each, which says what breaks when it fails.
"""

import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity


def act_as_flower_process(
    set_attribute: Callable[[object, str, object], None] = setattr,
) -> None:
    """Set what Flower's own processes set before they make messages.

    Parameters
    ----------
    set_attribute : callable
        Sets one attribute; ``monkeypatch.setattr`` takes it back after a test.
    """
    for name in ("_run_id", "_task_id", "_node_id"):
        set_attribute(TaskIdentity, name, 1)


def give_id(message: Message, message_id: str) -> None:
    """Give a message the id that Flower's grid gives it when it sends the message."""
    message.metadata.__dict__["_message_id"] = message_id


def claim(message: Message, name: str, value: str | int) -> None:
    """Change a value of a message's metadata, as a hostile node can."""
    message.metadata.__dict__[name] = value


def wire_bytes(message: Message) -> bytes:
    """Return all bytes of a message that Flower would send."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    return b"".join(part.deflate() for part in get_all_nested_objects(message).values())


def lost_node_error(request: Message, reply_to: str) -> Message:
    """Return the SuperLink's reply to a message whose node went offline.

    Parameters
    ----------
    request : Message
        A message to a node.
    reply_to : str
        Id of the message that gets no other reply.

    Returns
    -------
    Message
        An error whose source is the SuperLink, not the node.
    """
    from flwr.server.superlink.linkstate.utils import (
        create_message_error_unavailable_res_message,
    )

    error = create_message_error_unavailable_res_message(
        request.metadata, "node_unavail"
    )
    error.metadata.__dict__["_reply_to_message_id"] = reply_to
    return error


def parse_node_config(text: str) -> dict[str, Any]:
    """Return a node's configuration as Flower reads it from ``--node-config``."""
    from flwr.common.config import parse_config_args

    return dict(parse_config_args([text]))


def code_of_a_key_in_use() -> int:
    """Return the code with which Flower refuses a node's key that it knows."""
    from flwr.supercore.error import ApiErrorCode

    return int(ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE)


def database_wait_ms(database: Path) -> int:
    """Return how long a connection of the SuperLink waits for a locked database.

    Parameters
    ----------
    database : Path
        SQLite file, which is made.

    Returns
    -------
    int
        Milliseconds.
    """
    from flwr.supercore.object_store.sql_object_store import SqlObjectStore
    from sqlalchemy import text

    store = SqlObjectStore(str(database))
    store.initialize()
    with store.session() as session:
        return int(session.execute(text("PRAGMA busy_timeout")).scalar_one())


def publishable_files(app: Path) -> list[Path]:
    """Return the files that ``flwr app publish`` would upload, after its own checks.

    Parameters
    ----------
    app : Path
        Folder of the app.

    Returns
    -------
    list of Path
        Absolute paths.

    Raises
    ------
    click.ClickException
        If Flower refuses the app's name, its description or one of its files.
    """
    from importlib import import_module

    from flwr.cli.config_utils import load_and_validate

    # The package exports the command of the same name over the module.
    publish = import_module("flwr.cli.app_cmd.publish")
    app = app.resolve()
    config, _ = load_and_validate(app / "pyproject.toml", check_module=False)
    publish._validate_app_name(app.name, "Flower App directory name")
    publish._validate_description(config["project"].get("description", ""))
    files: list[Path] = publish._collect_file_paths(app)
    publish._validate_files(files)
    return files


def fleet_handlers() -> ModuleType:
    """Return the module in which the SuperLink looks up how to answer nodes."""
    from flwr.superlink.servicer.fleet import fleet_handlers

    return fleet_handlers


def flower_error() -> type[Exception]:
    """Return the error with which the SuperLink answers what it does not allow."""
    from flwr.supercore.error import FlowerError

    return FlowerError


class FleetOfTwo:
    """A SuperLink with two nodes and a running run, without servers and sockets.

    Parameters
    ----------
    folder : Path
        Folder for its database.

    Attributes
    ----------
    nodes : tuple of int
        Ids of the two nodes.
    """

    def __init__(self, folder: Path) -> None:
        from flwr.server.superlink.linkstate.linkstate_factory import LinkStateFactory
        from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
        from flwr.supercore.object_store import ObjectStoreFactory
        from flwr.superlink.federation import NoOpFederationManager

        database = str(folder / "superlink.db")
        self._state = LinkStateFactory(
            database, NoOpFederationManager(), ObjectStoreFactory(database)
        ).state()
        first, second = (
            self._state.create_node("owner", "owner", bytes([number]) * 40, 30.0)
            for number in (1, 2)
        )
        self.nodes = (first, second)
        for node in self.nodes:
            self._state.activate_node(node, 60.0)
        kind = TaskType.SERVER_APP
        self._run = self._state.create_run(
            "a/b", "1", "hash", {}, NOOP_FEDERATION_ID, None, "owner", kind
        )
        (task,) = self._state.get_tasks(run_ids=[self._run])
        self._state.claim_task(task.task_id)
        self._state.activate_task(task.task_id)

    def push(self, node: int, sender: int, receiver: int, reply_to: str) -> None:
        """Send a message as a node does, by the route of the SuperLink's HTTP server.

        Parameters
        ----------
        node : int
            The node whose key Flower has checked.
        sender, receiver : int
            What the message names; 1 is the SuperLink.
        reply_to : str
            Id of the message that it replies to; empty for none.
        """
        from flwr.app import Metadata
        from flwr.app.message.message import make_message, remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.proto.fleet_pb2 import PushMessagesRequest
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.inflatable.inflatable_object import get_object_tree
        from flwr.superlink.routers.fleet.router import fleet_push_messages

        message = make_message(
            metadata=Metadata(
                run_id=self._run,
                message_id="",
                src_node_id=sender,
                dst_node_id=receiver,
                reply_to_message_id=reply_to,
                group_id="",
                created_at=time.time(),
                ttl=60.0,
                message_type="train",
            ),
            content=RecordDict(),
        )
        message.metadata.delivered_at = ""
        give_id(message, message.object_id)
        request = PushMessagesRequest(
            node=Node(node_id=node),
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[get_object_tree(message)],
        )
        fleet_push_messages(request, self._state)

    def orders(self, node: int) -> int:
        """Return the number of messages that wait for a node, and take them."""
        return len(self._state.get_message_ins(node, limit=None))
