"""What tests of strategies need of Flower."""

import logging
from collections.abc import Iterator

import pytest
from flwr.supercore.task_identity import TaskIdentity


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be what Flower takes for one of its processes, which messages ask for."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


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
