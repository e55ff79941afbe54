"""Hostile input on the real apps; `python -m tests.hostile` says what is tried."""

import os
import subprocess
import sys

import pytest

from tests.defaults import ROOT


@pytest.mark.parametrize(
    "every", [pytest.param(1, marks=pytest.mark.slow, id="all"), 40]
)
def test_hostile_input_neither_breaks_nor_leaks(every: int) -> None:
    """In a process of its own, whose memory is bounded and whose files are watched."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile", "--every", str(every)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert done.returncode == 0, "\n".join(failed) or done.stdout[-3000:]
