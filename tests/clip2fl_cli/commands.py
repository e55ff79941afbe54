"""Run the command in this process."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from clip2fl_cli import app

# Far longer than any of these commands takes, so that a test ends that hangs on a FIFO.
HANGS_SECONDS = 120


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | int | Path) -> int:
    """Run the command in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["clip2fl", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        app.main()
    code = exit_.value.code
    return code if isinstance(code, int) else 0


@contextmanager
def no_hanging() -> Iterator[None]:
    """Fail if the code inside does not end."""

    def hangs(_signum: int, _frame: FrameType | None) -> None:
        raise AssertionError("the command hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(HANGS_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: str | int | Path,
) -> str:
    """Run a command that must be refused in one line; return that line."""
    capsys.readouterr()
    with no_hanging():
        status = run(monkeypatch, *arguments)
    captured = capsys.readouterr()
    assert status == 2, captured
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("clip2fl: ")
    assert line.isprintable(), ascii(line)
    return line


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """Return everything below a folder: contents of files, targets of links."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found
