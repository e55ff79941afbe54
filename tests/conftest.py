"""Settings of all tests."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from clip2fl_cli.proxies import direct_here

# Jupyter and some CI services force colours, which are in the output that tests read.
# Rich and Typer look at some of these when they are imported.
for forced in (
    *("FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS"),
    *("TTY_COMPATIBLE", "TTY_INTERACTIVE"),
):
    os.environ.pop(forced, None)
# A test's own servers are on this machine.
os.environ.update(direct_here(os.environ))

from tests.flower_private import act_as_flower_process  # noqa: E402

# The tensors are small: more threads cost time, and sums then depend on the machine.
torch.set_num_threads(1)

# The same examples everywhere, and no verdict that depends on a machine's speed.
settings.register_profile(
    "clip2fl", derandomize=True, deadline=None, database=None, max_examples=30
)
settings.load_profile("clip2fl")


def be_flower(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep out of the user's cache; be what Flower takes for one of its processes."""
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(cache))
    act_as_flower_process(monkeypatch.setattr)


@pytest.fixture
def federation_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whole federations run in this process."""
    be_flower(tmp_path / "cache", monkeypatch)


@pytest.fixture
def flower_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    """Return a log of Flower's lines, each once whether they are handed on or not."""
    flower = logging.getLogger("flwr")
    monkeypatch.setattr(flower, "propagate", False)
    flower.addHandler(caplog.handler)
    yield caplog
    flower.removeHandler(caplog.handler)
