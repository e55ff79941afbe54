"""Whether a run works in a folder, by the lock that `RunFolder` holds."""

import fcntl
import os
from pathlib import Path

from server_app.file_names import LOCK

LOOK_S = 0.5
"""For so long `RunFolder` tries, since a look locks a free folder for an instant."""


def in_use(folder: Path) -> bool:
    """Return whether a run on this machine works in a folder now.

    The system releases a run's lock when its process ends, even after a crash. A folder
    without a lock file, such as a copy, is not in use.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        lock = os.open(folder / LOCK, flags)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        # A file system without locks.
        return False
    finally:
        os.close(lock)
    return False
