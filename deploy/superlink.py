"""Flower's SuperLink with a longer wait for its database, and a check of senders.

    python deploy/superlink.py --help

It accepts the options of `flower-superlink`. Flower waits five seconds for a locked
SQLite file and then answers with status 500. One such answer, on a slow disk or a busy
machine, ends the SuperExec and the run, or stops a node from asking for work again.

Flower checks the key of a node that asks, but not the sender that its messages name. So
a registered node could give other nodes orders in the server's name, or answer in
another node's. It could also send the server messages that nobody asked for, with which
the SuperLink hands over other nodes' replies.
"""

from importlib.metadata import entry_points
from typing import Any

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.superlink.servicer.fleet import fleet_handlers
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection

# Below the 30 s after which Flower's clients repeat a request, so that no request is
# answered after its client has given up.
LOCK_WAIT_MS = 25_000


def wait_for_locks(
    connection: DBAPIConnection,
    _record: ConnectionPoolEntry,
    _proxy: PoolProxiedConnection,
) -> None:
    """Set the lock wait of a connection on each use, because Flower sets its own."""
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {LOCK_WAIT_MS}")
    cursor.close()


def objection(request: PushMessagesRequest) -> str:
    """Return why a node must not send this, or an empty string.

    Parameters
    ----------
    request : PushMessagesRequest
        What a node sends; Flower has checked that it is ``request.node``.
    """
    if len(request.messages_list) != 1:
        return f"sent {len(request.messages_list)} messages at once"
    metadata = request.messages_list[0].metadata
    if metadata.src_node_id != request.node.node_id:
        return f"sent a message in the name of {metadata.src_node_id}"
    if not metadata.reply_to_message_id:
        return "sent a message that is no reply"
    return ""


def check_senders() -> None:
    """Let each node send nothing but replies in its own name."""
    push_messages = fleet_handlers.push_messages

    def checked(request: PushMessagesRequest, state: Any) -> Any:
        if reason := objection(request):
            raise FlowerError(
                ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED,
                f"refused: SuperNode {request.node.node_id} {reason}",
            )
        return push_messages(request=request, state=state)

    setattr(fleet_handlers, push_messages.__name__, checked)


def main() -> None:
    """Run flower-superlink in the same way as its own script."""
    event.listen(Pool, "checkout", wait_for_locks)
    check_senders()
    (command,) = entry_points(group="console_scripts", name="flower-superlink")
    command.load()()


if __name__ == "__main__":
    main()
