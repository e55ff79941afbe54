"""Settings of all tests."""

import logging
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# The tensors are small: more threads cost time, and sums then depend on the machine.
torch.set_num_threads(1)

# The same examples everywhere, and no verdict that depends on a machine's speed.
settings.register_profile(
    "clip2fl", derandomize=True, deadline=None, database=None, max_examples=30
)
settings.load_profile("clip2fl")


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
