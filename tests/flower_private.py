"""All private names of Flower that tests and benchmarks use, each in one function.

Flower may change these in any release. ``tests/test_flower_private.py`` has a test for
each, which says what breaks when it fails.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Message
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
