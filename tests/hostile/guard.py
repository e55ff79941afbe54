"""Watches one case: which files it touches, how long it takes, how it ends."""

import contextlib
import os
import resource
import signal
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from clip2fl_common.provenance import PACKAGE_ROOT

# Seconds that a case may take.
LIMIT_S = 10
# Address space of the process that runs all cases, beyond what it has at its start.
MEMORY_BYTES = 3 * 2**30

# Audit events whose first argument is a path that is read or written.
_EVENTS = {
    "open",
    "os.listdir",
    "os.scandir",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.truncate",
    "shutil.rmtree",
    "sqlite3.connect",
}


class TookTooLongError(BaseException):
    """A case ran into its limit; no handler of the program catches it."""


@dataclass
class Guard:
    """Files outside these folders are none of the program's business.

    Attributes
    ----------
    allowed : set of str
        Resolved folders and files that the case at hand may touch.
    touched : list of str
        What else it has touched.
    """

    allowed: set[str] = field(default_factory=set)
    touched: list[str] = field(default_factory=list)
    _active: bool = False

    def install(self) -> None:
        """Listen to this process's audit events, from now on and for good."""
        sys.addaudithook(self._listen)

    def _listen(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active or event not in _EVENTS or not arguments:
            return
        # A link's own place is what is written; it may name anything.
        path = arguments[1 if event in ("os.symlink", "os.link") else 0]
        if isinstance(path, int) or path is None:
            return
        self._active = False  # resolving a path may raise events itself
        try:
            text = os.path.realpath(os.fsdecode(path))
            made_before = event == "os.mkdir" and os.path.isdir(text)
            if not made_before and not any(
                text == place or text.startswith(f"{place}/")
                for place in (*self.allowed, *_OWN)
            ):
                self.touched.append(f"{event} {text}")
        finally:
            self._active = True

    @contextlib.contextmanager
    def watch(self, *folders: Path) -> Iterator[None]:
        """Watch a case that may use these folders, and end it when it takes too long.

        Raises
        ------
        TookTooLongError
            After `LIMIT_S` seconds.
        """
        self.allowed = {os.path.realpath(folder) for folder in folders}
        self.touched = []
        previous = signal.signal(signal.SIGALRM, _expired)
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        self._active = True
        try:
            yield
        finally:
            self._active = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


def _expired(_signum: int, _frame: FrameType | None) -> None:
    raise TookTooLongError


# Python, its packages, the program, and what the system offers to every process.
_OWN = tuple(
    os.path.realpath(place)
    for place in {
        sys.prefix,
        sys.base_prefix,
        sys.exec_prefix,
        *sysconfig.get_paths().values(),
        str(PACKAGE_ROOT),
        "/usr/lib",
        "/usr/share/zoneinfo",
        "/lib",
        "/sys/devices/system",
        "/sys/fs/cgroup/memory.max",
        "/proc/cpuinfo",
        "/proc/meminfo",
        "/proc/sys/kernel",
        "/dev/null",
        "/dev/urandom",
        "/etc/localtime",
    }
)


def own_temporary_folder() -> Path:
    """Return a new folder for all cases, which is also this process's for temporary."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    tempfile.tempdir = str(folder)
    return folder


def bound_memory() -> None:
    """Let this process not take more than `MEMORY_BYTES` from now on."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
