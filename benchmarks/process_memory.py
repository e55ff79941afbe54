"""Peak memory of a run's processes, by what they do, while the run goes on."""

import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = "CLIP2FL_BENCHMARK_MARK"
"""Environment variable that all processes of a run inherit; only they are counted."""
INTERVAL_S = 0.5
PROC = Path("/proc")


class Peaks:
    """The largest memory so far, in GiB.

    Attributes
    ----------
    of_role : dict of str to float
        Largest resident memory of a single process, by role: client, server or other.
    together : float
        Largest sum over all processes at one time; memory that processes share counts
        once (proportional set size).
    """

    def __init__(self) -> None:
        self.of_role: dict[str, float] = {}
        self.together = 0.0

    def sample(self, mark: bytes) -> None:
        """Read the memory of every process whose environment has the mark."""
        together = 0.0
        for folder in PROC.iterdir():
            if not folder.name.isdigit() or int(folder.name) == os.getpid():
                continue
            try:
                if mark not in (folder / "environ").read_bytes():
                    continue
                together += _field(folder / "smaps_rollup", "Pss")
                role = _role((folder / "cmdline").read_bytes())
                peak = _field(folder / "status", "VmHWM")
            except OSError:  # it has ended
                continue
            self.of_role[role] = max(peak, self.of_role.get(role, 0.0))
        self.together = max(self.together, together)


def _field(file: Path, name: str) -> float:
    """Return a field of one of /proc's files in GiB; 0 if it is absent."""
    for line in file.read_text("ascii", "replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 2**20
    return 0.0


def _role(command: bytes) -> str:
    if b"ClientAppActor" in command:
        return "client"
    # A simulation's ServerApp is a thread of the process that starts Ray.
    serving = (b"flwr-serverapp", b"flwr-simulation")
    return "server" if any(name in command for name in serving) else "other"


@contextmanager
def measured_memory() -> Iterator[Peaks]:
    """Measure the processes that are started within the block."""
    name = secrets.token_hex(8)
    os.environ[MARK] = name
    mark = f"{MARK}={name}".encode()
    peaks, ended = Peaks(), threading.Event()

    def watch() -> None:
        while not ended.wait(INTERVAL_S):
            peaks.sample(mark)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()
        del os.environ[MARK]
