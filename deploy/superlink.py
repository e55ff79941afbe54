"""Flower's SuperLink with a longer wait for its database.

    python deploy/superlink.py --help

It accepts the options of `flower-superlink`. Flower waits five seconds for a locked
SQLite file and then answers with status 500. One such answer, on a slow disk or a busy
machine, ends the SuperExec and the run, or stops a node from asking for work again.
"""

from importlib.metadata import entry_points

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


def main() -> None:
    """Run flower-superlink in the same way as its own script."""
    event.listen(Pool, "checkout", wait_for_locks)
    (command,) = entry_points(group="console_scripts", name="flower-superlink")
    command.load()()


if __name__ == "__main__":
    main()
