"""Flower's SuperLink, which waits longer for its database.

    python deploy/superlink.py --help

Takes what `flower-superlink` takes. Flower waits five seconds for a locked SQLite file
and then answers 500. One such answer, on a slow disk or a busy machine, ends the
SuperExec and with it the run, or leaves a node running that never asks for work again.
"""

from importlib.metadata import entry_points

from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection

# Below the 30 s after which Flower's clients ask again: nothing is to be done for one
# that has given up.
LOCK_WAIT_MS = 25_000


def wait_for_locks(
    connection: DBAPIConnection,
    _record: ConnectionPoolEntry,
    _proxy: PoolProxiedConnection,
) -> None:
    """Have a connection wait for a lock; on each use, as Flower sets its own limit."""
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {LOCK_WAIT_MS}")
    cursor.close()


def main() -> None:
    """Run Flower's command of the name flower-superlink, as its own script does."""
    event.listen(Pool, "checkout", wait_for_locks)
    (command,) = entry_points(group="console_scripts", name="flower-superlink")
    command.load()()


if __name__ == "__main__":
    main()
